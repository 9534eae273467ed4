// Q, soft value and log-probabilities of every row: one read of each logits tensor.
//
//   x_j = z_q[j] + m z_b[j], m = alpha_0 - center      shift = max_j x_j
//   log_sum = ln sum_j exp((x_j - shift) / alpha_tilde)
//   base_lse = max_b + ln sum_j exp(z_b[j] - max_b)    and what row_finish.h makes of them
//
// One block of 256 threads per row (fewer for a short one). Every thread keeps a running pair per
// stream, fed by whole 16-byte vectors, two of each stream in flight; they meet once, after the
// row. Where rows are too few to fill the GPU, several blocks share one and write their pairs, and
// a second kernel of one warp per row merges these. Which block reads what depends on the shape and
// the number of processors alone.
//
// Bytes per element: 4 in bf16/fp16, 8 in fp32 (half of it where the base row is not read), and 80
// or so per row. Floor at 3.0 TB/s for N = 8192, V = 128256, bf16: 1.40 ms. One exp2 per element
// and stream, and one per vector. Not measured on a GPU.

#include "cuda/residual_fwd.h"

#include "cuda/device.cuh"

namespace qadapter {
namespace cuda {
namespace {

constexpr int kThreads = 256, kInFlight = 2;
constexpr int kBlocksPerProcessor = 4, kMostSplits = 256;

template <class T, int MIX, bool SUM_BASE>
struct Row {
  static constexpr int kCount = Packed<T>::kCount;
  static constexpr bool kReadBase = SUM_BASE || MIX != kMixNone;
  const T *q, *base;
  float m, scale, base_scale;
  Pair x = empty_pair(), b = empty_pair();

  template <int N>
  __device__ __forceinline__ void take(float (&z_q)[N], const float (&z_b)[N]) {
    if (SUM_BASE) b = add_elements(b, z_b, base_scale);
  QADAPTER_UNROLL
    for (int i = 0; i < N; ++i) z_q[i] = mix_streams<MIX>(z_q[i], z_b[i], m);
    x = add_elements(x, z_q, scale);
  }

  // `N` vectors, the first at `vector`, the others each `step` further on.
  template <int N>
  __device__ __forceinline__ void vectors(const T* q_at, const T* base_at, int64_t vector,
                                          int step) {
    float z_q[N][kCount], z_b[N][kCount] = {};
  QADAPTER_UNROLL
    for (int i = 0; i < N; ++i) {
      load_packed(q_at + (vector + i * step) * kCount, z_q[i]);
      if (kReadBase) load_packed(base_at + (vector + i * step) * kCount, z_b[i]);
    }
  QADAPTER_UNROLL
    for (int i = 0; i < N; ++i) take(z_q[i], z_b[i]);
  }

