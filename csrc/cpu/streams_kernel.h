// How vector code reads the two streams; for the <kernel>_kernel.h of several kernels, inside their
// unnamed namespace, hence no include guard and no includes.

constexpr int kBlock = 512;  // columns summed against one maximum
constexpr int kFlush = 32;   // blocks added up in float, lane by lane, before that goes to double

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

// Calls block(q, base, n) for runs of columns, n a multiple of kGroup and at most kBlock; and flush()
// after every kFlush of them, for what lanes added up in float, and at the end.
template <class T, class Block, class Flush>
inline void for_each_block(const T* q, const T* base, int64_t length, bool read_base,
                           const Block& block, const Flush& flush) {
  int64_t j = 0;
  while (j + kBlock <= length) {
    for (int k = 0; k < kFlush && j + kBlock <= length; ++k, j += kBlock) {
      block(q + j, base + j, kBlock);
    }
    flush();
  }
  const int whole = static_cast<int>((length - j) / Simd::kGroup * Simd::kGroup);
  if (whole > 0) block(q + j, base + j, whole);
  j += whole;
  const int rest = static_cast<int>(length - j);
  if (rest > 0) {
    const Few<T> few(q + j, base + j, rest, read_base);
    block(few.q, few.base, Simd::kGroup);
  }
  flush();
}
