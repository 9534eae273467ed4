// The shape of AMX's tiles, the same for all products here: 16 rows of 64 bytes. Included inside
// namespace qadapter::amx, which has Simd.

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

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as ldtilecfg reads it");
const TileConfig kTileConfig;

// The tiles of this thread, as long as this lives.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTileConfig); }
  ~Tiles() { _tile_release(); }
};

}  // namespace
