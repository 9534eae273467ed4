// What the products of linear_fwd compute with on a CPU with AVX512_BF16: vdpbf16ps multiplies
// pairs of bfloat16 and adds them to float32. Included inside namespace qadapter::avx512_bf16.

namespace {

struct Product {
  using F = Simd::F;
  using Element = BF16;
  static constexpr int kStep = 2;
  static constexpr int kNv = 2;
  static constexpr int kTile = 256;

  static inline F multiply_add(F acc, F a, F b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a),
                            (__m512bh)_mm512_castps_si512(b));
  }
  static inline F load(const BF16* p) { return _mm512_loadu_ps(p); }
  static inline __m512i widened(const BF16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline void interleave(const BF16* const* rows, int64_t at, float* out) {
    const __m512i low = widened(rows[0] + at), high = widened(rows[1] + at);
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static inline void put(BF16* out, F a, F b) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  static inline Element round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};

}  // namespace
