// Vectors of 4 floats in the compilers' own notation (GCC, Clang): SSE2, NEON or whatever the
// platform guarantees. The fallback where nothing better is known; the formulas are those of AVX2.
#pragma once

#include "cpu/types.h"

namespace qadapter {
namespace plain {

struct Simd {
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kGroup = 2 * kWidth;  // elements of load2 and store2
  static constexpr bool kStreams = false;

  static inline F set1(float x) { return F{x, x, x, x}; }
  static inline U set1u(uint32_t x) { return U{x, x, x, x}; }
  static inline F zero() { return set1(0.0f); }
  static inline U bits(F a) { return (U)a; }
  static inline F pick(I mask, F yes, F no) { return (F)(((U)mask & (U)yes) | (~(U)mask & (U)no)); }

  struct Exp2 {
    F factor;
    explicit Exp2(float f = 1.0f) : factor(set1(f)) {}
    // 2^r on [-1/2, 1/2]
    static inline F poly(F r) {
      F p = r * set1(0x1.5bba14p-10f) + set1(0x1.3cea88p-7f);
      p = r * p + set1(0x1.c6b752p-5f);
      p = r * p + set1(0x1.ebf9bcp-3f);
      p = r * p + set1(0x1.62e42ap-1f);
      return r * p + set1(1.0f);
    }
    inline F value(F y) const {
      const I tiny = y < set1(-126.0f);
      y = pick(tiny, set1(-126.0f), y);  // NaN stays NaN
      const F shifted = y + set1(0x1.8p+23f);
      const F p = poly(y - (shifted - set1(0x1.8p+23f)));
      return pick(tiny, set1(0.0f), factor * (F)(bits(p) + (bits(shifted) << 23)));
    }
  };

  // As AVX2's, but for the table: no shuffle by lanes of 32 bits is common to all platforms. Without
  // it the power's bits must stay above those of 2^-127, below which they would become a NaN's: sums
  // get 1e-38 from what is smaller (nothing, where the largest term is 1); value() gives exactly 0.
  struct Decay {
    static constexpr float kLeastScale = 0x1p-120f;  // that the limit is a finite number
    F minus_scale, limit, factor;
    explicit Decay(float scale, float f = 1.0f)
        : minus_scale(set1(-std::max(scale, kLeastScale))),
          limit(set1(126.0f / std::max(scale, kLeastScale))),
          factor(set1(f)) {}
    inline F power(F d) const {  // without the factor
      d = pick(d > limit, limit, d);  // NaN stays NaN
      const F shifted = d * minus_scale + set1(0x1.8p+23f);
      const F r = d * minus_scale + (set1(0x1.8p+23f) - shifted);
      return (F)(bits(Exp2::poly(r)) + (bits(shifted) << 23));
    }
    inline F add_to(F sum, F d) const { return sum + power(d); }
    inline F value(F d) const { return pick(d > limit, zero(), factor * power(d)); }
    // value(d), and the very sum that add_to gives
    inline F value_and_add(F d, F& sum) const {
      const F e = power(d);
      sum = sum + e;
      return pick(d > limit, zero(), factor * e);
    }
  };

