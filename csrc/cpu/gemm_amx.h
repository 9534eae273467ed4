// Products on packed operands by AMX. Included in the place of gemm_kernel.h, after gemm_bf16.h and
// gemm_pack.h and amx_tiles.h, inside namespace qadapter::amx.
//
// A tile is 16 rows of 64 bytes. tdpbf16ps multiplies 16 rows of 16 pairs of bfloat16 with 16 pairs
// for each of 16 columns, and adds them to float32, rounded to nearest; subnormal numbers count as
// 0. A block is 32 rows and 32 columns: four tiles of sums, two of each side. Its step is 4 tile
// loads, 8 cycles each, beside 4 products of 16 cycles each.

namespace {

constexpr int kMr = 32;         // rows of a block
constexpr int kRowUnit = 16;    // blocks have a multiple of this many rows
constexpr int kLeftSteps = 16;  // steps of a row that lie together
constexpr int kMostRows = 384;  // rows that go through the vocabulary together
constexpr int kDepth = 160;     // steps of a packed panel of W; logits are added up over more

// c = a b, or c += a b, for 16 or 32 rows; c has `stride` floats from row to row. Not inlined: to
// the compiler, a tile's load does not read memory.
template <int ROWS, Left LEFT>
__attribute__((noinline)) void multiply(int64_t k, const float* a, const float* b, float* c,
                                        int64_t stride, bool add, Ahead ahead) {
  constexpr int64_t kRow = LEFT == Left::packed ? kLeftSteps : kTileStride;
  constexpr int64_t kNext = LEFT == Left::packed ? ROWS * kLeftSteps : kLeftSteps;
  constexpr int64_t kBytes = sizeof(float);
  float* lower = c + 16 * stride;
  if (add) {
    _tile_loadd(0, c, stride * kBytes);
    _tile_loadd(1, c + 16, stride * kBytes);
    if (ROWS == 32) {
      _tile_loadd(2, lower, stride * kBytes);
      _tile_loadd(3, lower + 16, stride * kBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (; k > 0; k -= kLeftSteps) {
    _tile_loadd(4, a, kRow * kBytes);
    _tile_loadd(6, b, kNr * kBytes);
    _tile_loadd(7, b + 16, kNr * kBytes);
    if (ROWS == 32) _tile_loadd(5, a + 16 * kRow, kRow * kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (ROWS == 32) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int i = 0; i < kLeftSteps; ++i) {
      __builtin_prefetch(ahead.at, 0, 2);  // never faults, wherever it ends up
      ahead.at += ahead.pace;
    }
    a += kNext;
    b += kLeftSteps * kNr;
  }
  _tile_stored(0, c, stride * kBytes);
  _tile_stored(1, c + 16, stride * kBytes);
  if (ROWS == 32) {
    _tile_stored(2, lower, stride * kBytes);
    _tile_stored(3, lower + 16, stride * kBytes);
  }
}

template <Left LEFT>
void multiply_rows(int rows, int64_t k, const float* a, const float* b, float* c, int64_t stride,
                   bool add, Ahead ahead) {
  (rows == 16 ? multiply<16, LEFT> : multiply<32, LEFT>)(k, a, b, c, stride, add, ahead);
}

}  // namespace
