// The storage types of logits, without any vendor's headers: conversions to and from float.
#pragma once

#include "common/host_device.h"

namespace qadapter {
namespace lowp {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

QADAPTER_HD float to_float(float x) { return x; }

QADAPTER_HD float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

QADAPTER_HD float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // A subnormal half is its integer times 2^-24, exactly.
  if (rest < 0x400u) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
#endif
}

// Rounded to nearest, ties to even.
template <class T>
QADAPTER_HD T from_float(float x);

template <>
QADAPTER_HD float from_float<float>(float x) {
  return x;
}

template <>
QADAPTER_HD bf16 from_float<bf16>(float x) {
#ifdef __CUDA_ARCH__
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return {y};
#else
  const uint32_t u = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

template <>
QADAPTER_HD f16 from_float<f16>(float x) {
#ifdef __CUDA_ARCH__
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return {y};
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, size = bits_of(x) & 0x7fffffffu;
  uint32_t out;
  if (x != x) {
    out = 0x7fffu;
  } else if (size >= 0x477ff000u) {  // from 65520 on
    out = 0x7c00u;
  } else if (size < (113u << 23)) {
    // Adding 1/2 rounds at 2^-24 and leaves the subnormal half in the low bits.
    out = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
  } else {
    out = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | out)};
#endif
}

}  // namespace lowp
}  // namespace qadapter
