// The names of csrc/cuda/device.cuh on a host: a GPU's blocks, one after another, every thread a
// fiber. Barriers and shuffles hand over to the next fiber. This checks what kernels compute, not
// how fast; and that barriers are met by all, that 16-byte accesses are aligned, that shared memory
// is written before it is read (it starts as NaN). QADAPTER_EMULATOR_ORDER=0 runs the threads
// between two barriers upwards, 1 downwards, any other number in an order drawn from it: a kernel
// that lacks a barrier gives different results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define QADAPTER_SHARED(type, name, count) \
  static char name##_key;                  \
  type* const name = static_cast<type*>(   \
      ::qadapter::cuda::emulator::shared(&name##_key, sizeof(type) * (count)))

namespace qadapter {
namespace cuda {

using std::max;
using std::min;

namespace emulator {

struct Shared {
  const void* key;
  std::vector<char> bytes;
};

struct Block {
  int x, y, rank;
  std::vector<float> dynamic;
  std::vector<std::unique_ptr<Shared>> arrays;
  std::vector<uint64_t> slots;  // what lanes hand to each other
};

struct Launch {
  int64_t blocks_x;
  int blocks_y, threads, cluster;
  size_t shared_bytes;
  void (*body)(void*);
  void* arguments;
};

enum class Wait { none, warp, block, cluster, done };

struct Fiber {
  void* stack_pointer;
  Block* block;
  int thread;
  Wait wait;
};

extern Fiber* current;
extern const Launch* launched;

const char* run(const Launch& launch);
void wait_for(Wait what);
void* shared(const void* key, size_t bytes);
void* shared_of(int rank, const void* own);
void fault(const char* message);

template <class V>
V exchange(V value, int lane_from) {
  static_assert(sizeof(V) <= 8, "one slot per lane");
  const int lane = current->thread % 32, base = current->thread - lane;
  uint64_t* slots = current->block->slots.data() + base;
  memcpy(slots + lane, &value, sizeof(V));
  wait_for(Wait::warp);
  memcpy(&value, slots + lane_from, sizeof(V));
  wait_for(Wait::warp);
  return value;
}

}  // namespace emulator

inline int thread_index() { return emulator::current->thread; }
inline int block_size() { return emulator::launched->threads; }
inline int block_x() { return emulator::current->block->x; }
inline int block_y() { return emulator::current->block->y; }
inline int grid_y() { return emulator::launched->blocks_y; }
inline void block_barrier() { emulator::wait_for(emulator::Wait::block); }

template <class V>
V lane_xor(V value, int mask) {
  return emulator::exchange(value, (thread_index() % 32) ^ mask);
}
template <class V>
V lane_up(V value, int by) {
  const int lane = thread_index() % 32;
  return emulator::exchange(value, lane >= by ? lane - by : lane);
}
template <class V>
V lane_read(V value, int lane) {
  return emulator::exchange(value, lane);
}

template <class P>
P load_16(const P* from) {
  static_assert(sizeof(P) == 16, "one 128-bit load");
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fault("misaligned 16-byte load");
  P p;
  memcpy(&p, from, 16);
  return p;
}

template <class P>
P load_16_written(const P* from) {
  return load_16(from);
}

template <class P>
void store_16(P* to, const P& p) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fault("misaligned 16-byte store");
  memcpy(to, &p, 16);
}

inline void shared_add(uint64_t* to, uint64_t value) { *to += value; }

inline float* dynamic_shared() { return emulator::current->block->dynamic.data(); }

inline int cluster_rank() { return emulator::current->block->rank; }
inline int cluster_size() { return emulator::launched->cluster; }
inline void cluster_barrier() { emulator::wait_for(emulator::Wait::cluster); }
template <class V>
V* cluster_shared(V* own, int rank) {
  return static_cast<V*>(emulator::shared_of(rank, own));
}

template <class K>
bool has_clusters(K) {
  return true;
}

inline int processor_count() { return 132; }

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks_x, int blocks_y, int threads, int cluster,
                   size_t shared_bytes, void*, A... args) {
  auto body = [&] { kernel(args...); };
  using Body = decltype(body);
  emulator::Launch l = {blocks_x,     blocks_y, threads, cluster,
                        shared_bytes, [](void* b) { (*static_cast<Body*>(b))(); }, &body};
  return emulator::run(l);
}

}  // namespace cuda
}  // namespace qadapter
