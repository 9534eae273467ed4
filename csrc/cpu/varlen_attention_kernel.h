// Attention and its gradients; varlen_attention.cpp has the maths. Included after varlen_tiles.h,
// inside the namespace of an instruction set.

namespace {

// Bytes for forward_sequence.
int64_t forward_memory(const VarlenJob& job, const Sequence& s) {
  const int64_t packed = 2 * padded_keys(s) * job.dim, copy = kBlock * job.dim;
  return (packed + copy + kBlock * row_floats(s)) * 2 + kBlock * row_floats(s) * 4 +
         kBlock * kBlock * 4 + kSlack;
}

// Of the query heads of key head h.
void forward_sequence(const VarlenJob& job, const Sequence& s, int64_t h, char* room) {
  const Tiles configured;
  Memory memory{room};
  const int64_t dim = job.dim, keys = padded_keys(s), stride = row_floats(s);
  BF16* k_across = memory.take<BF16>(keys * dim);
  BF16* v_pairs = memory.take<BF16>(keys * dim);
  BF16* copy = memory.take<BF16>(kBlock * dim);
  float* scores = memory.take<float>(kBlock * stride);
  BF16* p = memory.take<BF16>(kBlock * stride);
  float* sums = memory.take<float>(kBlock * kBlock);
  pack_across(job.k, h, s, keys, dim, k_across);
  pack_pairs(job.v, h, s, keys, dim, v_pairs);
  const Simd::Exp2 exp2;
  const __m512 scale = _mm512_set1_ps(job.scaling * kLog2e), lowest = _mm512_set1_ps(-INFINITY);
  for (int64_t head = h * job.group; head < (h + 1) * job.group; ++head) {
    for (int64_t query = 0; query < s.own; query += kBlock) {
      const Seen seen(job, s, query);
      const int64_t token = s.start + query;
      const QueryRows rows(job.q, head, token, seen.count, dim, copy);
      scores_of(rows, k_across, seen, dim, scores, stride);
      float inverse[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        BF16* to = p + i * stride;
        if (i >= seen.count) {
          std::memset(static_cast<void*>(to + seen.from), 0, (seen.to - seen.from) * sizeof(BF16));
          continue;
        }
        const float* row = scores + i * stride;
        __m512 most = lowest;
        for (int64_t j = seen.from; j < seen.to; j += kSide) {
          const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + j), scale);
          most = _mm512_mask_max_ps(most, seen.lanes(i, j), most, x);
        }
        const float max = _mm512_reduce_max_ps(most);
        const __m512 minus = _mm512_set1_ps(-max);
        __m512 sum = Simd::zero();
        for (int64_t j = seen.from; j < seen.to; j += kSide) {
          const __m512 y = _mm512_fmadd_ps(_mm512_loadu_ps(row + j), scale, minus);
          const __m512 e = _mm512_maskz_mov_ps(seen.lanes(i, j), exp2.value(y));
          sum = _mm512_add_ps(sum, e);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), (__m256i)_mm512_cvtneps_pbh(e));
        }
        const float total = _mm512_reduce_add_ps(sum);
        inverse[i] = 1.0f / total;
        job.lse[head * job.tokens + token + i] = max / kLog2e + std::log(total);
      }
      const int64_t tile = dim / kSide * kTileElements;
      for (int64_t d = 0; d < dim; d += kBlock) {
        const BF16* right = v_pairs + seen.from / kDeep * tile + d / kSide * kTileElements;
        block((seen.to - seen.from) / kDeep, p + seen.from, p + seen.from + kSide * stride,
              stride * sizeof(BF16), 64, right, right + kTileElements, tile, sums, kBlock, false);
        put_rows(sums, inverse, job.out, head, token, seen.count, d);
      }
    }
  }
}

constexpr int64_t kQueries = 128;  // whose probabilities meet the gradients of keys and values

// Bytes for backward_sequence, and for the float sums of a group's `tokens`.
int64_t backward_memory(const VarlenJob& job, const Sequence& s, int64_t tokens) {
  const int64_t keys = padded_keys(s), stride = row_floats(s), dim = job.dim;
  const int64_t halves = 3 * keys * dim + 2 * kBlock * dim + 2 * kQueries * dim +
                         2 * kQueries * keys + 2 * kBlock * stride;
  const int64_t floats = 2 * kBlock * stride + kBlock * kBlock + 2 * dim * stride;
  return halves * 2 + floats * 4 + 2 * tokens * dim * 4 + kSlack;
}

// factor p (g - shift); 0 where p is 0, whatever g is where nothing is seen.
inline __m256i score_gradient(__m512 p, const float* g, __m512 shift, __m512 factor) {
  const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(g), shift), factor);
  const __mmask16 seen = _mm512_cmp_ps_mask(p, Simd::zero(), _CMP_NEQ_UQ);
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mul_ps(seen, p, d));
}

