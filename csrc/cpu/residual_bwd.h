// What residual_bwd.cpp and its vector code share.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qadapter {

struct BwdColumns {
  const void* q;     // first column of the piece
  const void* base;  // may be null where it is not read
  void* grad;
  int64_t length;
  float m;         // x = z_q + m * z_b
  float q_scale;   // log2(e) / alpha_tilde
  float shift;     // the row's maximum of x
  float factor;    // coef_p exp(-log_sum)
  int64_t action;  // column of the piece that gets coef_a, or -1
  float coef_a;
};

using BwdPiece = void (*)(const BwdColumns&);

struct BwdTable {
  BwdPiece piece[3][2];  // [Mix][streaming stores]
  void (*fence)();       // after streaming stores
};

}  // namespace qadapter
