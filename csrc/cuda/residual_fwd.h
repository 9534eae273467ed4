// Launches residual_fwd.cu; plain pointers, so that nvcc sees no header of torch.
#pragma once

#include "common/row_finish.h"
#include "cuda/dtype.h"

namespace qadapter {
namespace cuda {

struct FwdArgs {
  const void *base, *q;  // base may be null where it is not needed
  int64_t base_stride, q_stride;  // in elements
  const int64_t* actions;
  const float *base_lse, *base_logp;  // may be null
  float *q_out, *value, *base_logp_out, *policy_logp, *base_lse_out, *shift, *log_sum;
  float* partial;  // [rows, splits, 4], where splits > 1
  int64_t rows;
  int vocab, vectors_per_split;
  Composition composition;
  float m, scale, base_scale;  // alpha_0 - center; log2(e) / alpha_tilde; log2(e)
};

// Blocks per row: 1 unless that would leave the GPU half empty. wanted > 0 is taken as it is.
int fwd_splits(int64_t rows, int vocab, DType dtype, int wanted, int* vectors_per_split);

// Null, or what went wrong.
const char* launch_residual_fwd(const FwdArgs& args, DType dtype, int splits, void* stream);

}  // namespace cuda
}  // namespace qadapter
