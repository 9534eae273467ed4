// The products of a low-rank adapter for many rows of bfloat16, by AMX. Included after amx_tiles.h,
// inside namespace qadapter::amx.
//
// A, B and x A^T are float32. Such a number is the sum of three bfloat16, and a product with it the
// sum of products with its parts, which lie side by side in the tiles:
//
//   h = x A^T     x [16, 32 k] by (A_1, A_2, A_3)^T [32 k, 3 r]
//   out += s h B^T    the six products of parts that count: kLow of s h by kHigh of B, 6 r deep
//   low^T x       (low_1, low_2, low_3)^T, 3 r rows, by x, pairs of whose rows are interleaved
//
// x is read as it lies; 16 x 16 sums are added to out from the first cache. Bytes: x read, out read
// and written, once; 6 r elements of B for each column of out, from the second cache, once per 32
// rows. Operations beside them: r = 8 fills two tiles of A, of B and of low.

namespace {

// Of two numbers in three parts each, what is above 2^-24 of their product.
constexpr int kProducts = 6;
constexpr int kLow[kProducts] = {0, 0, 1, 1, 0, 2}, kHigh[kProducts] = {0, 1, 0, 1, 2, 0};

// Up to 16 floats as the sum of three bfloat16; what is infinite or NaN is in the first one.
struct Parts {
  __m256i bits[3];

