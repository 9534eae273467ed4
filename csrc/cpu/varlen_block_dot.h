// A block of attention's products by vdpbf16ps. Included after dot_tiles.h, inside namespace
// qadapter::avx512_bf16.
//
// 8 rows by two vectors of sums stay in registers: for every pair of elements 16 instructions by 2
// loads of the right and 8 broadcasts of the left, which Zen 4 has the ports for beside them.

namespace {

struct Tiles {  // nothing to set up, as AMX's have
  Tiles() {}
};

// 8 rows of c, which lie `c_stride` floats apart.
inline void rows_of_block(int64_t steps, const char* left, int64_t stride, int64_t next,
                          const BF16* right0, const BF16* right1, int64_t right_next, float* c,
                          int64_t c_stride, bool add) {
  constexpr int kRows = 8;
  __m512 sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = add ? _mm512_loadu_ps(c + r * c_stride) : Simd::zero();
    sums[r][1] = add ? _mm512_loadu_ps(c + r * c_stride + kSide) : Simd::zero();
  }
  for (int64_t i = 0; i < steps; ++i, left += next, right0 += right_next, right1 += right_next) {
    for (int p = 0; p < kSide; ++p) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(right0 + p * kDeep);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(right1 + p * kDeep);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, left + r * stride + p * sizeof(pair), sizeof(pair));
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, b0);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], a, b1);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(c + r * c_stride, sums[r][0]);
    _mm512_storeu_ps(c + r * c_stride + kSide, sums[r][1]);
  }
}

// c, 32 rows of `c_stride` floats, = or += two tiles of the left by two of the right, `steps` deep.
// Strides and steps of the left are bytes, those of the right elements.
inline void block(int64_t steps, const void* upper, const void* lower, int64_t stride, int64_t next,
                  const BF16* right0, const BF16* right1, int64_t right_next, float* c,
                  int64_t c_stride, bool add) {
  for (int part = 0; part < 4; ++part) {
    const char* rows = static_cast<const char*>(part < 2 ? upper : lower) + part % 2 * 8 * stride;
    rows_of_block(steps, rows, stride, next, right0, right1, right_next, c + part * 8 * c_stride,
                  c_stride, add);
  }
}

}  // namespace
