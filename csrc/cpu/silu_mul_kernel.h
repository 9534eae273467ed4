// The vector code of silu_mul; silu_mul.cpp has the maths and the model. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.
//
// A NaN rounds to a NaN here: those of bfloat16 inputs and of arithmetic have zeros in the low bits
// that are rounded away.

namespace {

#include "cpu/padded_kernel.h"

// 2^y as the kernels of logits take it: the rounding of y is no more than bfloat16 sees.
struct Exp {
  Simd::Exp2 exp2;

  Exp() : exp2(1.0f) {}
  inline Simd::F operator()(Simd::F t, BF16) const {
    return exp2.value(Simd::mul(t, Simd::set1(0x1.715476p+0f)));
  }
  // To about 0.6 units in the last place: n the integer next to t / ln 2, a polynomial of relative
  // error 3e-9 for exp(t - n ln 2). The product of n and the upper part of ln 2 is exact.
  inline Simd::F operator()(Simd::F t, float) const {
    const Simd::F shift = Simd::set1(0x1.8p+23f);
    const Simd::F n =
        Simd::sub(Simd::fma(t, Simd::set1(0x1.715476p+0f), shift), shift);
    Simd::F r = Simd::fma(n, Simd::set1(-0x1.63p-1f), t);
    r = Simd::fma(n, Simd::set1(0x1.bd0106p-13f), r);
    Simd::F p = Simd::fma(r, Simd::set1(0x1.6a2318p-10f), Simd::set1(0x1.123a8ep-7f));
    p = Simd::fma(r, p, Simd::set1(0x1.5558f6p-5f));
    p = Simd::fma(r, p, Simd::set1(0x1.555490p-3f));
    p = Simd::fma(r, p, Simd::set1(0x1.fffffcp-2f));
    p = Simd::add(Simd::fma(Simd::mul(r, r), p, r), Simd::set1(1.0f));
    return Simd::mul(p, exp2.value(n));
  }
};

// With e = exp(-x): sigmoid(x) = 1 / (1 + e), silu(x) = x / (1 + e). Below -88, where e nears the
// largest float, they are 0 (silu(-88) is -5e-37). A NaN and -inf come out as NaN.
template <class T>
struct Sigmoid {
  Exp exp;

  Sigmoid() : exp() {}
  // e, and the numerators of sigmoid(x) and silu(x)
  inline void parts(Simd::F x, Simd::F& e, Simd::F& one, Simd::F& numerator) const {
    const Simd::F zero = Simd::zero(), least = Simd::set1(-88.0f);
    const Simd::F t = Simd::sub(zero, Simd::max_into(least, x));
    e = exp(Simd::max_into(Simd::set1(-128.0f), t), T());
    one = Simd::pick_less(x, least, zero, Simd::set1(1.0f));
    numerator = Simd::mul(x, one);
  }

  inline Simd::F silu(Simd::F x) const {
    Simd::F e, one, numerator;
    parts(x, e, one, numerator);
    return Simd::div(numerator, Simd::add(e, Simd::set1(1.0f)));
  }

  // silu(x) and its slope, s (1 + x (1 - s)) with s = sigmoid(x). In float32, quotients instead of
  // products with an inverse, which are rounded once more; and 1 - s where s is not too near 1 for
  // it: its error then cancels part of that of s.
  inline void silu_and_slope(Simd::F x, Simd::F& value, Simd::F& slope) const {
    const Simd::F unit = Simd::set1(1.0f);
    Simd::F e, one, numerator;
    parts(x, e, one, numerator);
    const Simd::F below = Simd::add(e, unit), inverse = Simd::div(unit, below);
    const Simd::F s = Simd::mul(one, inverse);
    Simd::F rest = Simd::mul(e, inverse);
    value = Simd::mul(numerator, inverse);
    if (sizeof(T) == 4) {
      value = Simd::div(numerator, below);
      rest = Simd::pick_less(x, Simd::set1(3.0f), Simd::sub(unit, s), rest);
    }
    slope = Simd::mul(s, Simd::fma(x, rest, unit));
  }
};

template <class T>
void silu_fwd_elements(const SiluJob& job, int64_t first, int64_t end) {
  const T* gate = static_cast<const T*>(job.gate);
  const T* up = static_cast<const T*>(job.up);
  T* out = static_cast<T*>(job.out);
  const Sigmoid<T> sigmoid;
  const auto put = [&](const T* x, const T* by, T* to) {
    Simd::F a, b, p, q;
    Simd::load2(x, a, b);
    Simd::load2(by, p, q);
    a = Simd::rounded(sigmoid.silu(a), T());
    b = Simd::rounded(sigmoid.silu(b), T());
    Simd::template store2<false>(to, Simd::mul(a, p), Simd::mul(b, q));
  };
  int64_t j = first;
  for (; j + Simd::kGroup <= end; j += Simd::kGroup) put(gate + j, up + j, out + j);
  if (j < end) {
    Padded<T> to;
    put(Padded<T>(gate + j, end - j).elements, Padded<T>(up + j, end - j).elements, to.elements);
    to.copy_to(out + j, end - j);
  }
}

template <class T>
void silu_bwd_elements(const SiluJob& job, int64_t first, int64_t end) {
  const T* gate = static_cast<const T*>(job.gate);
  const T* up = static_cast<const T*>(job.up);
  const T* grad = static_cast<const T*>(job.grad);
  T* d_gate = static_cast<T*>(job.out);
  T* d_up = static_cast<T*>(job.d_up);
  const Sigmoid<T> sigmoid;
  const auto put = [&](const T* x, const T* by, const T* g, T* to_gate, T* to_up) {
    Simd::F a, b, p, q, s, t, a_slope, b_slope;
    Simd::load2(x, a, b);
    Simd::load2(by, p, q);
    Simd::load2(g, s, t);
    sigmoid.silu_and_slope(a, a, a_slope);
    sigmoid.silu_and_slope(b, b, b_slope);
    Simd::template store2<false>(to_up, Simd::mul(s, a), Simd::mul(t, b));
    Simd::template store2<false>(to_gate, Simd::mul(Simd::mul(s, p), a_slope),
                                 Simd::mul(Simd::mul(t, q), b_slope));
  };
  int64_t j = first;
  for (; j + Simd::kGroup <= end; j += Simd::kGroup) {
    put(gate + j, up + j, grad + j, d_gate + j, d_up + j);
  }
  if (j < end) {
    Padded<T> to_gate, to_up;
    put(Padded<T>(gate + j, end - j).elements, Padded<T>(up + j, end - j).elements,
        Padded<T>(grad + j, end - j).elements, to_gate.elements, to_up.elements);
    to_gate.copy_to(d_gate + j, end - j);
    to_up.copy_to(d_up + j, end - j);
  }
}

}  // namespace

const SiluTable silu_tables[2] = {{&silu_fwd_elements<float>, &silu_bwd_elements<float>},
                                  {&silu_fwd_elements<BF16>, &silu_bwd_elements<BF16>}};
