// What residual_fwd.cpp and its vector code share.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cpu/types.h"

namespace qadapter {

// sum_j exp2(scale * (x_j - max)) over some columns. Nothing but -inf seen: max = -FLT_MAX, sum <
// 1/2.
struct Partial {
  float max = -FLT_MAX;
  double sum = 0.0;

  void rescale_to(float new_max, double scale) {
    if (sum != 0.0) sum *= std::exp2((static_cast<double>(max) - new_max) * scale);
    max = new_max;
  }
  void merge(Partial other, double scale) {
    if (other.max > max) {
      rescale_to(other.max, scale);
    } else {
      other.rescale_to(max, scale);
    }
    sum += other.sum;
  }
};

struct FwdColumns {
  const void* q;     // first column of the piece
  const void* base;  // may be null where it is not read
  int64_t length;
  float m;        // x = z_q + m * z_b
  float q_scale;  // log2(e) / alpha_tilde
};

// Statistics of x and, if asked for, of the base over the columns of one piece.
using FwdPiece = void (*)(const FwdColumns&, Partial& x, Partial& base);

// x_a in the very arithmetic of the vector code, so that it never exceeds the maximum.
using FwdElement = float (*)(const void* q, const void* base, float m);

struct FwdTable {
  FwdPiece piece[3][2];  // [Mix][statistics of the base wanted]
  FwdElement x[3];       // [Mix]
  FwdElement plain_q;    // q alone, converted to float
};

}  // namespace qadapter
