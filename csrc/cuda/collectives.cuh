// Sums, maxima and running sums over a block. Every thread calls; `slots` is shared memory with an
// element per warp, free for the next call when this one returns.
#pragma once

#include "cuda/device.cuh"

namespace qadapter {
namespace cuda {

// What all threads' values make together, to every thread.
template <class V, class Op>
__device__ __forceinline__ V block_all(V value, V nothing, Op op, V* slots) {
  QADAPTER_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) value = op(value, lane_xor(value, step));
  const int lane = thread_index() % kWarp, warps = block_size() / kWarp;
  if (lane == 0) slots[thread_index() / kWarp] = value;
  block_barrier();
  value = lane < warps ? slots[lane] : nothing;
  QADAPTER_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) value = op(value, lane_xor(value, step));
  block_barrier();
  return value;
}

template <class V>
__device__ __forceinline__ V block_sum(V value, V* slots) {
  return block_all(value, V{0}, [](V a, V b) { return a + b; }, slots);
}

// The sum over this and all lower lanes.
template <class V>
__device__ __forceinline__ V warp_running(V value) {
  const int lane = thread_index() % kWarp;
  QADAPTER_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const V below = lane_up(value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// The sum over this and all lower threads.
template <class V>
__device__ __forceinline__ V block_running(V value, V* slots) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  value = warp_running(value);
  if (lane == kWarp - 1) slots[warp] = value;
  block_barrier();
  const V sums = warp_running(lane < block_size() / kWarp ? slots[lane] : V{0});
  const V before = lane_read(sums, warp > 0 ? warp - 1 : 0);
  block_barrier();
  return warp > 0 ? value + before : value;
}

}  // namespace cuda
}  // namespace qadapter
