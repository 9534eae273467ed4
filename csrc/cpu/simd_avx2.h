// AVX2 + FMA + F16C vectors of 8 floats. Included between isa_begin_avx2.h and isa_end.h.
//
// Exp2: factor * 2^y. y = n + r with n the nearest integer (by adding 1.5 * 2^23), a quintic on
// [-1/2, 1/2] with relative error 9e-8 and value 1 at r = 0, n added to the exponent bits. y is
// clamped to -126 first; what is smaller gives 0.
//
// Decay: factor * 2^(-scale d) of differences d >= 0 to a maximum. Adding 1.5 * 2^20 rounds
// -scale d to eighths, which leaves 8 n + i in the low bits: i picks 2^(i/8) from a table in one
// register, 8 n + i moves to the exponent (the table has i subtracted there), and a cubic of
// relative error 2.5e-8 is enough for the rest, |r| <= 1/16. Eleven instructions, the scaling and
// the addition to a sum included; the factor is in the cubic. d is clamped to 127 / scale, where
// the bits of the power are those of 0; from 2^-126 down to 2^-127 it is off by up to 6e-39.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace qadapter {
namespace avx2 {

struct Simd {
  using F = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kGroup = 2 * kWidth;  // elements of load2 and store2
  static constexpr bool kStreams = true;

  struct Exp2 {
    F factor;
    explicit Exp2(float f = 1.0f) : factor(_mm256_set1_ps(f)) {}
    inline F value(F y) const {
      const F tiny = _mm256_cmp_ps(y, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
      y = _mm256_max_ps(_mm256_set1_ps(-126.0f), y);  // in this order NaN stays NaN
      const F shifted = _mm256_add_ps(y, _mm256_set1_ps(0x1.8p+23f));
      const F r = _mm256_sub_ps(y, _mm256_sub_ps(shifted, _mm256_set1_ps(0x1.8p+23f)));
      const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
      F p = _mm256_fmadd_ps(r, _mm256_set1_ps(0x1.5bba14p-10f), _mm256_set1_ps(0x1.3cea88p-7f));
      p = _mm256_fmadd_ps(r, p, _mm256_set1_ps(0x1.c6b752p-5f));
      p = _mm256_fmadd_ps(r, p, _mm256_set1_ps(0x1.ebf9bcp-3f));
      p = _mm256_fmadd_ps(r, p, _mm256_set1_ps(0x1.62e42ap-1f));
      p = _mm256_fmadd_ps(r, p, _mm256_set1_ps(1.0f));
      const F e = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
      return _mm256_andnot_ps(tiny, _mm256_mul_ps(factor, e));
    }
  };

