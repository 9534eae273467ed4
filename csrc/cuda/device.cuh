// What the kernels use of CUDA: threads, barriers, shuffles, shared memory, launches. Everything
// they touch is named here, so that tests can compile the same kernels for a host, where every
// thread is a fiber (tests/csrc/cuda/emulator.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/lowp.h"
#include "common/online.h"

#ifdef QADAPTER_EMULATED
#include "emulator.h"
#else
#include "cuda/runtime.cuh"
#endif

namespace qadapter {
namespace cuda {

constexpr int kWarp = 32;

// 16 bytes, one load or store.
template <class T>
struct alignas(16) Packed {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

template <class T>
__device__ __forceinline__ void load_packed(const T* from, float (&x)[Packed<T>::kCount]) {
  const Packed<T> p = load_16(reinterpret_cast<const Packed<T>*>(from));
  QADAPTER_UNROLL
  for (int i = 0; i < Packed<T>::kCount; ++i) x[i] = lowp::to_float(p.at[i]);
}

template <class T>
__device__ __forceinline__ void store_packed(T* to, const float (&x)[Packed<T>::kCount]) {
  Packed<T> p;
  QADAPTER_UNROLL
  for (int i = 0; i < Packed<T>::kCount; ++i) p.at[i] = lowp::from_float<T>(x[i]);
  store_16(reinterpret_cast<Packed<T>*>(to), p);
}

// A row in whole 16-byte vectors and what lies around them: `head` elements before the first
// common boundary of all streams. Streams that are off against each other have none: `together`
// is false, and elements are taken one by one.
struct RowShape {
  bool together;
  int head, vectors, tail;
};

template <class T>
__device__ __forceinline__ RowShape row_shape(int vocab, const T* a, const T* b, const T* c) {
  constexpr int kCount = Packed<T>::kCount;
  const auto off = [](const T* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); };
  RowShape s;
  s.together = off(a) == off(b) && off(a) == off(c);
  s.head = s.together && off(a) ? static_cast<int>((16 - off(a)) / sizeof(T)) : 0;
  if (s.head > vocab) s.head = vocab;
  s.vectors = (vocab - s.head) / kCount;
  s.tail = vocab - s.head - s.vectors * kCount;
  return s;
}

// Column of the i-th element outside the vectors, i < head + tail.
__device__ __forceinline__ int ragged_column(const RowShape& s, int vocab, int i) {
  return i < s.head ? i : vocab - s.tail + (i - s.head);
}

// Lane 0 has the pair of its warp.
__device__ __forceinline__ Pair warp_pair(Pair p, float scale) {
  QADAPTER_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Pair other = {lane_xor(p.max, step), lane_xor(p.sum, step)};
    p = merge_pairs(p, other, scale);
  }
  return p;
}

// Thread 0 has the pair of its block. `slots`: shared, one per warp; every thread calls.
__device__ __forceinline__ Pair block_pair(Pair p, float scale, Pair* slots) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  p = warp_pair(p, scale);
  if (lane == 0) slots[warp] = p;
  block_barrier();
  if (warp == 0) {
    const int warps = (block_size() + kWarp - 1) / kWarp;
    p = warp_pair(lane < warps ? slots[lane] : empty_pair(), scale);
  }
  return p;
}

}  // namespace cuda
}  // namespace qadapter
