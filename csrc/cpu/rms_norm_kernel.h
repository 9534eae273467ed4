// The vector code of rms_norm; rms_norm.cpp has the maths and the model. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.
//
// A NaN rounds to a NaN here: those of bfloat16 inputs and of arithmetic have zeros in the low bits
// that are rounded away.

namespace {

#include "cpu/padded_kernel.h"

constexpr int64_t kNormBlock = 1024;  // columns that a lane adds up before it starts anew

// Calls group(j) for whole groups of the columns, block by block with flush() behind each; then
// rest(j, count) for what is left.
template <class Group, class Flush, class Rest>
inline void for_each_group(int64_t columns, const Group& group, const Flush& flush,
                           const Rest& rest) {
  const int64_t whole = columns / Simd::kGroup * Simd::kGroup;
  for (int64_t j = 0; j < whole;) {
    const int64_t stop = std::min(whole, j + kNormBlock);
    for (; j < stop; j += Simd::kGroup) group(j);
    flush();
  }
  if (whole < columns) rest(whole, columns - whole);
}

template <class T>
struct Squares {
  Simd::F a, b, total;

  Squares() : a(Simd::zero()), b(Simd::zero()), total(Simd::zero()) {}
  inline void add(const T* x) {
    Simd::F u, v;
    Simd::load2(x, u, v);
    a = Simd::fma(u, u, a);
    b = Simd::fma(v, v, b);
  }
  inline void flush() {
    total = Simd::add(total, Simd::add(a, b));
    a = b = Simd::zero();
  }
};

inline float inverse_root(float sum, int64_t columns, float eps) {
  const float mean = sum / static_cast<float>(columns);
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + eps)));
}

template <class T>
void norm_fwd_rows(const NormJob& job, int64_t first, int64_t end) {
  const T* weight = static_cast<const T*>(job.weight);
  const int64_t n = job.columns;
  for (int64_t i = first; i < end; ++i) {
    const T* x = reinterpret_cast<const T*>(job.x.row(i));
    T* y = reinterpret_cast<T*>(job.out) + i * n;
    Squares<T> squares;
    for_each_group(
        n, [&](int64_t j) { squares.add(x + j); }, [&] { squares.flush(); },
        [&](int64_t j, int64_t count) {
          squares.add(Padded<T>(x + j, count).elements);
          squares.flush();
        });
    const Simd::F r = Simd::set1(inverse_root(Simd::reduce_add(squares.total), n, job.eps));
    const auto put = [&](const T* from, const T* by, T* to) {
      Simd::F u, v, p, q;
      Simd::load2(from, u, v);
      Simd::load2(by, p, q);
      u = Simd::rounded(Simd::mul(u, r), T());
      v = Simd::rounded(Simd::mul(v, r), T());
      Simd::template store2<false>(to, Simd::mul(u, p), Simd::mul(v, q));
    };
    for_each_group(
        n, [&](int64_t j) { put(x + j, weight + j, y + j); }, [] {},
        [&](int64_t j, int64_t count) {
          Padded<T> out;
          put(Padded<T>(x + j, count).elements, Padded<T>(weight + j, count).elements,
              out.elements);
          out.copy_to(y + j, count);
        });
  }
}

template <class T>
void norm_bwd_rows(const NormJob& job, int64_t first, int64_t end) {
  const T* weight = static_cast<const T*>(job.weight);
  const int64_t n = job.columns;
  for (int64_t i = first; i < end; ++i) {
    const T* x = reinterpret_cast<const T*>(job.x.row(i));
    const T* g = reinterpret_cast<const T*>(job.grad.row(i));
    T* dx = reinterpret_cast<T*>(job.out) + i * n;
    Squares<T> squares;
    Simd::F a = Simd::zero(), b = Simd::zero(), dots = Simd::zero();
    const auto take = [&](const T* from, const T* by, const T* grad) {
      Simd::F u, v, p, q, s, t;
      squares.add(from);
      Simd::load2(from, u, v);
      Simd::load2(by, p, q);
      Simd::load2(grad, s, t);
      a = Simd::fma(Simd::mul(s, p), u, a);
      b = Simd::fma(Simd::mul(t, q), v, b);
    };
    const auto flush = [&] {
      squares.flush();
      dots = Simd::add(dots, Simd::add(a, b));
      a = b = Simd::zero();
    };
    for_each_group(
        n, [&](int64_t j) { take(x + j, weight + j, g + j); }, flush,
        [&](int64_t j, int64_t count) {
          take(Padded<T>(x + j, count).elements, Padded<T>(weight + j, count).elements,
               Padded<T>(g + j, count).elements);
          flush();
        });
    const float root = inverse_root(Simd::reduce_add(squares.total), n, job.eps);
    const float dot = Simd::reduce_add(dots);
    const Simd::F r = Simd::set1(root);
    const Simd::F c = Simd::set1(-(root * root * root * dot / static_cast<float>(n)));
    const auto put = [&](const T* from, const T* by, const T* grad, T* to) {
      Simd::F u, v, p, q, s, t;
      Simd::load2(from, u, v);
      Simd::load2(by, p, q);
      Simd::load2(grad, s, t);
      s = Simd::mul(Simd::mul(s, p), r);
      t = Simd::mul(Simd::mul(t, q), r);
      Simd::template store2<false>(to, Simd::fma(c, u, s), Simd::fma(c, v, t));
    };
    for_each_group(
        n, [&](int64_t j) { put(x + j, weight + j, g + j, dx + j); }, [] {},
        [&](int64_t j, int64_t count) {
          Padded<T> out;
          put(Padded<T>(x + j, count).elements, Padded<T>(weight + j, count).elements,
              Padded<T>(g + j, count).elements, out.elements);
          out.copy_to(dx + j, count);
        });
  }
}

}  // namespace

const NormTable norm_tables[2] = {{&norm_fwd_rows<float>, &norm_bwd_rows<float>},
                                  {&norm_fwd_rows<BF16>, &norm_bwd_rows<BF16>}};
