// Operands and products of attention. Included inside the namespace of an instruction set, after
// its `block` of a product (varlen_block_amx.h, varlen_block_dot.h).
//
// Left sides of products are rows as they lie, or turned; right sides are packed once a sequence:
//
//   across   16 rows, whose pairs of elements become columns: for products over the dimension
//   pairs    pairs of rows, interleaved: for products over the rows

namespace {

constexpr int kBlock = 2 * kSide;  // queries, or keys, of a block of products

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1);
}

constexpr int64_t kSlack = 2048;  // bytes that Memory may lose between its pieces

// Memory of this thread, cut into pieces on lines of the cache.
struct Memory {
  char* at;

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

// 16 dwords, the first of a pair of bfloat16 below the second.
inline __m512i joined(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline __m512i interleaved(const BF16* even, const BF16* odd) {
  return joined(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
}

alignas(64) const BF16 kZeros[kDeep] = {};

// Keys of a sequence in groups of 16: [keys / 16][dim / 32][pair of elements][key].
void pack_across(const HeadRows& x, int64_t head, const Sequence& s, int64_t padded, int64_t dim,
                 BF16* out) {
  for (int64_t first = 0; first < padded; first += kSide) {
    for (int64_t d = 0; d < dim; d += kDeep, out += kTileElements) {
      Simd::F rows[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int64_t key = first + i;
        rows[i] = key < s.keys() ? _mm512_loadu_ps(x.row(head, s.token(key)) + d) : Simd::zero();
      }
      put_transposed(rows, out);
    }
  }
}

// The same in steps of 32: [keys / 32][dim / 16][pair of keys][16].
void pack_pairs(const HeadRows& x, int64_t head, const Sequence& s, int64_t padded, int64_t dim,
                BF16* out) {
  const int64_t tiles = dim / kSide;
  for (int64_t first = 0; first < padded; first += kDeep, out += tiles * kTileElements) {
    for (int p = 0; p < kSide; ++p) {
      const auto row = [&](int64_t key, int64_t d) {
        return key < s.keys() ? x.row(head, s.token(key)) + d : kZeros;
      };
      for (int64_t t = 0; t < tiles; ++t) {
        const __m512i both = interleaved(row(first + 2 * p, t * kSide),
                                         row(first + 2 * p + 1, t * kSide));
        _mm512_storeu_si512(out + t * kTileElements + p * kDeep, both);
      }
    }
  }
}

// 32 rows as the left side of a product over the rows: [dim / 16][16][row].
void pack_turned(const char* rows, int64_t stride, int64_t dim, BF16* out) {
  for (int64_t d = 0; d < dim; d += kSide, out += kTileElements) {
    Simd::F pairs[kSide];
    for (int p = 0; p < kSide; ++p) {
      const BF16* even = reinterpret_cast<const BF16*>(rows + 2 * p * stride) + d;
      const BF16* odd = reinterpret_cast<const BF16*>(rows + (2 * p + 1) * stride) + d;
      pairs[p] = _mm512_castsi512_ps(interleaved(even, odd));
    }
    put_transposed(pairs, out);
  }
}

// 32 rows of queries where they lie, or a copy with zeros behind the last of them.
struct QueryRows {
  const char* data;
  int64_t stride;

  QueryRows(const HeadRows& x, int64_t head, int64_t token, int64_t count, int64_t dim,
            BF16* copy)
      : data(reinterpret_cast<const char*>(x.row(head, token))), stride(x.token) {
    if (count >= kBlock) return;
    std::memset(static_cast<void*>(copy), 0, kBlock * dim * sizeof(BF16));
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(copy + i * dim, x.row(head, token + i), dim * sizeof(BF16));
    }
    data = reinterpret_cast<const char*>(copy);
    stride = dim * static_cast<int64_t>(sizeof(BF16));
  }
  const char* row(int64_t i) const { return data + i * stride; }
};

// What a block of queries of a sequence sees: keys [from, to), in blocks of 32.
struct Seen {
  int64_t count, first, from, to, window;  // first: the keys that the first query sees, in number

  Seen(const VarlenJob& job, const Sequence& s, int64_t query)
      : count(std::min<int64_t>(kBlock, s.own - query)),
        first(s.prefix + query + 1),
        window(job.window) {
    from = std::max<int64_t>(0, first - window) / kBlock * kBlock;
    to = tiles_of(first + count - 1, kBlock) * kBlock;
  }
  // of 16 keys from `key` on, those that query i sees
  __mmask16 lanes(int64_t i, int64_t key) const {
    const int64_t stop = first + i - key;
    return first_lanes(stop) & static_cast<__mmask16>(~first_lanes(stop - window));
  }
};

// scores[query][key] of 32 queries, or whatever else is a product over the dimension.
inline void scores_of(const QueryRows& rows, const BF16* across, const Seen& seen, int64_t dim,
                      float* scores, int64_t stride) {
  const int64_t deep = dim / kDeep, tile = deep * kTileElements;
  for (int64_t key = seen.from; key < seen.to; key += kBlock) {
    const BF16* right = across + key / kSide * tile;
    block(deep, rows.row(0), rows.row(kSide), rows.stride, 64, right, right + tile, kTileElements,
          scores + key, stride, false);
  }
}

// Rows of 16 factors[query] * sums[query] to where the queries of a head lie.
inline void put_rows(const float* sums, const float* factors, const HeadRows& to, int64_t head,
                     int64_t token, int64_t count, int64_t d) {
  for (int64_t i = 0; i < count; ++i) {
    const __m512 f = _mm512_set1_ps(factors[i]);
    const __m512 low = _mm512_mul_ps(f, _mm512_loadu_ps(sums + i * kBlock));
    const __m512 high = _mm512_mul_ps(f, _mm512_loadu_ps(sums + i * kBlock + kSide));
    _mm512_storeu_si512(to.row(head, token + i) + d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

constexpr float kLog2e = 0x1.715476p+0f;

int64_t padded_keys(const Sequence& s) { return tiles_of(s.keys(), kBlock) * kBlock; }
// floats from one row of scores to the next: lines that follow each other are in other sets
int64_t row_floats(const Sequence& s) { return padded_keys(s) + kSide; }

}  // namespace
