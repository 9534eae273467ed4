// rows_columns for bfloat16 by AMX. Included after amx_tiles.h, inside namespace qadapter::amx.
//
// A tile of W is 16 of its rows, 32 elements of each, as they lie in memory: W needs no packing, and
// is read once. x, small beside it, is packed once a call: groups of 16 rows, whose pairs of
// elements become columns. Sums come out with W's rows down and x's across, and are turned on their
// way out. A block is 32 rows of W by 16 or 32 rows of x: 4 tile loads, 8 cycles each, beside 4
// products of 16 cycles each, for 2 KB of W.

namespace {

constexpr int kBlock = 2 * kSide;  // rows of W in a block

// Elements that pack_x writes.
int64_t packed_elements(const RowsJob& job) {
  return tiles_of(job.x.count, kSide) * tiles_of(job.k, kDeep) * kTileElements;
}

// Group by group [k / 32][pair of elements][row]; zeros where x ends.
void pack_x(const RowsJob& job, BF16* packed) {
  for (int64_t first = 0; first < job.x.count; first += kSide) {
    for (int64_t k = 0; k < job.k; k += kDeep, packed += kTileElements) {
      Simd::F rows[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        rows[i] = Simd::zero();
        if (first + i >= job.x.count) continue;
        const BF16* row = reinterpret_cast<const BF16*>(job.x.row(first + i)) + k;
        if (job.k - k >= kDeep) {
          rows[i] = _mm512_loadu_ps(row);
        } else {
          alignas(64) BF16 rest[kDeep] = {};
          std::memcpy(rest, row, (job.k - k) * sizeof(BF16));
          rows[i] = _mm512_load_ps(rest);
        }
      }
      put_transposed(rows, packed);
    }
  }
}

struct Fetch {
  const char* at;
  int64_t step;  // bytes to fetch in each step of k
};

// Sums [2 s + g] += a tile of W, upper (s = 0) or lower, by that of x[g] at `at`.
template <int GROUPS>
__attribute__((always_inline)) inline void add_tiles(const BF16* upper, const BF16* lower,
                                                     int64_t bytes, const BF16* const x[2],
                                                     int64_t at) {
  _tile_loadd(4, upper, bytes);
  _tile_loadd(6, x[0] + at, 64);
  _tile_loadd(5, lower, bytes);
  if (GROUPS == 2) _tile_loadd(7, x[1] + at, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  if (GROUPS == 2) {
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// out[2 s + g]: 16 rows of W from w[s] on by the group x[g]; [row of W][row of x]. `rest`: the last
// elements of k, if they fill no tile, padded. Not inlined: to the compiler, a tile's load does not
// read memory.
template <int GROUPS>
__attribute__((noinline)) void multiply_tiles(const BF16* const w[2], int64_t stride, int64_t whole,
                                              const BF16* const x[2], const BF16* const rest[2],
                                              Fetch fetch, float (*out)[kSide * kSide]) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(BF16));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const BF16 *upper = w[0], *lower = w[1];
  int64_t at = 0;
  for (int64_t i = 0; i < whole; ++i, at += kTileElements, upper += kDeep, lower += kDeep) {
    add_tiles<GROUPS>(upper, lower, bytes, x, at);
    for (int64_t line = 0; line < fetch.step; line += 64) {
      __builtin_prefetch(fetch.at + line, 0, 2);  // never faults, wherever it ends up
    }
    fetch.at += fetch.step;
  }
  if (rest[0]) add_tiles<GROUPS>(rest[0], rest[1], 64, x, at);
  _tile_stored(0, out[0], 64);
  _tile_stored(2, out[2], 64);
  if (GROUPS == 2) {
    _tile_stored(1, out[1], 64);
    _tile_stored(3, out[3], 64);
  }
}

// Sums [row of W][row of x] to `columns` elements of out from column o on, for 16 rows from `first`
// on or as many as there are.
inline void put_tile(const RowsJob& job, const float* sums, int64_t first, int64_t o,
                     int64_t columns) {
  const int64_t rows = job.x.count - first;
  Simd::F r[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) r[i] = Simd::load1(sums + i * kSide);
  Simd::transpose(r);
  const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
  if (job.bias) {
    const __m256i bias = _mm256_maskz_loadu_epi16(mask, static_cast<const BF16*>(job.bias) + o);
    const __m512 offset = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16));
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) r[i] = Simd::add(r[i], offset);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if (i >= rows) return;
    BF16* out = reinterpret_cast<BF16*>(job.out.row(first + i)) + o;
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(r[i]));
  }
}

// job.packed holds x; W has 16 rows or more.
void rows_columns(const RowsJob& job, int64_t first, int64_t end) {
  const Tiles tiles;
  const BF16* data = reinterpret_cast<const BF16*>(job.w);
  const int64_t whole = job.k / kDeep, left = job.k % kDeep, groups = tiles_of(job.x.count, kSide);
  const int64_t group = tiles_of(job.k, kDeep) * kTileElements;
  // The next block is fetched in equal parts.
  const int64_t bytes = kBlock * job.w_stride * static_cast<int64_t>(sizeof(BF16));
  const int64_t turns = (groups + 1) / 2 * whole;
  const int64_t step = turns > 0 ? ((bytes + turns - 1) / turns + 63) / 64 * 64 : 0;
  alignas(64) BF16 padded[2][kTileElements] = {};
  alignas(64) float sums[5][kSide * kSide];  // the last one is read where a tile is put in part
  for (int64_t o = first; o < end; o += kBlock) {
    // The last rows of W are those of a whole tile, too: what was there before is not put again.
    const int64_t from[2] = {std::min(o, job.o - kSide), std::min(o + kSide, job.o - kSide)};
    const BF16* const w[2] = {data + from[0] * job.w_stride, data + from[1] * job.w_stride};
    const BF16* rest[2] = {};
    for (int s = 0; left > 0 && s < 2; ++s) {
      for (int i = 0; i < kSide; ++i) {
        std::memcpy(padded[s] + i * kDeep, w[s] + i * job.w_stride + whole * kDeep,
                    left * sizeof(BF16));
      }
      rest[s] = padded[s];
    }
    // Also behind `end`: that is what this thread takes next.
    Fetch fetch{reinterpret_cast<const char*>(data + (o + kBlock) * job.w_stride),
                o + 2 * kBlock <= job.o ? step : 0};
    for (int64_t g = 0; g < groups; g += 2, fetch.at += whole * fetch.step) {
      const int together = g + 1 < groups ? 2 : 1;
      const BF16* x = job.packed + g * group;
      const BF16* const xs[2] = {x, x + group};
      (together == 2 ? multiply_tiles<2> : multiply_tiles<1>)(w, job.w_stride, whole, xs, rest,
                                                              fetch, sums);
      for (int s = 0; s < 2; ++s) {
        const int64_t start = o + s * kSide, columns = std::min<int64_t>(kSide, end - start);
        if (columns <= 0) break;
        for (int i = 0; i < together; ++i) {
          put_tile(job, sums[2 * s + i] + (start - from[s]) * kSide, (g + i) * kSide, start,
                   columns);
        }
      }
    }
  }
}

}  // namespace
