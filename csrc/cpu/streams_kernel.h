// How vector code reads the two streams; for the <kernel>_kernel.h of several kernels, inside their
// unnamed namespace, hence no include guard and no includes.

// kGroup of x = z_q + m z_b. b: the base's, already loaded, which m == 0 does not look at.
template <class T, Mix MIX>
inline void load_x(const T* q, Simd::F m, const Simd::F b[2], Simd::F x[2]) {
  Simd::load2(q, x[0], x[1]);
  if (MIX == Mix::none) return;
  for (int k = 0; k < 2; ++k) {
    const Simd::F other = MIX == Mix::negative ? Simd::flip_neg_inf(b[k]) : b[k];
    x[k] = Simd::fma(m, other, x[k]);
  }
}

// Fewer columns than kGroup, filled up with -inf, which adds nothing to a sum.
template <class T>
struct Few {
  T q[Simd::kGroup], base[Simd::kGroup];

  Few(const T* q_from, const T* base_from, int count, bool read_base) {
    for (int k = 0; k < Simd::kGroup; ++k) q[k] = base[k] = Storage<T>::neg_inf();
    std::memcpy(q, q_from, count * sizeof(T));
    if (read_base) std::memcpy(base, base_from, count * sizeof(T));
  }
};
