// What rms_norm.cpp and its vector code share.
#pragma once

#include "cpu/rows_linear.h"

namespace qadapter {

struct NormJob {
  RowView x, grad;  // grad: backward only
  char* out;        // y, or the gradient of x; dense rows
  const void* weight;
  int64_t columns;
  float eps;
};

// Rows [first, end).
using NormRows = void (*)(const NormJob&, int64_t first, int64_t end);

struct NormTable {
  NormRows fwd, bwd;
};

// The code for float32 or bfloat16; isa as elsewhere.
const NormTable& norm_for(int64_t isa, DType dtype);

}  // namespace qadapter
