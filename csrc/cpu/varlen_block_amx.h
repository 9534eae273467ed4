// A block of attention's products by AMX. Included after amx_tiles.h, inside namespace qadapter::amx.

namespace {

// c, 32 rows of `c_stride` floats, = or += two tiles of the left by two of the right, `steps` deep.
// Strides and steps of the left are bytes, those of the right elements. Not inlined: to the
// compiler, a tile's load does not read memory.
__attribute__((noinline)) void block(int64_t steps, const void* upper, const void* lower,
                                     int64_t stride, int64_t next, const BF16* right0,
                                     const BF16* right1, int64_t right_next, float* c,
                                     int64_t c_stride, bool add) {
  const char *a0 = static_cast<const char*>(upper), *a1 = static_cast<const char*>(lower);
  float* below = c + kSide * c_stride;
  const int64_t bytes = c_stride * sizeof(float);
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kSide, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a0 + i * next, stride);
    _tile_loadd(6, right0 + i * right_next, 64);
    _tile_loadd(7, right1 + i * right_next, 64);
    _tile_loadd(5, a1 + i * next, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kSide, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + kSide, bytes);
}

}  // namespace
