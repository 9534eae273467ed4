// What linear_fwd.cpp and its vector code share.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cpu/residual_fwd.h"
#include "cpu/types.h"

namespace qadapter {

struct Matrix {
  const char* data = nullptr;
  int64_t stride = 0;  // elements
  DType dtype = DType::f32;

  const char* row(int64_t i) const { return data + i * stride * (dtype == DType::f32 ? 4 : 2); }
};

// One call of the op, as the vector code sees it.
struct LinearJob {
  Matrix q, base, weight;  // base.data may be null
  int64_t vocab, dim;
  const int64_t* actions;
  const float* bias;  // or null
  float m, bias_factor, scale, cap, x_scale;
  Mix mix;
  bool merged;      // one product with h_q + m h_b
  bool two;         // products of both streams
  bool base_sum;    // statistics of the base stream
  bool action_dot;  // the action's logits of q and base by products of their own
  bool need_grad;
};

// What the walk over the vocabulary leaves of a row.
struct LinearRow {
  Partial x, base;
  float z_q, z_b, x_a, slope;  // at the action
};

// Memory of one thread, in floats, for blocks of at most `rows` rows.
struct LinearMemory {
  int64_t streams, left, tile, sums, panel, vectors;  // left and tile: once for each stream

  int64_t total() const { return streams * (left + tile) + sums + panel + vectors; }
};

struct LinearKernel {
  int max_height;   // rows of a register block
  int row_unit;     // what rows are filled up to a multiple of
  int most_rows;    // of a block
  int panel_width;  // columns of a register block: u comes as [D / width][filled rows][width]
  LinearMemory (*memory)(const LinearJob&, int64_t rows);
  // Rows first .. first + count. Returns u, not yet divided by the sum, in `memory`.
  const float* (*walk)(const LinearJob&, int64_t first, int64_t count, float* memory,
                       LinearRow* rows);

  int64_t filled(int64_t rows) const { return (rows + row_unit - 1) / row_unit * row_unit; }
};

}  // namespace qadapter