  struct Decay {
    static constexpr float kLeastScale = 0x1p-120f;  // that the limit is a finite number
    F minus_scale, limit, c[4];
    __m256i table;
    explicit Decay(float scale, float factor = 1.0f)
        : minus_scale(_mm256_set1_ps(-std::max(scale, kLeastScale))),
          limit(_mm256_set1_ps(127.0f / std::max(scale, kLeastScale))),
          c{_mm256_set1_ps(factor), _mm256_set1_ps(factor * 0x1.62e432p-1f),
            _mm256_set1_ps(factor * 0x1.ec0c32p-3f), _mm256_set1_ps(factor * 0x1.c6a004p-5f)},
          table(_mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3,
                                  0x3f75672a, 0x3f7744fd, 0x3f7ac0c7)) {}
    // factor * 2^(-scale d) = power * poly
    inline void split(F d, F& power, F& poly) const {
      const F magic = _mm256_set1_ps(0x1.8p+20f);
      d = _mm256_min_ps(limit, d);  // in this order NaN stays NaN
      const F shifted = _mm256_fmadd_ps(d, minus_scale, magic);
      const F r = _mm256_fmsub_ps(d, minus_scale, _mm256_sub_ps(shifted, magic));
      const __m256i eighths = _mm256_castps_si256(shifted);
      const __m256i entry = _mm256_permutevar8x32_epi32(table, eighths);
      power = _mm256_castsi256_ps(_mm256_add_epi32(entry, _mm256_slli_epi32(eighths, 20)));
      poly = _mm256_fmadd_ps(r, c[3], c[2]);
      poly = _mm256_fmadd_ps(r, poly, c[1]);
      poly = _mm256_fmadd_ps(r, poly, c[0]);
    }
    inline F add_to(F sum, F d) const {
      F power, poly;
      split(d, power, poly);
      return _mm256_fmadd_ps(power, poly, sum);
    }
    inline F value(F d) const {
      F power, poly;
      split(d, power, poly);
      return _mm256_mul_ps(power, poly);
    }
    // value(d), and the very sum that add_to gives
    inline F value_and_add(F d, F& sum) const {
      F power, poly;
      split(d, power, poly);
      sum = _mm256_fmadd_ps(power, poly, sum);
      return _mm256_mul_ps(power, poly);
    }
  };

  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F set1(float x) { return _mm256_set1_ps(x); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F either(F a, F b) { return _mm256_or_ps(a, b); }
  static inline bool any_sign(F a) { return _mm256_movemask_ps(a) != 0; }
  // b where either is NaN
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  // max(x, acc) that keeps acc where x is NaN
  static inline F max_into(F acc, F x) { return _mm256_max_ps(x, acc); }
  static inline float first(F a) { return _mm256_cvtss_f32(a); }
  static inline float reduce_max(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static inline float reduce_add(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  // -inf becomes +inf, everything else stays
  static inline F flip_neg_inf(F a) {
    const F masked = _mm256_cmp_ps(a, _mm256_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
    return _mm256_xor_ps(a, _mm256_and_ps(masked, _mm256_set1_ps(-0.0f)));
  }

  // load2: kGroup elements in an order that only store2 of the same type knows
  static inline void load2(const float* p, F& a, F& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  static inline void load2(const BF16* p, F& a, F& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));  // even elements, odd elements
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)));
  }
  static inline void load2(const Half* p, F& a, F& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }

  // whether one of n integers, a multiple of kGroup, is more than limit
  static inline bool any_above(const int16_t* p, int n, int16_t limit) {
    __m256i best = _mm256_set1_epi16(limit);
    const __m256i top = best;
#pragma GCC unroll 4
    for (int j = 0; j < n; j += kGroup) {
      best = _mm256_max_epi16(best, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + j)));
    }
    return _mm256_movemask_epi8(_mm256_cmpgt_epi16(best, top)) != 0;
  }

  template <bool STREAM>
  static inline void put(void* p, __m256i x) {
    if (STREAM) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
    }
  }
  template <bool STREAM>
  static inline void store2(float* p, F a, F b) {
    put<STREAM>(p, _mm256_castps_si256(a));
    put<STREAM>(p + 8, _mm256_castps_si256(b));
  }
  // round to nearest even; NaNs do not come here (the drivers fill such rows)
  static inline __m256i round_bf16(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
  // a as its dtype holds it
  static inline F rounded(F a, float) { return a; }
  static inline F rounded(F a, BF16) {
    return _mm256_castsi256_ps(_mm256_and_si256(round_bf16(a), _mm256_set1_epi32(0xffff0000)));
  }
  template <bool STREAM>
  static inline void store2(BF16* p, F a, F b) {
    const __m256i even = _mm256_srli_epi32(round_bf16(a), 16);
    put<STREAM>(p, _mm256_blend_epi16(even, round_bf16(b), 0xaa));
  }
  template <bool STREAM>
  static inline void store2(Half* p, F a, F b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m256i low = _mm256_castsi128_si256(_mm256_cvtps_ph(a, kNearest));
    put<STREAM>(p, _mm256_inserti128_si256(low, _mm256_cvtps_ph(b, kNearest), 1));
  }
  static inline void fence() { _mm_sfence(); }

  // kWidth elements in order
  static inline F load1(const float* p) { return _mm256_loadu_ps(p); }
  static inline F load1(const BF16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static inline F load1(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline void store1(float* p, F a) { _mm256_storeu_ps(p, a); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static inline F with_sign_of(F a, F sign) {  // a >= 0
    return _mm256_or_ps(a, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  // yes where a < b, no elsewhere and where either is NaN
  static inline F pick_less(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  // kWidth vectors as the rows of a matrix, turned into its columns
  static inline void transpose(F r[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
      t[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace avx2
}  // namespace qadapter
