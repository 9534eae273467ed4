// The sampler's one pass over the logits: maximum and sum of every group of 256 tokens.
//
//   x_j   = z_q[j] + base_weight z_b[j]      max_g = max_{j in g} x_j
//   sum_g = sum_{j in g} exp2((x_j - max_g) scale log2 e)
//
// One warp per group, 8 neighbouring tokens a lane: one 16-byte load per stream in 16 bits, two in
// float32. Sums are relative to their group's own maximum, so no block waits for another; a NaN or
// +inf stays in its group's sum.
//
// Bytes: 4 V per row for two 16-bit streams, and V / 32 written. B = 64, V = 128256: 32.8 MB, floor
// 11 us at 3.0 TB/s. Numbers for all rows come by value: QF.sample fills in none, and these two kernels
// are all of its launches. Not measured on a GPU.

#include "cuda/sample_row.cuh"

namespace qadapter {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) sample_blocks_kernel(const SampleArgs a) {
  const int64_t row = block_x();
  const int group = block_y() * (kThreads / kWarp) + thread_index() / kWarp;
  if (group >= a.groups) return;  // whole warps
  const SampleRow<T> r(a, row);
  float x[kPerLane];
  r.tokens(group, x);
  float max = neg_inf();
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) max = fmaxf(max, x[i]);
  QADAPTER_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) max = fmaxf(max, lane_xor(max, step));
  const float origin = origin_of(max);
  float sum = 0.0f;
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    sum = add(sum, exp2_fast(mul(add(x[i], -origin), r.scale2)));
  }
  QADAPTER_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) sum = add(sum, lane_xor(sum, step));
  if (thread_index() % kWarp == 0) {
    a.group_max[row * a.groups + group] = max;
    a.group_sum[row * a.groups + group] = sum;
  }
}

template <class T>
const char* run(const SampleArgs& a, void* stream) {
  const int per_block = kThreads / kWarp, blocks = (a.groups + per_block - 1) / per_block;
  return launch(sample_blocks_kernel<T>, a.batch, blocks, kThreads, 1, 0, stream, a);
}

}  // namespace

const char* launch_sample_blocks(const SampleArgs& a, DType dtype, void* stream) {
  if (dtype == DType::f32) return run<float>(a, stream);
  if (dtype == DType::bf16) return run<lowp::bf16>(a, stream);
  return run<lowp::f16>(a, stream);
}

}  // namespace cuda
}  // namespace qadapter
