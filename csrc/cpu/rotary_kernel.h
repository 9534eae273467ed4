// The vector code of rotary; rotary.cpp has the maths and the model. Included once per instruction
// set, inside namespace qadapter::<set>, hence no include guard and no includes.

namespace {

#include "cpu/padded_kernel.h"

// x1, x2, their cos and sin (c1, s1; c2, s2), kGroup elements each, to y1, y2. `one` is 1, which the
// compiler does not know: it would make one operation of a product and a sum, and so leave out the
// rounding between them.
template <class T, bool BACK>
inline void rotate(const T* const in[6], Simd::F one, T* y1, T* y2) {
  Simd::F x[2], z[2], c[2], s[2], d[2], t[2];
  Simd::load2(in[0], x[0], x[1]);
  Simd::load2(in[1], z[0], z[1]);
  Simd::load2(in[2], c[0], c[1]);
  Simd::load2(in[3], s[0], s[1]);
  Simd::load2(in[4], d[0], d[1]);
  Simd::load2(in[5], t[0], t[1]);
  Simd::F first[2], second[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    if (BACK) {
      first[i] = Simd::fma(z[i], t[i], Simd::mul(x[i], c[i]));
      second[i] = Simd::sub(Simd::mul(z[i], d[i]), Simd::mul(x[i], s[i]));
    } else {
      const Simd::F minus = Simd::sub(Simd::zero(), z[i]);
      first[i] = Simd::fma(one, Simd::rounded(Simd::mul(x[i], c[i]), T()),
                           Simd::rounded(Simd::mul(minus, s[i]), T()));
      second[i] = Simd::fma(one, Simd::rounded(Simd::mul(z[i], d[i]), T()),
                            Simd::rounded(Simd::mul(x[i], t[i]), T()));
    }
  }
  Simd::template store2<false>(y1, first[0], first[1]);
  Simd::template store2<false>(y2, second[0], second[1]);
}

template <class T, bool BACK>
void rotary_rows(const RotaryJob& job, int64_t first, int64_t end) {
  const int64_t half = job.half;
  const Simd::F one = Simd::set1(job.one);
  for (int64_t i = first; i < end; ++i) {
    const int64_t h = i % job.heads, t = i / job.heads % job.tokens;
    const int64_t b = i / job.heads / job.tokens;
    const T* x = reinterpret_cast<const T*>(job.x + b * job.x_strides[0] + h * job.x_strides[1] +
                                            t * job.x_strides[2]);
    const T* c =
        reinterpret_cast<const T*>(job.cos + b * job.cos_strides[0] + t * job.cos_strides[1]);
    const T* s =
        reinterpret_cast<const T*>(job.sin + b * job.sin_strides[0] + t * job.sin_strides[1]);
    T* y = reinterpret_cast<T*>(job.out + b * job.out_strides[0] + h * job.out_strides[1] +
                                t * job.out_strides[2]);
    int64_t j = 0;
    for (; j + Simd::kGroup <= half; j += Simd::kGroup) {
      const T* const in[6] = {x + j, x + half + j, c + j, s + j, c + half + j, s + half + j};
      rotate<T, BACK>(in, one, y + j, y + half + j);
    }
    if (j < half) {
      const int64_t n = half - j;
      const Padded<T> x1(x + j, n), x2(x + half + j, n), c1(c + j, n), s1(s + j, n),
          c2(c + half + j, n), s2(s + half + j, n);
      const T* const in[6] = {x1.elements, x2.elements, c1.elements,
                              s1.elements, c2.elements, s2.elements};
      Padded<T> y1, y2;
      rotate<T, BACK>(in, one, y1.elements, y2.elements);
      y1.copy_to(y + j, n);
      y2.copy_to(y + half + j, n);
    }
  }
}

}  // namespace

const RotaryTable rotary_tables[2] = {{&rotary_rows<float, false>, &rotary_rows<float, true>},
                                      {&rotary_rows<BF16, false>, &rotary_rows<BF16, true>}};
