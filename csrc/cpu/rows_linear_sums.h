// The end of a tile: vectors of partial sums to floats, floats to T, one (narrow), four (put4) or
// a vector of them (put_all). Included inside a namespace
// that has Simd, with QADAPTER_ROWS_BITS the width of its vectors (0: the compiler's own).

namespace {

inline float widen(float x) { return x; }
inline float widen(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BF16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}

#if QADAPTER_ROWS_BITS == 0
inline void add_up(const Simd::F acc[4], float out[4]) {
  for (int i = 0; i < 4; ++i) out[i] = Simd::reduce_add(acc[i]);
}
template <class T>
inline void put4(const float sums[4], T* out) {
  for (int i = 0; i < 4; ++i) narrow(sums[i], out + i);
}
inline void put_all(Simd::F x, BF16* out) { put4(reinterpret_cast<const float*>(&x), out); }
#else
#if QADAPTER_ROWS_BITS == 256
inline void put_all(Simd::F x, BF16* out) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i rounded = Simd::round_bf16(x);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i low = _mm256_castsi256_si128(high), rest = _mm256_extracti128_si256(high, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(low, rest));
}
#elif defined(QADAPTER_ROWS_BF16_DOT)
inline void put_all(Simd::F x, BF16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}
#else
inline void put_all(Simd::F x, BF16* out) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet_bit = _mm512_set1_epi32(0x400000);
  const __m512i rounded = _mm512_mask_or_epi32(Simd::round_bf16(x), nan, bits, quiet_bit);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif
inline __m256 fold(__m256 x) { return x; }
#if QADAPTER_ROWS_BITS == 512
inline __m256 fold(__m512 x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
#endif
inline __m256 interleave(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}
inline void add_up(const Simd::F acc[4], float out[4]) {
  const __m256d ab = _mm256_castps_pd(interleave(fold(acc[0]), fold(acc[1])));
  const __m256d cd = _mm256_castps_pd(interleave(fold(acc[2]), fold(acc[3])));
  const __m256 all = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline void put4(const float sums[4], float* out) { std::memcpy(out, sums, 16); }
#ifdef QADAPTER_ROWS_BF16_DOT
inline void put4(const float sums[4], BF16* out) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(sums)));
}
#else
inline void put4(const float sums[4], BF16* out) {
  const __m128 x = _mm_loadu_ps(sums);
  const __m128i bits = _mm_castps_si128(x);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
  const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x400000));
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(x, x));
  const __m128i high = _mm_srli_epi32(_mm_blendv_epi8(rounded, quiet, nan), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(high, high));
}
#endif
#endif

inline void put_all(Simd::F x, float* out) { Simd::store1(out, x); }

}  // namespace
