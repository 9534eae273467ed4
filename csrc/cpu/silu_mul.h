// What silu_mul.cpp and its vector code share.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qadapter {

struct SiluJob {
  const void *gate, *up, *grad;  // grad: backward only
  void *out, *d_up;              // the product; or the gradients of gate and up
};

// Elements [first, end).
using SiluElements = void (*)(const SiluJob&, int64_t first, int64_t end);

struct SiluTable {
  SiluElements fwd, bwd;
};

// The code for float32 or bfloat16; isa as elsewhere.
const SiluTable& silu_for(int64_t isa, DType dtype);

}  // namespace qadapter
