// Included inside namespace avx512, hence no include guard.

inline void append_masked(Simd::F x, __mmask16 inside, float* out, int64_t& count) {
  if (inside == 0) return;
  // Compressing in a register, then a whole store: compressing stores are slow on Zen 4.
  _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(inside, x));
  count += __builtin_popcount(inside);
}

// Appends what lies in (low, high] to out; up to kWidth floats behind that are overwritten.
inline void append(Simd::F x, Simd::F low, Simd::F high, float* out, int64_t& count) {
  const __mmask16 above = _mm512_cmp_ps_mask(low, x, _CMP_LT_OQ);
  append_masked(x, _mm512_mask_cmp_ps_mask(above, x, high, _CMP_LE_OQ), out, count);
}

// The same for x >= least.
inline void append_from(Simd::F x, Simd::F least, float* out, int64_t& count) {
  append_masked(x, _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), out, count);
}
