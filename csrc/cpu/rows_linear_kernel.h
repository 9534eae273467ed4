// The vector code of rows_linear. Included inside a namespace that has Simd,
// behind rows_linear_sums.h, once per instruction set.
//
// Every output is one vector of partial sums over k, added up at the end in one order. What a row
// gives therefore depends neither on the tile it is in nor on the other rows.

namespace {

using F = Simd::F;

// kStep elements of one row, as vectors that multiply() takes; kSteps of these make a strip. Mixed
// dtypes keep their elements in order; equal ones come in load2's order, which is the same for both
// and cheaper.
template <class X, class W>
struct Dot {
  static constexpr int kStep = Simd::kGroup, kSteps = 1;
  struct V {
    F a, b;
  };
  template <class T>
  static inline V load(const T* p) {
    return {Simd::load1(p), Simd::load1(p + Simd::kWidth)};
  }
  static inline F multiply(F acc, V x, V w) {
    return Simd::fma(x.b, w.b, Simd::fma(x.a, w.a, acc));
  }
};

template <class T>
struct Dot<T, T> {
  static constexpr int kStep = Simd::kGroup, kSteps = 1;
  struct V {
    F a, b;
  };
  static inline V load(const T* p) {
    V v;
    Simd::load2(p, v.a, v.b);
    return v;
  }
  static inline F multiply(F acc, V x, V w) {
    return Simd::fma(x.b, w.b, Simd::fma(x.a, w.a, acc));
  }
};

// A vector a step, that sums of three rows of x fit into 16 registers beside what they are made of.
template <>
struct Dot<float, float> {
  static constexpr int kStep = Simd::kWidth, kSteps = 4;
  using V = F;
  static inline V load(const float* p) { return Simd::load1(p); }
  static inline F multiply(F acc, V x, V w) { return Simd::fma(x, w, acc); }
};

#ifdef QADAPTER_ROWS_BF16_DOT
template <>
struct Dot<BF16, BF16> {
  static constexpr int kStep = 32, kSteps = 1;
  using V = __m512bh;
  static inline V load(const BF16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline F multiply(F acc, V x, V w) { return _mm512_dpbf16_ps(acc, x, w); }
};
#endif

template <class D, class T>
inline typename D::V load_padded(const T* p, int64_t n) {
  T elements[D::kStep] = {};
  std::memcpy(elements, p, n * sizeof(T));
  return D::load(elements);
}

constexpr int kRowsW = 4;  // rows of W in a tile
constexpr int kMostNear = 3;               // rows of x
constexpr int64_t kFirstCache = 32 << 10;  // bytes, of AMD's cores

// What a tile fetches on its way for a later one: `step` bytes in each of its strips, for the tile
// after the next, to the second cache: beside the rows of x the first one has no room, and too few
// misses under way at a time. On AMD's cores up to kMostNear rows of bfloat16 are so quick that
// they catch up with that. There the next tile is fetched instead (NEAR), if the first cache has
// room for two and the rows of x: into that, a line behind each load, in the order of addresses;
// in the order of the loads it is as slow as none.
struct Ahead {
  const char* at;
  int64_t step;
};

// sums[c][r] = x[c] . w[r].
template <class X, class W, int C, bool NEAR>
inline void tile(const X* const* x, const W* const* w, int64_t k, Ahead ahead,
                 float (*sums)[kRowsW]) {
  using D = Dot<X, W>;
  F acc[C][kRowsW];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < kRowsW; ++r) acc[c][r] = Simd::zero();
  }
  constexpr int kLines = kRowsW * D::kStep * static_cast<int>(sizeof(W)) / 64;
  const auto step = [&](int64_t i) {
    typename D::V xs[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) xs[c] = D::load(x[c] + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsW; ++r) {
      const typename D::V ws = D::load(w[r] + i);
      if (NEAR && r < kLines) __builtin_prefetch(ahead.at + 64 * r);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[c][r] = D::multiply(acc[c][r], xs[c], ws);
    }
    if (NEAR) ahead.at += 64 * kLines;
  };
  constexpr int64_t kStrip = D::kSteps * D::kStep;
  const int64_t whole = k / D::kStep * D::kStep;
  int64_t i = 0;
  for (; i + kStrip <= k; i += kStrip) {
#pragma GCC unroll 4
    for (int n = 0; n < D::kSteps; ++n) step(i + n * D::kStep);
    if (NEAR) continue;
    // behind the loads, which would wait for it otherwise: bfloat16 of 2 rows was a third slower
    for (int64_t line = 0; line < ahead.step; line += 64) __builtin_prefetch(ahead.at + line, 0, 2);
    ahead.at += ahead.step;
  }
  for (; i < whole; i += D::kStep) step(i);
  if (whole < k) {
    typename D::V xs[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) xs[c] = load_padded<D>(x[c] + whole, k - whole);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsW; ++r) {
      const typename D::V ws = load_padded<D>(w[r] + whole, k - whole);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[c][r] = D::multiply(acc[c][r], xs[c], ws);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) add_up(acc[c], sums[c]);
}