// Probabilities of two queries, and the gradients of their scores: from scores and the gradients of
// probabilities, which they replace. Right sides of products over the queries, and the gradients in
// rows, too.
inline void pair_of_rows(const VarlenJob& job, const Seen& seen, int64_t pair, const float* lse,
                         float* scores, float* grads, int64_t stride, BF16* p_pairs,
                         BF16* ds_pairs, BF16* ds_rows) {
  const Simd::Exp2 exp2;
  const __m512 scale = _mm512_set1_ps(job.scaling * kLog2e);
  __m512 delta[2];
  for (int s = 0; s < 2; ++s) {
    const int64_t i = 2 * pair + s;
    float *x = scores + i * stride, *g = grads + i * stride;
    const __m512 minus = _mm512_set1_ps(i < seen.count ? -lse[i] * kLog2e : 0.0f);
    __m512 sum = Simd::zero();
    for (int64_t j = seen.from; j < seen.to; j += kSide) {
      const __mmask16 lanes = i < seen.count ? seen.lanes(i, j) : 0;
      const __m512 y = _mm512_fmadd_ps(_mm512_loadu_ps(x + j), scale, minus);
      const __m512 e = _mm512_maskz_mov_ps(lanes, exp2.value(y));
      sum = _mm512_mask3_fmadd_ps(e, _mm512_loadu_ps(g + j), sum, lanes);
      _mm512_storeu_ps(x + j, e);
    }
    delta[s] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
  }
  const __m512 factor = _mm512_set1_ps(job.scaling);
  const float *x0 = scores + 2 * pair * stride, *x1 = x0 + stride;
  const float *g0 = grads + 2 * pair * stride, *g1 = g0 + stride;
  BF16 *d0 = ds_rows + 2 * pair * stride, *d1 = d0 + stride;
  for (int64_t j = seen.from; j < seen.to; j += kSide) {
    const __m512 p0 = _mm512_loadu_ps(x0 + j), p1 = _mm512_loadu_ps(x1 + j);
    const int64_t at = j / kSide * kTileElements + pair * kDeep;
    _mm512_storeu_si512(p_pairs + at, joined((__m256i)_mm512_cvtneps_pbh(p0),
                                             (__m256i)_mm512_cvtneps_pbh(p1)));
    const __m256i e = score_gradient(p0, g0 + j, delta[0], factor);
    const __m256i o = score_gradient(p1, g1 + j, delta[1], factor);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d0 + j), e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d1 + j), o);
    _mm512_storeu_si512(ds_pairs + at, joined(e, o));
  }
}

// sums[token][dim] += turned[dim][key], for the keys of a sequence; sums begin at token `start`.
void add_turned(const Sequence& s, int64_t start, int64_t dim, const float* turned,
                int64_t stride, float* sums) {
  for (int64_t key = 0; key < s.keys(); key += kSide) {
    for (int64_t d = 0; d < dim; d += kSide) {
      Simd::F rows[kSide];
      for (int i = 0; i < kSide; ++i) rows[i] = _mm512_loadu_ps(turned + (d + i) * stride + key);
      Simd::transpose(rows);
      for (int i = 0; i < kSide && key + i < s.keys(); ++i) {
        float* to = sums + (s.token(key + i) - start) * dim + d;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), rows[i]));
      }
    }
  }
}