  static inline F sub(F a, F b) { return a - b; }
  static inline F add(F a, F b) { return a + b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline F either(F a, F b) { return (F)(bits(a) | bits(b)); }
  static inline bool any_sign(F a) {
    const U s = bits(a);
    return ((s[0] | s[1] | s[2] | s[3]) >> 31) != 0;
  }
  // b where either is NaN
  static inline F max(F a, F b) { return pick(a > b, a, b); }
  static inline F max_into(F acc, F x) { return pick(x > acc, x, acc); }
  static inline float first(F a) { return a[0]; }
  static inline float reduce_max(F a) {
    float best = a[0];
    for (int i = 1; i < 4; ++i) best = a[i] > best ? a[i] : best;
    return best;
  }
  static inline float reduce_add(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static inline F flip_neg_inf(F a) {
    const float inf = __builtin_inff();
    return pick(a == set1(-inf), set1(inf), a);
  }

  static inline void load2(const float* p, F& a, F& b) {
    std::memcpy(&a, p, 16);
    std::memcpy(&b, p + 4, 16);
  }
  static inline void load2(const BF16* p, F& a, F& b) {
    U both;
    std::memcpy(&both, p, 16);  // low halves, high halves
    a = (F)(both << 16);
    b = (F)(both & set1u(0xffff0000u));
  }
  static inline F from_half(U h) {  // h < 2^16; exact, subnormals included
    const U magnitude = (h & set1u(0x7fff)) << 13;
    const F scaled = (F)magnitude * set1(0x1p+112f);
    const I special = (I)magnitude > (I)set1u(0x0f7fffff);
    const U extra = (U)special & set1u(0x7f800000u);
    return (F)(bits(scaled) | extra | ((h & set1u(0x8000)) << 16));
  }
  static inline void load2(const Half* p, F& a, F& b) {
    U both;
    std::memcpy(&both, p, 16);
    a = from_half(both & set1u(0xffff));
    b = from_half(both >> 16);
  }

  // whether one of n integers, a multiple of kGroup, is more than limit
  static inline bool any_above(const int16_t* p, int n, int16_t limit) {
    typedef int16_t S __attribute__((vector_size(16)));
    const S top = {limit, limit, limit, limit, limit, limit, limit, limit};
    S above = {};
#pragma GCC unroll 4
    for (int j = 0; j < n; j += kGroup) {
      S x;
      std::memcpy(&x, p + j, 16);
      above |= x > top;
    }
    typedef uint64_t Two __attribute__((vector_size(16)));
    return (((Two)above)[0] | ((Two)above)[1]) != 0;
  }

  template <bool STREAM>
  static inline void store2(float* p, F a, F b) {
    std::memcpy(p, &a, 16);
    std::memcpy(p + 4, &b, 16);
  }
  // round to nearest even; NaNs do not come here (the drivers fill such rows)
  static inline U round_bf16(F x) { return bits(x) + set1u(0x7fff) + ((bits(x) >> 16) & set1u(1)); }
  // a as its dtype holds it
  static inline F rounded(F a, float) { return a; }
  static inline F rounded(F a, BF16) {
    return (F)(round_bf16(a) & set1u(0xffff0000u));
  }
  template <bool STREAM>
  static inline void store2(BF16* p, F a, F b) {
    const U out = (round_bf16(a) >> 16) | (round_bf16(b) & set1u(0xffff0000u));
    std::memcpy(p, &out, 16);
  }
  static inline U to_half(F x) {
    const U sign = (bits(x) >> 16) & set1u(0x8000);
    const U magnitude = bits(x) & set1u(0x7fffffff);
    // subnormal halves: adding 1/2 rounds at 2^-24, and leaves the result in the low bits
    const U small = bits((F)magnitude + set1(0.5f)) - set1u(0x3f000000);
    const U odd = (magnitude >> 13) & set1u(1);
    const U normal = (magnitude + set1u(0xfff) + odd - set1u(112u << 23)) >> 13;
    const I is_small = (I)magnitude < (I)set1u(113u << 23);
    const I overflows = (I)magnitude > (I)set1u(0x477fefff);
    U out = ((U)is_small & small) | (~(U)is_small & normal);
    out = ((U)overflows & set1u(0x7c00)) | (~(U)overflows & out);
    return out | sign;
  }
  template <bool STREAM>
  static inline void store2(Half* p, F a, F b) {
    const U out = to_half(a) | (to_half(b) << 16);
    std::memcpy(p, &out, 16);
  }
  static inline void fence() {}

  // kWidth elements in order
  static inline F load1(const float* p) {
    F a;
    std::memcpy(&a, p, 16);
    return a;
  }
  static inline U widened(const void* p) {  // 4 integers of 16 bits
    typedef uint16_t Four __attribute__((vector_size(8)));
    Four four;
    std::memcpy(&four, p, 8);
    return __builtin_convertvector(four, U);
  }
  static inline F load1(const BF16* p) { return (F)(widened(p) << 16); }
  static inline F load1(const Half* p) { return from_half(widened(p)); }
  static inline void store1(float* p, F a) { std::memcpy(p, &a, 16); }
  static inline F div(F a, F b) { return a / b; }
  static inline F abs(F a) { return (F)(bits(a) & set1u(0x7fffffffu)); }
  static inline F with_sign_of(F a, F sign) {  // a >= 0
    return (F)(bits(a) | (bits(sign) & set1u(0x80000000u)));
  }
  // yes where a < b, no elsewhere and where either is NaN
  static inline F pick_less(F a, F b, F yes, F no) { return pick(a < b, yes, no); }
  // kWidth vectors as the rows of a matrix, turned into its columns
  static inline void transpose(F r[4]) {
    const F a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = F{a[i], b[i], c[i], d[i]};
  }
};

}  // namespace plain
}  // namespace qadapter
