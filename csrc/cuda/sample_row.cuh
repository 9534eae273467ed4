// Shared by the sampler's kernels: a row's scalars, its tokens by groups, the end of a draw.
//
// A row is cut into groups of 256 tokens counted from its first, one warp each, 8 neighbouring
// tokens a lane. What is added up together never depends on where in memory a row lies: only how
// wide it is read does.
#pragma once

#include "common/philox.h"
#include "common/sampling.h"
#include "cuda/collectives.cuh"
#include "cuda/sample.h"

namespace qadapter {
namespace cuda {

constexpr int kPerLane = kSampleGroup / kWarp;

template <class T>
struct SampleRow {
  const T *q, *base;  // base is null where it has no weight
  float weight, scale2;
  double scale;
  int vocab;
  bool legal;

  __device__ __forceinline__ SampleRow(const SampleArgs& a, int64_t row) {
    scale = a.scale ? a.scale[row * a.scale_step] : a.scale_value;
    const double w = a.weight ? a.weight[row * a.weight_step] : a.weight_value;
    legal = scale > 0.0 && scale < INFINITY && w - w == 0.0;
    scale2 = scale_in_log2(scale);
    weight = static_cast<float>(w);
    q = static_cast<const T*>(a.q) + row * a.q_stride;
    base = a.base && w != 0.0 ? static_cast<const T*>(a.base) + row * a.base_stride : nullptr;
    vocab = a.vocab;
  }

  // 8 elements, -inf beyond the row; in 16-byte loads where the address allows it.
  __device__ __forceinline__ void read(const T* from, int first, float (&x)[kPerLane]) const {
    constexpr int kCount = Packed<T>::kCount;
    const T* at = from + first;
    if (first + kPerLane <= vocab && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
      QADAPTER_UNROLL
      for (int i = 0; i < kPerLane / kCount; ++i) {
        float part[kCount];
        load_packed(at + i * kCount, part);
        QADAPTER_UNROLL
        for (int k = 0; k < kCount; ++k) x[i * kCount + k] = part[k];
      }
    } else {
      QADAPTER_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        x[i] = first + i < vocab ? lowp::to_float(at[i]) : neg_inf();
      }
    }
  }

  // The 8 tokens of this lane in a group.
  __device__ __forceinline__ void tokens(int group, float (&x)[kPerLane]) const {
    const int first = group * kSampleGroup + thread_index() % kWarp * kPerLane;
    read(q, first, x);
    if (base == nullptr) return;
    float z_b[kPerLane];
    read(base, first, z_b);
    QADAPTER_UNROLL
    for (int i = 0; i < kPerLane; ++i) x[i] = compose(x[i], z_b[i], weight);
  }
};

__device__ __forceinline__ double row_uniform(const SampleArgs& a, int64_t row) {
  const int64_t seed = a.seed ? a.seed[a.shared_seed ? 0 : row] : a.seed_value;
  const uint64_t key = a.shared_seed ? philox_row_key(static_cast<uint64_t>(seed), row)
                                     : static_cast<uint64_t>(seed);
  const int64_t position = a.position ? a.position[row * a.position_step] : a.position_value;
  return philox_uniform(key, static_cast<uint64_t>(position));
}

__device__ __forceinline__ void write_nothing(const SampleArgs& a, int64_t row) {
  a.tokens[row] = -1;
  a.logprobs[row] = not_a_number();
}

__device__ __forceinline__ void write_token(const SampleArgs& a, int64_t row, int token, float x,
                                            float max, double scale, double total) {
  a.tokens[row] = token;
  const double distance = static_cast<double>(x) - max;
  a.logprobs[row] = static_cast<float>(distance * scale - log(total));
}

// Over a row's groups: its maximum (NaN where the row is poisoned), and the first group that has
// it. Every thread of the block gets both.
__device__ __forceinline__ float row_maximum(const SampleArgs& a, int64_t row, int* first_group,
                                             float* slots, int* int_slots) {
  const float* group_max = a.group_max + row * a.groups;
  const float* group_sum = a.group_sum + row * a.groups;
  float max = neg_inf();
  int broken = 0, first = a.groups;
  for (int group = thread_index(); group < a.groups; group += block_size()) {
    max = fmaxf(max, group_max[group]);
    broken |= group_sum[group] != group_sum[group];
  }
  max = block_all(max, neg_inf(), [](float x, float y) { return fmaxf(x, y); }, slots);
  broken = block_sum(broken, int_slots);
  for (int group = thread_index(); group < a.groups; group += block_size()) {
    if (group_max[group] == max) first = min(first, group);
  }
  *first_group = block_all(first, a.groups, [](int x, int y) { return min(x, y); }, int_slots);
  return broken || !(max > neg_inf()) ? not_a_number() : max;
}

// In one warp: the first of the group's tokens at which the running mass exceeds the threshold is
// written. `mass` is that of this lane's tokens; the threshold is below their sum over the warp.
__device__ __forceinline__ void draw_in_group(const SampleArgs& a, int64_t row, int group,
                                              const float (&x)[kPerLane],
                                              const uint64_t (&mass)[kPerLane],
                                              uint64_t threshold, float max, double scale,
                                              double total) {
  uint64_t sum = 0;
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) sum += mass[i];
  uint64_t before = warp_running(sum) - sum;
  if (before > threshold || before + sum <= threshold) return;
  QADAPTER_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    if (before <= threshold && before + mass[i] > threshold) {
      const int lane = thread_index() % kWarp;
      write_token(a, row, group * kSampleGroup + lane * kPerLane + i, x[i], max, scale, total);
    }
    before += mass[i];
  }
}

// In one warp: the group's first token with x == max is written.
__device__ __forceinline__ void take_maximum(const SampleArgs& a, int64_t row, int group,
                                             const float (&x)[kPerLane], float max, double scale,
                                             double total) {
  const int lane = thread_index() % kWarp;
  int first = kSampleGroup;
  QADAPTER_UNROLL
  for (int i = kPerLane - 1; i >= 0; --i) {
    if (x[i] == max) first = lane * kPerLane + i;
  }
  int best = first;
  QADAPTER_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) best = min(best, lane_xor(best, step));
  if (first == best && first < kSampleGroup) {
    write_token(a, row, group * kSampleGroup + best, max, max, scale, total);
  }
}

}  // namespace cuda
}  // namespace qadapter