// Of the query heads of key head h. Gradients of keys and values are added to grad_k and grad_v,
// float [token][dim], which begin at token `start`.
void backward_sequence(const VarlenJob& job, const Sequence& s, int64_t h, int64_t start,
                       float* grad_k, float* grad_v, char* room) {
  Memory memory{room};
  const int64_t dim = job.dim, keys = padded_keys(s), stride = row_floats(s);
  const int64_t key_tiles = keys / kSide, dim_tiles = dim / kSide;
  BF16* k_across = memory.take<BF16>(keys * dim);
  BF16* v_across = memory.take<BF16>(keys * dim);
  BF16* k_pairs = memory.take<BF16>(keys * dim);
  BF16* copies = memory.take<BF16>(2 * kBlock * dim);
  BF16* q_turned = memory.take<BF16>(kQueries * dim);
  BF16* grad_turned = memory.take<BF16>(kQueries * dim);
  BF16* p_pairs = memory.take<BF16>(kQueries * keys);
  BF16* ds_pairs = memory.take<BF16>(kQueries * keys);
  BF16* ds_rows = memory.take<BF16>(kBlock * stride);
  float* scores = memory.take<float>(kBlock * stride);
  float* grads = memory.take<float>(kBlock * stride);
  float* sums = memory.take<float>(kBlock * kBlock);
  float* dk = memory.take<float>(dim * stride);  // [dim][key]
  float* dv = memory.take<float>(dim * stride);
  pack_across(job.k, h, s, keys, dim, k_across);
  pack_across(job.v, h, s, keys, dim, v_across);
  pack_pairs(job.k, h, s, keys, dim, k_pairs);
  std::memset(dk, 0, dim * stride * sizeof(float));
  std::memset(dv, 0, dim * stride * sizeof(float));
  float ones[kBlock];
  std::fill(ones, ones + kBlock, 1.0f);
  for (int64_t head = h * job.group; head < (h + 1) * job.group; ++head) {
    for (int64_t query = 0; query < s.own; query += kQueries) {
      int64_t from[kQueries / kBlock], to[kQueries / kBlock], blocks = 0;
      for (; blocks < kQueries / kBlock && query + blocks * kBlock < s.own; ++blocks) {
        const Seen seen(job, s, query + blocks * kBlock);
        from[blocks] = seen.from;
        to[blocks] = seen.to;
        const int64_t token = s.start + query + blocks * kBlock;
        const QueryRows q(job.q, head, token, seen.count, dim, copies);
        const QueryRows grad(job.grad, head, token, seen.count, dim, copies + kBlock * dim);
        scores_of(q, k_across, seen, dim, scores, stride);
        scores_of(grad, v_across, seen, dim, grads, stride);
        const int64_t at = blocks * key_tiles * kTileElements;
        for (int64_t pair = 0; pair < kSide; ++pair) {
          pair_of_rows(job, seen, pair, job.lse + head * job.tokens + token, scores, grads, stride,
                       p_pairs + at, ds_pairs + at, ds_rows);
        }
        for (int64_t d = 0; d < dim; d += kBlock) {
          const BF16* right = k_pairs + (seen.from / kDeep * dim_tiles + d / kSide) * kTileElements;
          block((seen.to - seen.from) / kDeep, ds_rows + seen.from,
                ds_rows + seen.from + kSide * stride, stride * sizeof(BF16), 64, right,
                right + kTileElements, dim_tiles * kTileElements, sums, kBlock, false);
          put_rows(sums, ones, job.grad_q, head, token, seen.count, d);
        }
        pack_turned(q.data, q.stride, dim, q_turned + blocks * kBlock * dim);
        pack_turned(grad.data, grad.stride, dim, grad_turned + blocks * kBlock * dim);
      }
      for (int64_t key = from[0]; key < to[blocks - 1]; key += kBlock) {
        int64_t first = 0, end = blocks;  // the blocks of queries that see it
        while (key >= to[first]) ++first;
        while (key < from[end - 1]) --end;
        for (int64_t d = 0; d < dim; d += kBlock) {
          const int64_t left = (first * dim_tiles + d / kSide) * kTileElements;
          const int64_t right = (first * key_tiles + key / kSide) * kTileElements;
          const int64_t next = key_tiles * kTileElements;
          const auto add = [&](const BF16* turned, const BF16* pairs, float* c) {
            block(end - first, turned + left, turned + left + kTileElements, 64,
                  dim_tiles * kTileElements * sizeof(BF16), pairs + right,
                  pairs + right + kTileElements, next, c + d * stride + key, stride, true);
          };
          add(grad_turned, p_pairs, dv);
          add(q_turned, ds_pairs, dk);
        }
      }
    }
  }
  add_turned(s, start, dim, dk, stride, grad_k);
  add_turned(s, start, dim, dv, stride, grad_v);
}

// The sequences [first, end) of a group, which begins at token `start` and has `tokens`.
void backward_group(const VarlenJob& job, const Sequence* first, const Sequence* end, int64_t h,
                    int64_t start, int64_t tokens, char* room) {
  const Tiles configured;
  Memory memory{room};
  float* grad_k = memory.take<float>(tokens * job.dim);
  float* grad_v = memory.take<float>(tokens * job.dim);
  std::memset(grad_k, 0, tokens * job.dim * sizeof(float));
  std::memset(grad_v, 0, tokens * job.dim * sizeof(float));
  for (const Sequence* s = first; s < end; ++s) {
    backward_sequence(job, *s, h, start, grad_k, grad_v, memory.at);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < job.dim; d += kDeep) {
      const auto put = [&](const float* sums, const HeadRows& rows) {
        const float* x = sums + t * job.dim + d;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + kSide),
                                                         _mm512_loadu_ps(x));
        _mm512_storeu_si512(rows.row(h, start + t) + d, both);
      };
      put(grad_k, job.grad_k);
      put(grad_v, job.grad_v);
    }
  }
}

constexpr AttentionKernel attention_kernel() {
  return {&forward_memory, &forward_sequence, &backward_memory, &backward_group};
}

}  // namespace
