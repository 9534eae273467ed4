// What rotary.cpp and its vector code share.
#pragma once

#include "cpu/rows_linear.h"

namespace qadapter {

// Rows x [B, H, T] of D elements, and the rows of cos and sin [1 or B, T] that they meet.
struct RotaryJob {
  const char* x;
  int64_t x_strides[3];  // bytes, over B, H, T
  char* out;
  int64_t out_strides[3];
  const char *cos, *sin;
  int64_t cos_strides[2], sin_strides[2];  // bytes, over B, T
  int64_t heads, tokens, half;             // D = 2 half
  float one = 1.0f;
};

// Rows [first, end) of B T H.
using RotaryRows = void (*)(const RotaryJob&, int64_t first, int64_t end);

struct RotaryTable {
  RotaryRows fwd, bwd;
};

// The code for float32 or bfloat16; isa as elsewhere.
const RotaryTable& rotary_for(int64_t isa, DType dtype);

}  // namespace qadapter
