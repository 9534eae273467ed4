// AMX's tiles, all of the same shape. Included inside namespace qadapter::amx, which has Simd.

#include "cpu/dot_tiles.h"

namespace {

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
