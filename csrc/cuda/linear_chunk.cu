// One chunk of head products: float32 rows of h W^T in, row statistics and low-precision p out.
//
//   z = head.h of the product        x = z_q + m z_b
//   (shift, log_sum) of x / alpha_tilde, those of z_b, and what the action's column holds
//   p_j = exp2((x_j - shift) scale) slope_j / sum, the action's column 0
//
// p is written into the row it comes from: with 16 bits the upper half of its 4 * stride bytes, so
// the row stride of p is twice that of the chunk.
//
// linear_cluster_kernel (sm_90 and later): a row is shared by a cluster of up to 8 blocks. Each
// reads its slice once and keeps x in shared memory (and the slopes of a soft-capped head). The
// blocks' pairs meet through distributed shared memory. The cluster's barrier before that also lies
// between the last load and the first store: p of one block lands on columns that another one owns.
// A second barrier keeps every block alive until its pair has been read.
//
// linear_loop_kernel (sm_80, and rows that do not fit): one block per row, which reads it twice. The
// second sweep goes from the last tile to the first: p of columns [c, c + T) lies where the float
// columns stride / 2 + c / 2 >= c are, on tiles read before or on the tile in hand. A barrier
// between a tile's loads and its stores is all this takes.
//
// Bytes per element: 4 + 2 (16-bit p) with clusters, 4 + 4 + 2 without, of which the second read
// hits L2 in part. Two streams: 10 and 18. At 3.0 TB/s and V = 128256 a chunk of 2048 rows takes
// 0.53 ms for 6 bytes, 0.88 ms for 10. Not measured on a GPU.

#include "cuda/linear_chunk.h"

#include "common/row_finish.h"
#include "cuda/device.cuh"

namespace qadapter {
namespace cuda {
namespace {

constexpr int kThreads = 512;
constexpr size_t kSeveralPerProcessor = 75 << 10, kMostShared = 227 << 10;

// Two streams always mix by the rule for m < 0: that for m > 0 only saves instructions.
template <bool CAPPED, bool TWO>
struct ChunkRow {
  const ChunkArgs& a;
  const float *z, *base_z;
  int64_t action;
  bool inside;
  Pair x_pair = empty_pair(), base_pair = empty_pair();

  __device__ __forceinline__ ChunkRow(const ChunkArgs& args, int64_t row) : a(args) {
    z = a.z + row * a.stride;
    base_z = TWO ? a.base_z + row * a.stride : z;
    action = a.actions[row];
    inside = action >= 0 && action < a.vocab;
  }

  // x of 8 columns, -inf for the padding; their slopes.
  __device__ __forceinline__ void unit(int column, bool sum, float (&x)[kUnit],
                                       float (&slope)[kUnit]) {
    float z_b[kUnit], bias[kUnit];
    read(z + column, x);
    if (TWO) read(base_z + column, z_b);
    if (a.bias) read(a.bias + column, bias);
    QADAPTER_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      const float b = a.bias ? bias[i] : 0.0f;
      const Logit logit = head_logit<CAPPED>(x[i], b, a.head);
      const bool token = column + i < a.vocab;
      x[i] = token ? logit.z : neg_inf();
      slope[i] = logit.slope;
      if (TWO) {
        z_b[i] = token ? head_logit<CAPPED>(z_b[i], b, a.head).z : neg_inf();
        x[i] = mix_streams<kMixNegative>(x[i], z_b[i], a.m);
      }
    }
    if (!sum) return;
    x_pair = add_elements(x_pair, x, a.scale);
    if (TWO && a.sum_base) base_pair = add_elements(base_pair, z_b, a.base_scale);
  }

  // Not through the read-only path: the row is written later on.
  static __device__ __forceinline__ void read(const float* from, float (&x)[kUnit]) {
    QADAPTER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Packed<float> p = load_16_written(reinterpret_cast<const Packed<float>*>(from) + half);
      QADAPTER_UNROLL
      for (int i = 0; i < 4; ++i) x[half * 4 + i] = p.at[i];
    }
  }

  // What the action's column holds; before p is written over it.
  __device__ __forceinline__ void write_action(int64_t row) const {
    const int64_t column = inside ? action : 0;
    const float bias = a.bias ? a.bias[column] : 0.0f;
    const Logit logit = head_logit<CAPPED>(z[column], bias, a.head);
    float* out = a.statistics + row;
    float x = logit.z;
    if (TWO) {
      const float z_b = head_logit<CAPPED>(base_z[column], bias, a.head).z;
      x = mix_streams<kMixNegative>(x, z_b, a.m);
      out[(kBaseRow + kZAction) * a.statistics_stride] = z_b;
    }
    out[kXAction * a.statistics_stride] = x;
    out[kZAction * a.statistics_stride] = logit.z;
    out[kSlope * a.statistics_stride] = logit.slope;
  }