// `count` <= kMost rows of x: of 8 lanes, three of floats, two of what has to be widened first.
template <class X, class W>
struct Tiles {
  static constexpr int kOf8 = sizeof(X) == 4 && sizeof(W) == 4 ? 3 : 2;
  static constexpr int kMost = Simd::kWidth == 16 ? 4 : (Simd::kWidth == 8 ? kOf8 : 1);

  template <bool NEAR = false>
  static inline void run(int64_t count, const X* const* x, const W* const* w, int64_t k,
                         Ahead ahead, float (*sums)[kRowsW]) {
    if constexpr (kMost >= 4 && !NEAR) {
      if (count == 4) return tile<X, W, 4, NEAR>(x, w, k, ahead, sums);
    }
    if constexpr (kMost >= 3) {
      if (count == 3) return tile<X, W, 3, NEAR>(x, w, k, ahead, sums);
    }
    if constexpr (kMost >= 2) {
      if (count == 2) return tile<X, W, 2, NEAR>(x, w, k, ahead, sums);
    }
    tile<X, W, 1, NEAR>(x, w, k, ahead, sums);
  }
};

template <class T>
void rows_columns(const RowsJob& job, int64_t first, int64_t end) {
  using All = Tiles<T, T>;
  const T* w_data = reinterpret_cast<const T*>(job.w);
  const T* bias = static_cast<const T*>(job.bias);
  // A later tile's rows of W are fetched in equal parts by the tiles of all rows of x.
  const int64_t strips = job.k / (Dot<T, T>::kSteps * Dot<T, T>::kStep);
  const int64_t groups = (job.x.count + All::kMost - 1) / All::kMost, turns = groups * strips;
  const int64_t bytes = kRowsW * job.w_stride * static_cast<int64_t>(sizeof(T));
  const int64_t fetched = turns > 0 ? (bytes + turns - 1) / turns : 0;
  const int64_t row_bytes = job.k * static_cast<int64_t>(sizeof(T));
  const bool near = is_amd() && sizeof(T) == 2 && groups == 1 && job.x.count <= kMostNear &&
                    job.w_stride == job.k && (2 * kRowsW + job.x.count) * row_bytes <= kFirstCache;
  const int64_t tiles_ahead = near ? 1 : 2;
  for (int64_t o = first; o < end; o += kRowsW) {
    const int count = static_cast<int>(end - o < kRowsW ? end - o : kRowsW);
    const T* w[kRowsW];
    float offset[kRowsW] = {};
    for (int r = 0; r < kRowsW; ++r) {
      const int64_t row = o + (r < count ? r : count - 1);
      w[r] = w_data + row * job.w_stride;
      if (bias) offset[r] = widen(bias[row]);
    }
    // Also behind `end`: that is what this thread takes next.
    const bool more = o + (tiles_ahead + 1) * kRowsW <= job.o;
    Ahead ahead{reinterpret_cast<const char*>(w[0]) + (more ? tiles_ahead * bytes : 0),
                more ? fetched : 0};
    for (int64_t group = 0, i = 0; group < groups; ++group, ahead.at += strips * ahead.step) {
      // As equal as possible: the sums of one row alone are too few to be under way at a time.
      const int64_t even = (job.x.count - i + groups - group - 1) / (groups - group);
      const int64_t rows = std::min<int64_t>(All::kMost, even);
      const T* x[All::kMost] = {};
      float sums[All::kMost][kRowsW];
      for (int64_t c = 0; c < rows; ++c) x[c] = reinterpret_cast<const T*>(job.x.row(i + c));
      if (near) {
        All::template run<true>(rows, x, w, job.k, ahead, sums);
      } else {
        All::run(rows, x, w, job.k, ahead, sums);
      }
      for (int64_t c = 0; c < rows; ++c) {
        T* out = reinterpret_cast<T*>(job.out.row(i + c)) + o;
        if (bias) {
          for (int r = 0; r < kRowsW; ++r) sums[c][r] += offset[r];
        }
        if (count == kRowsW) {
          put4(sums[c], out);
        } else {
          for (int r = 0; r < count; ++r) narrow(sums[c][r], out + r);
        }
      }
      i += rows;
    }
  }
}

}  // namespace
