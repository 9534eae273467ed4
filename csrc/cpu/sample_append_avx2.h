// Included inside namespace avx2, hence no include guard.

// For every set of lanes, these lanes in order, a byte each: what vpermps compresses by.
struct LaneOrders {
  uint64_t of[256] = {};

  constexpr LaneOrders() {
    for (int set = 0; set < 256; ++set) {
      for (int lane = 0, at = 0; lane < 8; ++lane) {
        if ((set >> lane & 1) != 0) of[set] |= uint64_t(lane) << 8 * at++;
      }
    }
  }
};
constexpr LaneOrders kLaneOrders;

inline void append_masked(Simd::F x, Simd::F inside, float* out, int64_t& count) {
  const int set = _mm256_movemask_ps(inside);
  if (set == 0) return;
  const __m128i* order = reinterpret_cast<const __m128i*>(&kLaneOrders.of[set]);
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(order));
  _mm256_storeu_ps(out + count, _mm256_permutevar8x32_ps(x, lanes));
  count += __builtin_popcount(set);
}

// Appends what lies in (low, high] to out; up to kWidth floats behind that are overwritten.
inline void append(Simd::F x, Simd::F low, Simd::F high, float* out, int64_t& count) {
  const Simd::F above = _mm256_cmp_ps(low, x, _CMP_LT_OQ);
  append_masked(x, _mm256_and_ps(above, _mm256_cmp_ps(x, high, _CMP_LE_OQ)), out, count);
}

// The same for x >= least.
inline void append_from(Simd::F x, Simd::F least, float* out, int64_t& count) {
  append_masked(x, _mm256_cmp_ps(x, least, _CMP_GE_OQ), out, count);
}
