// Included inside a namespace that has a Simd, hence no include guard.

// Appends the lanes of x that have their sign set in `inside`.
inline void append_signed(Simd::F x, Simd::F inside, float* out, int64_t& count) {
  if (!Simd::any_sign(inside)) return;
  float values[Simd::kWidth], signs[Simd::kWidth];
  Simd::store1(values, x);
  Simd::store1(signs, inside);
  for (int k = 0; k < Simd::kWidth; ++k) {  // without a branch
    out[count] = values[k];
    count += std::signbit(signs[k]) ? 1 : 0;
  }
}

// Appends what lies in (low, high] to out; up to kWidth floats behind that are overwritten.
inline void append(Simd::F x, Simd::F low, Simd::F high, float* out, int64_t& count) {
  const Simd::F yes = Simd::set1(-0.0f), no = Simd::zero();
  append_signed(x, Simd::pick_less(low, x, Simd::pick_less(high, x, no, yes), no), out, count);
}

// The same for x >= least.
inline void append_from(Simd::F x, Simd::F least, float* out, int64_t& count) {
  const Simd::F yes = Simd::set1(-0.0f), no = Simd::zero();
  append_signed(x, Simd::pick_less(x, least, no, yes), out, count);
}
