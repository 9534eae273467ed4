// The names of device.cuh on a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#define QADAPTER_SHARED(type, name, count) __shared__ type name[count]

namespace qadapter {
namespace cuda {

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int block_size() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int grid_y() { return gridDim.y; }

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

template <class V>
__device__ __forceinline__ V lane_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class V>
__device__ __forceinline__ V lane_up(V value, int by) {
  return __shfl_up_sync(0xffffffffu, value, by);
}
template <class V>
__device__ __forceinline__ V lane_read(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <class P>
__device__ __forceinline__ P load_16(const P* from) {
  static_assert(sizeof(P) == 16, "one 128-bit load");
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
  P p;
  memcpy(&p, &raw, 16);
  return p;
}

// Of memory that the same kernel writes: not through the read-only path.
template <class P>
__device__ __forceinline__ P load_16_written(const P* from) {
  static_assert(sizeof(P) == 16, "one 128-bit load");
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  P p;
  memcpy(&p, &raw, 16);
  return p;
}

template <class P>
__device__ __forceinline__ void store_16(P* to, const P& p) {
  uint4 raw;
  memcpy(&raw, &p, 16);
  *reinterpret_cast<uint4*>(to) = raw;
}

// Only integers, whose sums do not depend on the order.
__device__ __forceinline__ void shared_add(uint64_t* to, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

__device__ __forceinline__ float* dynamic_shared() {
  extern __shared__ float4 qadapter_dynamic_shared[];
  return reinterpret_cast<float*>(qadapter_dynamic_shared);
}

// Blocks of a cluster, from sm_90 on; before that every block is one alone.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
__device__ __forceinline__ int cluster_size() {
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
}
__device__ __forceinline__ void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
template <class V>
__device__ __forceinline__ V* cluster_shared(V* own, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
template <class V>
__device__ __forceinline__ V* cluster_shared(V* own, int) {
  return own;
}
#endif

// Whether the kernel that this device would run was compiled for a target that has clusters.
template <class K>
bool has_clusters(K kernel) {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

inline int processor_count() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// blocks_x x blocks_y blocks of `threads`, `cluster` of them along y at a time. Null, or an error.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks_x, int blocks_y, int threads, int cluster,
                   size_t shared_bytes, void* stream, A... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, static_cast<unsigned>(cluster), 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace qadapter