  explicit Parts(__m512 x) {
    for (__m256i& part : bits) {
      part = (__m256i)_mm512_cvtneps_pbh(x);
      const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
      const __mmask16 finite =
          _mm512_cmp_ps_mask(_mm512_abs_ps(wide), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
      x = _mm512_maskz_sub_ps(finite, x, wide);
    }
  }
};

inline __m512 load_some(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load_some(const BF16* p, __mmask16 mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __mmask16 first_of(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1);
}

// The parts of n elements of p, `stride` elements apart.
template <class T>
void split_row(const T* p, int64_t n, BF16* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_of(n - i);
    const Parts parts(load_some(p + i, mask));
    for (int j = 0; j < 3; ++j) {
      _mm256_mask_storeu_epi16(out + j * stride + i, mask, parts.bits[j]);
    }
  }
}

// Rows that lie `stride` elements apart.
inline void pack_tile(const BF16* rows, int64_t stride, BF16* out) {
  Simd::F r[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) r[i] = _mm512_loadu_ps(rows + i * stride);
  put_transposed(r, out);
}

int64_t a_tiles(const LoraJob& job) { return tiles_of(3 * job.r, kSide); }
int64_t b_depth(const LoraJob& job) { return tiles_of(kProducts * job.r, kDeep); }

// Elements of A and B as pack_lora puts them: [tile of columns][k / 32] and [o / 16][depth].
int64_t lora_elements(const LoraJob& job) {
  return (a_tiles(job) * tiles_of(job.k, kDeep) + tiles_of(job.o, kSide) * b_depth(job)) *
         kTileElements;
}

// Elements of memory that pack_lora needs.
int64_t pack_memory(const LoraJob& job) {
  const int64_t k = tiles_of(job.k, kDeep) * kDeep, width = b_depth(job) * kDeep;
  return kSide * std::max(a_tiles(job) * k, width);
}

template <class W>
void pack_lora(const LoraJob& job, BF16* packed, BF16* rows) {
  const int64_t r = job.r, deep = tiles_of(job.k, kDeep), k = deep * kDeep;
  std::memset(static_cast<void*>(rows), 0, pack_memory(job) * sizeof(BF16));
  for (int64_t j = 0; j < r; ++j) {
    const W* a = reinterpret_cast<const W*>(job.a) + j * job.a_stride;
    split_row(a, job.k, rows + j * k, r * k);
  }
  for (int64_t t = 0; t < a_tiles(job); ++t) {
    for (int64_t d = 0; d < deep; ++d, packed += kTileElements) {
      pack_tile(rows + t * kSide * k + d * kDeep, k, packed);
    }
  }
  const int64_t width = b_depth(job) * kDeep;
  std::memset(static_cast<void*>(rows), 0, kSide * width * sizeof(BF16));
  for (int64_t o = 0; o < job.o; o += kSide) {
    for (int64_t i = 0; i < kSide; ++i) {
      BF16* row = rows + i * width;
      if (o + i < job.o) {
        const W* b = reinterpret_cast<const W*>(job.b) + (o + i) * job.b_stride;
        for (int64_t j = 0; j < r; j += 16) {
          const __mmask16 mask = first_of(r - j);
          const Parts parts(load_some(b + j, mask));
          for (int p = 0; p < kProducts; ++p) {
            _mm256_mask_storeu_epi16(row + p * r + j, mask, parts.bits[kHigh[p]]);
          }
        }
      } else {
        std::memset(static_cast<void*>(row), 0, width * sizeof(BF16));
      }
    }
    for (int64_t d = 0; d < width; d += kDeep, packed += kTileElements) {
      pack_tile(rows + d, width, packed);
    }
  }
}

// Four tiles of sums: left[0] and left[1] by right[0] and right[1], `steps` tiles deep. Not
// inlined: to the compiler, a tile's load does not read memory.
__attribute__((noinline)) void four_tiles(int64_t steps, const char* const left[2], int64_t stride,
                                          int64_t next, const BF16* const right[2],
                                          int64_t right_next, float (*sums)[kSide * kSide]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, left[0] + i * next, stride);
    _tile_loadd(6, right[0] + i * right_next, 64);
    _tile_loadd(5, left[1] + i * next, stride);
    _tile_loadd(7, right[1] + i * right_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

// Floats of memory that lora_block needs.
int64_t block_memory(const LoraJob& job) {
  return 2 * kSide * (a_tiles(job) * kSide + b_depth(job) * kDeep / 2);
}

// Rows first .. first + 32 or as many as there are, of at least 32 that lie `x_stride` bytes apart.
void lora_block(const LoraJob& job, const BF16* packed, int64_t x_stride, int64_t first,
                float* memory) {
  const Tiles tiles;
  const int64_t r = job.r, deep = tiles_of(job.k, kDeep), width = b_depth(job) * kDeep;
  const int64_t whole = job.k / kDeep, rest = job.k % kDeep;
  const int64_t rows = std::min<int64_t>(2 * kSide, job.x.count - first);
  // The last rows are those of whole tiles, too; what is not asked for is not used.
  const int64_t from = std::min(first, job.x.count - 2 * kSide), skipped = first - from;
  const char* x = job.x.data + from * x_stride;
  alignas(64) BF16 padded[2 * kSide][kDeep] = {};
  for (int i = 0; rest > 0 && i < 2 * kSide; ++i) {
    std::memcpy(padded[i], x + i * x_stride + whole * 64, rest * sizeof(BF16));
  }
  alignas(64) float sums[4][kSide * kSide], last[4][kSide * kSide];
  const char* const left[2] = {x, x + kSide * x_stride};
  const char* const left_rest[2] = {reinterpret_cast<const char*>(padded),
                                    reinterpret_cast<const char*>(padded[kSide])};
  // x A^T, one part of A after the other.
  const int64_t columns = a_tiles(job) * kSide;
  BF16* factors = reinterpret_cast<BF16*>(memory + 2 * kSide * columns);
  std::memset(static_cast<void*>(factors), 0, 2 * kSide * width * sizeof(BF16));
  for (int64_t t = 0; t < a_tiles(job); t += 2) {
    const bool two = t + 1 < a_tiles(job);
    const BF16* a = packed + t * deep * kTileElements;
    const BF16* const right[2] = {a, two ? a + deep * kTileElements : a};
    four_tiles(whole, left, x_stride, 64, right, kTileElements, sums);
    if (rest > 0) {
      const BF16* const right_rest[2] = {right[0] + whole * kTileElements,
                                         right[1] + whole * kTileElements};
      four_tiles(1, left_rest, 64, 0, right_rest, 0, last);
    }
    for (int s = 0; s < 4; ++s) {
      if (s % 2 == 1 && !two) continue;
      for (int i = 0; i < kSide; ++i) {
        __m512 v = _mm512_load_ps(sums[s] + i * kSide);
        if (rest > 0) v = _mm512_add_ps(v, _mm512_load_ps(last[s] + i * kSide));
        float* to = memory + (s / 2 * kSide + i) * columns + (t + s % 2) * kSide;
        _mm512_storeu_ps(to, v);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* sums_of = memory + (i + skipped) * columns;
    BF16* to = factors + i * width;
    for (int64_t j = 0; j < r; j += 16) {
      const __mmask16 mask = first_of(r - j);
      __m512 low = load_some(sums_of + 2 * r + j, mask);
      low = _mm512_add_ps(low, load_some(sums_of + r + j, mask));
      low = _mm512_add_ps(low, load_some(sums_of + j, mask));
      if (job.low) _mm512_mask_storeu_ps(job.low + (first + i) * r + j, mask, low);
      const Parts parts(_mm512_mul_ps(low, _mm512_set1_ps(job.scaling)));
      for (int p = 0; p < kProducts; ++p) {
        _mm256_mask_storeu_epi16(to + p * r + j, mask, parts.bits[kLow[p]]);
      }
    }
  }
  // Its product with B^T, 32 columns of out at a time.
  const char* upper = reinterpret_cast<const char*>(factors);
  const char* const factor[2] = {upper, upper + kSide * width * sizeof(BF16)};
  const BF16* b = packed + a_tiles(job) * deep * kTileElements;
  const int64_t tile = b_depth(job) * kTileElements;
  for (int64_t o = 0; o < job.o; o += 2 * kSide, b += 2 * tile) {
    const BF16* const right[2] = {b, o + kSide < job.o ? b + tile : b};
    four_tiles(b_depth(job), factor, width * sizeof(BF16), 64, right, kTileElements, sums);
    const __mmask16 masks[2] = {first_of(job.o - o), first_of(job.o - o - kSide)};
    for (int64_t i = 0; i < rows; ++i) {
      BF16* out = reinterpret_cast<BF16*>(job.out.row(first + i)) + o;
      const float* delta = sums[i / kSide * 2] + i % kSide * kSide;
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const __m512 sum = _mm512_add_ps(load_some(out + s * kSide, masks[s]),
                                         _mm512_load_ps(delta + s * kSide * kSide));
        _mm256_mask_storeu_epi16(out + s * kSide, masks[s], (__m256i)_mm512_cvtneps_pbh(sum));
      }
    }
  }
}

// Elements of low^T as pack_low puts it: [tile of rows][n / 32][16][32].
int64_t low_elements(const OuterJob& job) {
  return tiles_of(3 * job.r, kSide) * tiles_of(job.x.count, kDeep) * kTileElements;
}

void pack_low(const OuterJob& job, BF16* packed) {
  const int64_t n = job.x.count, deep = tiles_of(n, kDeep), r = job.r;
  std::memset(static_cast<void*>(packed), 0, low_elements(job) * sizeof(BF16));
  for (int64_t i = 0; i < n; i += kSide) {
    for (int64_t j = 0; j < r; j += kSide) {
      Simd::F rows[kSide];
      const __mmask16 mask = first_of(r - j);
#pragma GCC unroll 16
      for (int k = 0; k < kSide; ++k) {
        rows[k] = i + k < n ? load_some(job.low + (i + k) * r + j, mask) : Simd::zero();
      }
      Simd::transpose(rows);
      for (int k = 0; k < kSide && j + k < r; ++k) {
        const Parts parts(rows[k]);
        for (int p = 0; p < 3; ++p) {
          const int64_t row = p * r + j + k;
          BF16* to = packed + (row / kSide * deep + i / kDeep) * kTileElements;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row % kSide * kDeep + i % kDeep),
                              parts.bits[p]);
        }
      }
    }
  }
}

// Floats of memory that outer_tiles needs.
int64_t outer_memory(const OuterJob& job) { return tiles_of(3 * job.r, kSide) * kSide * 64; }

// Columns [first, end), at most 64 of them. Pairs of rows of x are interleaved within 128 bits, so
// that of 32 columns a tile has 0-3, 8-11, 16-19, 24-27, and the next one the others.
void outer_tiles(const OuterJob& job, const BF16* packed, int64_t first, int64_t end,
                 float* sums) {
  const Tiles tiles;
  const int64_t n = job.x.count, deep = tiles_of(n, kDeep), r = job.r;
  const int64_t row_tiles = tiles_of(3 * r, kSide), columns = end - first;
  const __mmask32 masks[2] = {
      columns >= 32 ? ~0u : (1u << columns) - 1,
      columns >= 64 ? ~0u : (columns > 32 ? (1u << (columns - 32)) - 1 : 0u)};
  alignas(64) BF16 pairs[4][kTileElements];
  constexpr int64_t kAhead = 64;  // rows: theirs are lines apart, which nobody fetches by itself
  for (int64_t t = 0; t < row_tiles; ++t) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < deep; ++d) {
      for (int p = 0; p < kSide; ++p) {
        const int64_t i = d * kDeep + 2 * p;
        const auto row = [&](int64_t k) {
          return k < n ? reinterpret_cast<const BF16*>(job.x.row(k)) + first : nullptr;
        };
        const BF16 *even = row(i), *odd = row(i + 1);
        if (t == 0 && row(i + kAhead + 1)) {
          __builtin_prefetch(row(i + kAhead));
          __builtin_prefetch(row(i + kAhead) + kDeep);
          __builtin_prefetch(row(i + kAhead + 1));
          __builtin_prefetch(row(i + kAhead + 1) + kDeep);
        }
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          const __m512i a = _mm512_maskz_loadu_epi16(even ? masks[s] : 0, even + s * 32);
          const __m512i b = _mm512_maskz_loadu_epi16(odd ? masks[s] : 0, odd + s * 32);
          _mm512_store_si512(pairs[2 * s] + p * kDeep, _mm512_unpacklo_epi16(a, b));
          _mm512_store_si512(pairs[2 * s + 1] + p * kDeep, _mm512_unpackhi_epi16(a, b));
        }
      }
      asm volatile("" ::: "memory");  // to the compiler, a tile's load does not read memory
      _tile_loadd(4, packed + (t * deep + d) * kTileElements, 64);
      _tile_loadd(5, pairs[0], 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, pairs[1], 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, pairs[2], 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, pairs[3], 64);
      _tile_dpbf16ps(3, 4, 6);
    }
    float* to = sums + t * kSide * 64;
    _tile_stored(0, to, 256);
    _tile_stored(1, to + 16, 256);
    _tile_stored(2, to + 32, 256);
    _tile_stored(3, to + 48, 256);
  }
  asm volatile("" ::: "memory");
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t in = c % 32, at = c / 32 * 32 + in % 8 / 4 * 16 + in / 8 * 4 + in % 4;
      const float low = sums[(2 * r + j) * 64 + at] + sums[(r + j) * 64 + at];
      job.out[j * job.k + first + c] = job.scaling * (low + sums[j * 64 + at]);
    }
  }
}

}  // namespace
