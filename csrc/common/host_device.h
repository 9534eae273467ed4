// What lets one function serve a host compiler and nvcc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QADAPTER_HD __host__ __device__ __forceinline__
#define QADAPTER_UNROLL _Pragma("unroll")
#else
#define QADAPTER_HD inline
#define QADAPTER_UNROLL
#endif

namespace qadapter {

// A product and a sum that are rounded one by one on every compiler: nvcc would join them in one
// instruction where it likes, and the two streams would no longer cancel to the last bit.
QADAPTER_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

QADAPTER_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// 2^x: one instruction on a GPU, 2 units in the last place.
QADAPTER_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

QADAPTER_HD float neg_inf() { return -INFINITY; }
QADAPTER_HD float not_a_number() { return NAN; }

QADAPTER_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
#endif
}

QADAPTER_HD float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, 4);
  return x;
#endif
}

}  // namespace qadapter
