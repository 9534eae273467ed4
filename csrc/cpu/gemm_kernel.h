// Register-blocked products on packed operands, in terms of Simd and Product. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.
//
// Operands are arrays of dwords, typed float: one float32, or a pair of bfloat16 that follow each
// other along the summed dimension. The right side comes in panels of kNr columns, [k][kNr]. One
// step of a block of MR rows and kNr columns is MR broadcasts, kNv loads and MR * kNv
// multiply-adds: 14 x 2 vectors take 28 of AVX-512's 32 registers, and 28 cycles of the one
// multiply-add a cycle that Zen 4 does, against 9 for the loads. The right panel streams from the
// second-level cache at 128 bytes in that time. How an element is summed depends on k alone, not on
// the block it is in.

namespace {

constexpr int kNr = Product::kNv * Simd::kWidth;
constexpr int kTile = Product::kTile;
constexpr int kStep = Product::kStep;
constexpr int kChain = 256;
constexpr int kTileStride = kTile + 16;  // not a power of two: rows then differ in their cache set

static_assert(kTile % kNr == 0 && kTile % Simd::kGroup == 0, "tiles hold whole panels");

// How the left side lies: [k][MR], or rows of kTileStride dwords.
enum class Left { packed, rows };

// What will be packed next, fetched on the way: a line a step, `pace` bytes apart.
struct Ahead {
  const char* at = nullptr;
  int64_t pace = 0;
};

// c = a b, or c += a b; c has `stride` floats from row to row. Sums are put down every kChain
// steps: one chain of rounded additions over a long row of W would lose digits.
template <int MR, Left LEFT>
void multiply(int64_t k, const float* a, const float* b, float* c, int64_t stride, bool add,
              Ahead ahead) {
  using F = Simd::F;
  constexpr int kNv = Product::kNv;
  for (int64_t start = 0; start < k; start += kChain, add = true) {
    F acc[MR][kNv];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kNr; j += 16) __builtin_prefetch(c + i * stride + j, 1);
#pragma GCC unroll 4
      for (int j = 0; j < kNv; ++j) acc[i][j] = Simd::zero();
    }
    for (int64_t steps = std::min<int64_t>(kChain, k - start); steps > 0; --steps) {
      F right[kNv];
#pragma GCC unroll 4
      for (int j = 0; j < kNv; ++j) right[j] = Simd::load1(b + j * Simd::kWidth);
      b += kNr;
      __builtin_prefetch(ahead.at, 0, 2);  // never faults, wherever it ends up
      ahead.at += ahead.pace;
      if (LEFT == Left::packed) __builtin_prefetch(a + 256);
      for (int j = 0; j < kNr; j += 16) __builtin_prefetch(b + 8 * kNr + j);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const F left = Simd::set1(LEFT == Left::packed ? a[i] : a[i * kTileStride]);
#pragma GCC unroll 4
        for (int j = 0; j < kNv; ++j) {
          acc[i][j] = Product::multiply_add(acc[i][j], left, right[j]);
        }
      }
      a += LEFT == Left::packed ? MR : 1;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kNv; ++j) {
        float* at = c + i * stride + j * Simd::kWidth;
        if (add) acc[i][j] = Simd::add(Simd::load1(at), acc[i][j]);
        Simd::store1(at, acc[i][j]);
      }
    }
  }
}

using Multiply = void (*)(int64_t k, const float* a, const float* b, float* c, int64_t stride,
                          bool add, Ahead ahead);

// multiply for 1 .. kMr rows
template <Left LEFT>
struct Multiplies {
  Multiply of[Product::kMr + 1] = {};

  constexpr Multiplies() { fill<1>(); }
  template <int MR>
  constexpr void fill() {
    of[MR] = &multiply<MR, LEFT>;
    if constexpr (MR < Product::kMr) fill<MR + 1>();
  }
};

// Rows of a block in panels of at most kMr, as equal as possible.
struct Panels {
  int64_t rows, count;

  explicit Panels(int64_t rows_)
      : rows(rows_), count((rows_ + Product::kMr - 1) / Product::kMr) {}
  int64_t first(int64_t panel) const { return panel * rows / count; }
  int height(int64_t panel) const { return static_cast<int>(first(panel + 1) - first(panel)); }
};

// kNr rows of W (null: zeros), elements k0 .. k0 + length, into out[k][kNr].
template <class T>
void pack_columns(const T* const* rows, int64_t k0, int64_t length, float* out) {
  constexpr int kWidth = Simd::kWidth, kElements = kWidth * kStep;
  for (int64_t k = 0; k < length; k += kElements) {
    const int64_t left = length - k;
    const int steps = static_cast<int>(std::min<int64_t>(kWidth, (left + kStep - 1) / kStep));
    for (int group = 0; group < kNr; group += kWidth) {
      Simd::F r[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const T* row = rows[group + i];
        if (row == nullptr) {
          r[i] = Simd::zero();
        } else if (left >= kElements) {
          r[i] = Product::load(row + k0 + k);
        } else {
          T rest[kElements];
          std::memset(rest, 0, sizeof(rest));
          std::memcpy(rest, row + k0 + k, left * sizeof(T));
          r[i] = Product::load(rest);
        }
      }
      Simd::transpose(r);
      float* at = out + k / kStep * kNr + group;
      if (steps == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) Simd::store1(at + i * kNr, r[i]);
      } else {
        for (int i = 0; i < steps; ++i) Simd::store1(at + i * kNr, r[i]);
      }
    }
  }
}

// Columns d0 .. d0 + width (at most kNr; zeros behind) of `count` rows of W, into out[k][kNr].
template <class T>
void pack_rows(const T* w, int64_t stride, int64_t count, int64_t d0, int64_t width, float* out) {
  for (int64_t v = 0; v < count; v += kStep) {
    T rest[kStep][kNr];
    const T* rows[kStep];
    for (int i = 0; i < kStep; ++i) {
      rows[i] = w + (v + i) * stride + d0;
      if (width < kNr || v + i >= count) {
        std::memset(rest[i], 0, sizeof(rest[i]));
        if (v + i < count) std::memcpy(rest[i], rows[i], width * sizeof(T));
        rows[i] = rest[i];
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < Product::kNv; ++j) {
      Product::interleave(rows, j * Simd::kWidth, out + j * Simd::kWidth);
    }
    out += kNr;
  }
}

}  // namespace