  __device__ __forceinline__ void write_sums(int64_t row, Pair x, Pair base) const {
    float* out = a.statistics + row;
    const RowSum s = row_sum(x, 1.0);
    out[kShift * a.statistics_stride] = s.shift;
    out[kLogSum * a.statistics_stride] = static_cast<float>(s.log_sum);
    if (TWO && a.sum_base) {
      const RowSum b = row_sum(base, 1.0);
      out[(kBaseRow + kShift) * a.statistics_stride] = b.shift;
      out[(kBaseRow + kLogSum) * a.statistics_stride] = static_cast<float>(b.log_sum);
    }
  }

  template <class P>
  __device__ __forceinline__ void write_unit(P* p_row, int column, const float (&x)[kUnit],
                                             const float (&slope)[kUnit], Pair total) const {
    constexpr int kCount = Packed<P>::kCount;
    const float origin = origin_of(total.max), share = 1.0f / total.sum;
    const int64_t held_out = inside ? action - column : -1;
    QADAPTER_UNROLL
    for (int part = 0; part < kUnit / kCount; ++part) {
      float p[kCount];
      QADAPTER_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const int k = part * kCount + i;
        p[i] = k == held_out ? 0.0f : row_weight(x[k], slope[k], origin, a.scale, share);
      }
      store_packed(p_row + column + part * kCount, p);
    }
  }
};

template <class P, bool CAPPED, bool TWO>
__global__ void __launch_bounds__(kThreads, 1) linear_cluster_kernel(const ChunkArgs a) {
  QADAPTER_SHARED(Pair, slots, kThreads / kWarp);
  QADAPTER_SHARED(Pair, mine, 2);    // of this block's slice; the cluster reads it
  QADAPTER_SHARED(Pair, totals, 2);  // of the row
  const int64_t row = block_x();
  const int thread = thread_index(), threads = block_size();
  const int units = (a.vocab + kUnit - 1) / kUnit, first = cluster_rank() * a.units_per_block;
  const int count = min(a.units_per_block, units - first);  // may be 0 or less
  ChunkRow<CAPPED, TWO> r(a, row);

  // Four columns of a unit in one plane, four in the next: neighbours in a warp then take
  // neighbouring 16 bytes of shared memory.
  Packed<float>* kept = reinterpret_cast<Packed<float>*>(dynamic_shared());
  const int plane = a.units_per_block;
  for (int unit = thread; unit < count; unit += threads) {
    float x[kUnit], slope[kUnit];
    r.unit((first + unit) * kUnit, true, x, slope);
    if (a.p == nullptr) continue;
    QADAPTER_UNROLL
    for (int half = 0; half < 2; ++half) {
      Packed<float> part, slopes;
      QADAPTER_UNROLL
      for (int i = 0; i < 4; ++i) part.at[i] = x[half * 4 + i], slopes.at[i] = slope[half * 4 + i];
      kept[half * plane + unit] = part;
      if (CAPPED) kept[(2 + half) * plane + unit] = slopes;
    }
  }
  if (thread == 0 && cluster_rank() == 0) r.write_action(row);

  Pair x = block_pair(r.x_pair, a.scale, slots);
  block_barrier();
  Pair base = block_pair(r.base_pair, a.base_scale, slots);
  if (thread == 0) mine[0] = x, mine[1] = base;
  cluster_barrier();
  if (thread < kWarp) {
    const bool exists = thread < cluster_size();
    x = exists ? cluster_shared(mine, thread)[0] : empty_pair();
    base = exists ? cluster_shared(mine, thread)[1] : empty_pair();
    x = warp_pair(x, a.scale);
    base = warp_pair(base, a.base_scale);
    if (thread == 0) totals[0] = x, totals[1] = base;
  }
  cluster_barrier();
  if (thread == 0 && cluster_rank() == 0) r.write_sums(row, totals[0], totals[1]);
  if (a.p == nullptr) return;

  const Pair total = totals[0];
  P* p_row = static_cast<P*>(a.p) + row * a.p_stride;
  for (int unit = thread; unit < count; unit += threads) {
    float values[kUnit], slope[kUnit];
    QADAPTER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Packed<float> part = kept[half * plane + unit];
      QADAPTER_UNROLL
      for (int i = 0; i < 4; ++i) {
        values[half * 4 + i] = part.at[i];
        slope[half * 4 + i] = a.head.logit_scale;
      }
      if (!CAPPED) continue;
      const Packed<float> slopes = kept[(2 + half) * plane + unit];
      QADAPTER_UNROLL
      for (int i = 0; i < 4; ++i) slope[half * 4 + i] = slopes.at[i];
    }
    r.write_unit(p_row, (first + unit) * kUnit, values, slope, total);
  }
}

