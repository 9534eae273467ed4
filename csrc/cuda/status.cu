// Asks the driver whether kernels that were compiled here run on a device.

#include "cuda/status.h"

#include <cuda_runtime.h>

namespace qadapter {
namespace cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string unusable_reason(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (device < 0 || device >= count) return "no such device";
  int before = 0;
  cudaGetDevice(&before);
  cudaFuncAttributes attributes;
  error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // what was found is reported here, not by the next launch
  cudaSetDevice(before);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace qadapter
