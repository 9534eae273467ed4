// AVX-512 vectors of 16 floats. Included between isa_begin_avx512.h and isa_end.h.
//
// exp2: with i = floor(32 y), 2^y = 2^floor(y) * 2^((i mod 32)/32) * 2^r, r in [0, 1/32). An add
// that rounds down puts i into the low mantissa bits, where vpermt2ps takes its table index from;
// vreduceps gives r, and 0 for y = -inf, so that no NaN arises there; vscalefps multiplies by
// 2^floor(y), with gradual underflow to 0. 2^r is a quadratic of relative error 6.5e-8, with value 1
// at r = 0. A quintic without a table takes two instructions more, and sums come out no better.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace qadapter {
namespace avx512 {

alignas(64) static const float kExp2Table[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f,
    0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f,
    0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f,
    0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
    0x1.ea4afap+0f, 0x1.f50766p+0f};

struct Simd {
  using F = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kGroup = 2 * kWidth;  // elements of load2 and store2
  static constexpr bool kStreams = true;

  struct Exp2 {
    F low, high;  // 2^(i/32), times a factor
    explicit Exp2(float factor = 1.0f) {
      low = _mm512_mul_ps(_mm512_load_ps(kExp2Table), _mm512_set1_ps(factor));
      high = _mm512_mul_ps(_mm512_load_ps(kExp2Table + 16), _mm512_set1_ps(factor));
    }
    // factor * 2^y = scale * poly
    inline void split(F y, F& scale, F& poly) const {
      const F shifted = _mm512_add_round_ps(y, _mm512_set1_ps(0x1.8p+18f),
                                            _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      const F r = _mm512_reduce_ps(y, (5 << 4) | _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      const F entry = _mm512_permutex2var_ps(low, _mm512_castps_si512(shifted), high);
      scale = _mm512_scalef_ps(entry, y);
      poly = _mm512_fmadd_ps(r, _mm512_set1_ps(0x1.f0f3e6p-3f), _mm512_set1_ps(0x1.62e11ep-1f));
      poly = _mm512_fmadd_ps(r, poly, _mm512_set1_ps(1.0f));
    }
    inline F value(F y) const {
      F scale, poly;
      split(y, scale, poly);
      return _mm512_mul_ps(scale, poly);
    }
  };

  // factor * 2^(-scale d), of differences d >= 0 to a maximum
  struct Decay {
    Exp2 exp2;
    F minus_scale;
    explicit Decay(float scale, float factor = 1.0f)
        : exp2(factor), minus_scale(_mm512_set1_ps(-scale)) {}
    inline void split(F d, F& scale, F& poly) const {
      exp2.split(_mm512_mul_ps(d, minus_scale), scale, poly);
    }
    inline F add_to(F sum, F d) const {
      F scale, poly;
      split(d, scale, poly);
      return _mm512_fmadd_ps(scale, poly, sum);
    }
    inline F value(F d) const {
      F scale, poly;
      split(d, scale, poly);
      return _mm512_mul_ps(scale, poly);
    }
    // value(d), and the very sum that add_to gives
    inline F value_and_add(F d, F& sum) const {
      F scale, poly;
      split(d, scale, poly);
      sum = _mm512_fmadd_ps(scale, poly, sum);
      return _mm512_mul_ps(scale, poly);
    }
  };

  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F set1(float x) { return _mm512_set1_ps(x); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F either(F a, F b) { return _mm512_or_ps(a, b); }
  static inline bool any_sign(F a) { return _mm512_movepi32_mask(_mm512_castps_si512(a)) != 0; }
  // b where either is NaN
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  // max(x, acc) that keeps acc where x is NaN
  static inline F max_into(F acc, F x) { return _mm512_max_ps(x, acc); }
  static inline float first(F a) { return _mm512_cvtss_f32(a); }
  static inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  // -inf becomes +inf, everything else stays
  static inline F flip_neg_inf(F a) {
    return _mm512_fixupimm_ps(a, a, _mm512_set1_epi32(5 << 16), 0);
  }

  // load2: kGroup elements in an order that only store2 of the same type knows
  static inline void load2(const float* p, F& a, F& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  static inline void load2(const BF16* p, F& a, F& b) {
    const __m512i both = _mm512_loadu_si512(p);  // even elements, odd elements
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
  }
  static inline void load2(const Half* p, F& a, F& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }

  // whether one of n integers, a multiple of kGroup, is more than limit
  static inline bool any_above(const int16_t* p, int n, int16_t limit) {
    __m512i best = _mm512_set1_epi16(limit);
    const __m512i top = best;
#pragma GCC unroll 4
    for (int j = 0; j < n; j += kGroup) {
      best = _mm512_max_epi16(best, _mm512_loadu_si512(p + j));
    }
    return _mm512_cmpgt_epi16_mask(best, top) != 0;
  }

  template <bool STREAM>
  static inline void put(void* p, __m512i x) {
    if (STREAM) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
    } else {
      _mm512_storeu_si512(p, x);
    }
  }
  template <bool STREAM>
  static inline void store2(float* p, F a, F b) {
    put<STREAM>(p, _mm512_castps_si512(a));
    put<STREAM>(p + 16, _mm512_castps_si512(b));
  }
  // round to nearest even; NaNs do not come here (the drivers fill such rows)
  static inline __m512i round_bf16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
  // a as its dtype holds it
  static inline F rounded(F a, float) { return a; }
  static inline F rounded(F a, BF16) {
    return _mm512_castsi512_ps(_mm512_and_si512(round_bf16(a), _mm512_set1_epi32(0xffff0000)));
  }
  template <bool STREAM>
  static inline void store2(BF16* p, F a, F b) {
    const __m512i even = _mm512_srli_epi32(round_bf16(a), 16);
    const __m512i odd = _mm512_and_si512(round_bf16(b), _mm512_set1_epi32(0xffff0000));
    put<STREAM>(p, _mm512_or_si512(even, odd));
  }
  template <bool STREAM>
  static inline void store2(Half* p, F a, F b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a, kNearest));
    put<STREAM>(p, _mm512_inserti64x4(low, _mm512_cvtps_ph(b, kNearest), 1));
  }
  static inline void fence() { _mm_sfence(); }

  // kWidth elements in order
  static inline F load1(const float* p) { return _mm512_loadu_ps(p); }
  static inline F load1(const BF16* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static inline F load1(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline void store1(float* p, F a) { _mm512_storeu_ps(p, a); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F abs(F a) { return _mm512_abs_ps(a); }
  static inline F with_sign_of(F a, F sign) {  // a >= 0
    return _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  // yes where a < b, no elsewhere and where either is NaN
  static inline F pick_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  // kWidth vectors as the rows of a matrix, turned into its columns
  static inline void transpose(F r[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {  // pairs within 128-bit lanes
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // r[i + c]: column 4 * lane + c of rows i .. i + 3
      r[i] = unpack_pairs<0>(t[i], t[i + 2]);
      r[i + 1] = unpack_pairs<1>(t[i], t[i + 2]);
      r[i + 2] = unpack_pairs<0>(t[i + 1], t[i + 3]);
      r[i + 3] = unpack_pairs<1>(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {  // gather the lanes of rows 0-3, 4-7, 8-11, 12-15
      const F a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
      const F b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
      const F d = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
      const F e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
      t[c] = _mm512_shuffle_f32x4(a, b, 0x88);
      t[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
      t[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
      t[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
  template <int HIGH>
  static inline F unpack_pairs(F a, F b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(HIGH ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  }
};

}  // namespace avx512
}  // namespace qadapter
