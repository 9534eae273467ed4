// Operands of the products of linear_fwd, and how they are packed, in terms of Simd and Product.
// Included once per instruction set, inside namespace qadapter::<set>, after Product, hence no
// include guard and no includes.
//
// Operands are arrays of dwords, typed float: one float32, or a pair of bfloat16 that follow each
// other along the summed dimension. The right side comes in panels of kNr columns, [k][kNr].

namespace {

constexpr int kNr = Product::kNv * Simd::kWidth;
constexpr int kTile = Product::kTile;
constexpr int kStep = Product::kStep;
constexpr int kTileStride = kTile + 16;  // not a power of two: rows then differ in their cache set

static_assert(kTile % kNr == 0 && kTile % Simd::kGroup == 0, "tiles hold whole panels");

// How the left side lies: [k / kLeftSteps][rows][kLeftSteps], or rows of kTileStride dwords.
enum class Left { packed, rows };

// What will be packed next, fetched on the way: a line a step, `pace` bytes apart.
struct Ahead {
  const char* at = nullptr;
  int64_t pace = 0;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Half x) {
  Half pad[Simd::kWidth] = {x};
  return Simd::first(Simd::load1(pad));
}

template <class T>
void widen(const void* row, int64_t n, float* out) {
  const T* in = static_cast<const T*>(row);
  int64_t k = 0;
  for (; k + Simd::kWidth <= n; k += Simd::kWidth) Simd::store1(out + k, Simd::load1(in + k));
  for (; k < n; ++k) out[k] = to_float(in[k]);
}

inline void widen(const Matrix& matrix, int64_t row, int64_t n, float* out) {
  const char* at = matrix.row(row);
  if (matrix.dtype == DType::f32) {
    widen<float>(at, n, out);
  } else if (matrix.dtype == DType::bf16) {
    widen<BF16>(at, n, out);
  } else {
    widen<Half>(at, n, out);
  }
}

// kNr rows of W (null: zeros), elements k0 .. k0 + length, into out[k][kNr]; zeros behind, up to a
// multiple of kWidth steps.
template <class T>
void pack_columns(const T* const* rows, int64_t k0, int64_t length, float* out) {
  constexpr int kWidth = Simd::kWidth, kElements = kWidth * kStep;
  for (int64_t k = 0; k < length; k += kElements) {
    const int64_t left = length - k;
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
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) Simd::store1(at + i * kNr, r[i]);
    }
  }
}

// Columns d0 .. d0 + width (at most kNr; zeros behind) of `count` rows of W (zeros behind), into
// out[steps][kNr].
template <class T>
void pack_rows(const T* w, int64_t stride, int64_t count, int64_t d0, int64_t width, int64_t steps,
               float* out) {
  for (int64_t v = 0; v < steps * kStep; v += kStep) {
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