  // kCount elements from `column` on, each `step` further on, up to `end`.
  __device__ __forceinline__ void elements(int64_t column, int step, int64_t end) {
    float z_q[kCount], z_b[kCount];
  QADAPTER_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = column + static_cast<int64_t>(i) * step;
      z_q[i] = at < end ? lowp::to_float(q[at]) : neg_inf();
      z_b[i] = kReadBase && at < end ? lowp::to_float(base[at]) : neg_inf();
    }
    take(z_q, z_b);
  }
};

__device__ __forceinline__ void write_row(const FwdArgs& a, int64_t row, Pair x, Pair base,
                                          float z_q, float z_b, float x_action) {
  RowKnown known;
  known.x = x, known.base = base;
  known.z_q = z_q, known.z_b = z_b, known.x_action = x_action;
  known.has_base = a.base != nullptr;
  known.has_lse = a.base_lse != nullptr;
  known.has_logp = a.base_logp != nullptr;
  known.base_lse = known.has_lse ? a.base_lse[row] : 0.0f;
  known.base_logp = known.has_logp ? a.base_logp[row] : 0.0f;
  const RowResult r = finish_row(known, a.actions[row], a.vocab, a.composition);
  a.q_out[row] = r.q;
  a.value[row] = r.value;
  a.base_logp_out[row] = r.base_logp;
  a.policy_logp[row] = r.policy_logp;
  a.base_lse_out[row] = r.base_lse;
  a.shift[row] = r.shift;
  a.log_sum[row] = r.log_sum;
}

template <class T, int MIX>
__device__ __forceinline__ void finish(const FwdArgs& a, int64_t row, Pair x, Pair base) {
  const int64_t action = a.actions[row];
  float z_q = 0.0f, z_b = 0.0f;
  if (action >= 0 && action < a.vocab) {
    z_q = lowp::to_float(static_cast<const T*>(a.q)[row * a.q_stride + action]);
    if (a.base) z_b = lowp::to_float(static_cast<const T*>(a.base)[row * a.base_stride + action]);
  }
  write_row(a, row, x, base, z_q, z_b, mix_streams<MIX>(z_q, z_b, a.m));
}

template <class T, int MIX, bool SUM_BASE>
__global__ void __launch_bounds__(kThreads) residual_fwd_kernel(const FwdArgs a) {
  QADAPTER_SHARED(Pair, slots, 2 * kThreads / kWarp);
  using R = Row<T, MIX, SUM_BASE>;
  const int64_t row = block_x();
  const int split = block_y(), splits = grid_y(), thread = thread_index(), threads = block_size();
  R r;
  r.q = static_cast<const T*>(a.q) + row * a.q_stride;
  r.base = R::kReadBase ? static_cast<const T*>(a.base) + row * a.base_stride : r.q;
  r.m = a.m, r.scale = a.scale, r.base_scale = a.base_scale;

  const RowShape shape = row_shape(a.vocab, r.q, r.base, r.q);
  const int first = split * a.vectors_per_split;
  const int last = min(shape.vectors, first + a.vectors_per_split);
  if (shape.together) {
    const T *q_at = r.q + shape.head, *base_at = r.base + shape.head;
    int vector = first + thread;
    for (; vector + (kInFlight - 1) * threads < last; vector += kInFlight * threads) {
      r.template vectors<kInFlight>(q_at, base_at, vector, threads);
    }
    for (; vector < last; vector += threads) r.template vectors<1>(q_at, base_at, vector, threads);
  } else {
    const int64_t end = static_cast<int64_t>(last) * R::kCount;
    int64_t column = static_cast<int64_t>(first) * R::kCount + thread;
    for (; column < end; column += R::kCount * threads) r.elements(column, threads, end);
  }
  if (split == 0 && thread < shape.head + shape.tail) {
    const int column = ragged_column(shape, a.vocab, thread);
    float z_q[1] = {lowp::to_float(r.q[column])};
    const float z_b[1] = {R::kReadBase ? lowp::to_float(r.base[column]) : 0.0f};
    r.take(z_q, z_b);
  }

  const Pair x = block_pair(r.x, a.scale, slots);
  const Pair b = SUM_BASE ? block_pair(r.b, a.base_scale, slots + kThreads / kWarp) : empty_pair();
  if (thread != 0) return;
  if (splits == 1) {
    finish<T, MIX>(a, row, x, b);
  } else {
    float* out = a.partial + (row * splits + split) * 4;
    out[0] = x.max, out[1] = x.sum, out[2] = b.max, out[3] = b.sum;
  }
}

// One warp per row: the pairs of its blocks -> its results.
template <class T, int MIX>
__global__ void __launch_bounds__(kWarp) residual_merge_kernel(const FwdArgs a, int splits) {
  const int64_t row = block_x();
  Pair x = empty_pair(), b = empty_pair();
  for (int split = thread_index(); split < splits; split += kWarp) {
    const float* in = a.partial + (row * splits + split) * 4;
    x = merge_pairs(x, {in[0], in[1]}, a.scale);
    b = merge_pairs(b, {in[2], in[3]}, a.base_scale);
  }
  x = warp_pair(x, a.scale);
  b = warp_pair(b, a.base_scale);
  if (thread_index() == 0) finish<T, MIX>(a, row, x, b);
}

int block_threads(int vectors) {
  int threads = kWarp;
  while (threads < kThreads && threads * kInFlight < vectors) threads *= 2;
  return threads;
}

template <class T, int MIX>
const char* run(const FwdArgs& a, int threads, int splits, void* stream) {
  const char* error;
  if (a.base_lse) {
    error = launch(residual_fwd_kernel<T, MIX, false>, a.rows, splits, threads, 1, 0, stream, a);
  } else {
    error = launch(residual_fwd_kernel<T, MIX, true>, a.rows, splits, threads, 1, 0, stream, a);
  }
  if (error || splits == 1) return error;
  return launch(residual_merge_kernel<T, MIX>, a.rows, 1, kWarp, 1, 0, stream, a, splits);
}

template <class T>
const char* run_mix(const FwdArgs& a, int threads, int splits, void* stream) {
  switch (mix_kind(a.m)) {
    case kMixNone:
      return run<T, kMixNone>(a, threads, splits, stream);
    case kMixPositive:
      return run<T, kMixPositive>(a, threads, splits, stream);
    default:
      return run<T, kMixNegative>(a, threads, splits, stream);
  }
}

}  // namespace

int fwd_splits(int64_t rows, int vocab, DType dtype, int wanted, int* vectors_per_split) {
  const int vectors = vocab / elements_per_vector(dtype), tile = kThreads * kInFlight;
  const int64_t processors = processor_count();
  int64_t splits = wanted;
  if (splits <= 0) {
    splits = 1;
    if (rows < 2 * processors) splits = (kBlocksPerProcessor * processors + rows - 1) / rows;
    if (splits > kMostSplits) splits = kMostSplits;
  }
  // Whole tiles each. A row that starts off a boundary has up to one vector less, never more.
  const int64_t tiles = (vectors + tile - 1) / tile;
  int64_t per_split = (tiles + splits - 1) / splits;
  if (per_split < 1) per_split = 1;
  *vectors_per_split = static_cast<int>(per_split) * tile;
  splits = (tiles + per_split - 1) / per_split;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

const char* launch_residual_fwd(const FwdArgs& a, DType dtype, int splits, void* stream) {
  const int threads = block_threads(a.vocab / elements_per_vector(dtype));
  if (dtype == DType::f32) return run_mix<float>(a, threads, splits, stream);
  if (dtype == DType::bf16) return run_mix<lowp::bf16>(a, threads, splits, stream);
  return run_mix<lowp::f16>(a, threads, splits, stream);
}

}  // namespace cuda
}  // namespace qadapter
