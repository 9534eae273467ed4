// Launches residual_bwd.cu; plain pointers, so that nvcc sees no header of torch.
#pragma once

#include "cuda/dtype.h"

namespace qadapter {
namespace cuda {

struct BwdArgs {
  const void *base, *q;  // base may be null with m == 0
  int64_t base_stride, q_stride;  // in elements
  const int64_t* actions;
  const float *shift, *log_sum, *coef_p, *coef_a;
  void* grad;  // [rows, vocab], contiguous
  int64_t rows;
  int vocab;
  float m, scale;  // alpha_0 - center; log2(e) / alpha_tilde
};

// Null, or what went wrong.
const char* launch_residual_bwd(const BwdArgs& args, DType dtype, void* stream);

}  // namespace cuda
}  // namespace qadapter