template <class P, bool CAPPED, bool TWO>
__global__ void __launch_bounds__(kThreads, 1) linear_loop_kernel(const ChunkArgs a) {
  QADAPTER_SHARED(Pair, slots, kThreads / kWarp);
  QADAPTER_SHARED(Pair, totals, 1);
  const int64_t row = block_x();
  const int thread = thread_index(), threads = block_size();
  const int units = (a.vocab + kUnit - 1) / kUnit;
  ChunkRow<CAPPED, TWO> r(a, row);
  float x[kUnit], slope[kUnit];
  for (int unit = thread; unit < units; unit += threads) r.unit(unit * kUnit, true, x, slope);
  if (thread == 0) r.write_action(row);
  const Pair sum = block_pair(r.x_pair, a.scale, slots);
  block_barrier();
  const Pair base = block_pair(r.base_pair, a.base_scale, slots);
  if (thread == 0) {
    r.write_sums(row, sum, base);
    totals[0] = sum;
  }
  block_barrier();  // also: the action's column has been read
  if (a.p == nullptr) return;

  const Pair total = totals[0];
  P* p_row = static_cast<P*>(a.p) + row * a.p_stride;
  for (int tile = (units - 1) / threads; tile >= 0; --tile) {
    const int unit = tile * threads + thread;
    if (unit < units) r.unit(unit * kUnit, false, x, slope);
    if (sizeof(P) < 4) block_barrier();  // this tile's loads, in every warp, before its stores
    if (unit < units) r.write_unit(p_row, unit * kUnit, x, slope, total);
  }
}

size_t shared_bytes(const ChunkArgs& a, int units_per_block) {
  const bool capped = a.head.softcap != 0.0f;
  return a.p ? static_cast<size_t>(units_per_block) * kUnit * 4 * (capped ? 2 : 1) : 0;
}

template <class P, bool CAPPED, bool TWO>
const char* run(const ChunkArgs& a, int cluster, void* stream) {
  int threads = kWarp;
  const int units = cluster ? a.units_per_block : (a.vocab + kUnit - 1) / kUnit;
  while (threads < kThreads && threads < units) threads *= 2;
  if (cluster == 0) {
    return launch(linear_loop_kernel<P, CAPPED, TWO>, a.rows, 1, threads, 1, 0, stream, a);
  }
  return launch(linear_cluster_kernel<P, CAPPED, TWO>, a.rows, cluster, threads, cluster,
                shared_bytes(a, a.units_per_block), stream, a);
}

template <class P>
const char* run_head(const ChunkArgs& a, int cluster, void* stream) {
  const bool capped = a.head.softcap != 0.0f, two = a.base_z != nullptr;
  if (capped && two) return run<P, true, true>(a, cluster, stream);
  if (capped) return run<P, true, false>(a, cluster, stream);
  if (two) return run<P, false, true>(a, cluster, stream);
  return run<P, false, false>(a, cluster, stream);
}

}  // namespace

int chunk_cluster(const ChunkArgs& a, int wanted, int* units_per_block) {
  const int units = (a.vocab + kUnit - 1) / kUnit;
  const auto part = [&](int blocks) { return (units + blocks - 1) / blocks; };
  int cluster = wanted;
  if (wanted < 0) {
    cluster = 0;
    if (has_clusters(linear_cluster_kernel<float, false, false>)) {
      // The fewest blocks of which a processor holds more than one; else the most that there are.
      cluster = 1;
      while (cluster < 8 && shared_bytes(a, part(cluster)) > kSeveralPerProcessor) cluster *= 2;
      if (shared_bytes(a, part(cluster)) > kMostShared) cluster = 0;
    }
  }
  *units_per_block = cluster ? part(cluster) : 0;
  return cluster;
}

const char* launch_linear_chunk(const ChunkArgs& a, DType p_dtype, int cluster, void* stream) {
  if (p_dtype == DType::f32) return run_head<float>(a, cluster, stream);
  if (p_dtype == DType::bf16) return run_head<lowp::bf16>(a, cluster, stream);
  return run_head<lowp::f16>(a, cluster, stream);
}

}  // namespace cuda
}  // namespace qadapter
