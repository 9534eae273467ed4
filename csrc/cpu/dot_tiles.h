// The shape of blocks for products of bfloat16 pairs, which is that of AMX's tiles: 16 rows of 64
// bytes. Included inside a namespace that has Simd, of AVX-512's vectors.

namespace {

constexpr int kSide = 16;  // rows of a tile, and columns of its product
constexpr int kDeep = 32;  // bfloat16 elements of a row
constexpr int kTileElements = kSide * kDeep;

inline int64_t tiles_of(int64_t n, int64_t side) { return (n + side - 1) / side; }

// 16 rows of 32 elements as the right side of a product: [pair of elements][row].
inline void put_transposed(Simd::F rows[kSide], BF16* out) {
  Simd::transpose(rows);
  float* to = reinterpret_cast<float*>(out);
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) Simd::store1(to + i * kSide, rows[i]);
}

}  // namespace
