// Launches sample_blocks.cu, sample_draw.cu and sample_filter.cu; plain pointers.
#pragma once

#include "cuda/dtype.h"

namespace qadapter {
namespace cuda {

constexpr int kSampleGroup = 256;  // tokens with a maximum and a sum of their own

struct SampleArgs {
  const void *base, *q;  // base may be null
  int64_t base_stride, q_stride;  // in elements
  const double *scale, *weight;     // null: the number below, for all rows
  const int64_t *seed, *position;   // the same
  double scale_value, weight_value;
  int64_t seed_value, position_value;
  int scale_step, weight_step, position_step;  // 0: one number for all rows
  bool shared_seed, greedy;
  int top_k;  // 0: none
  double top_p, log_min_p;
  bool by_p, by_min;
  float *group_max, *group_sum;  // [batch, groups]
  int *list, *ties;              // [batch, groups], where filters are on
  uint64_t* kept;                // the same
  int64_t* tokens;
  float* logprobs;
  int64_t batch;
  int vocab, groups;
};

// Null, or what went wrong.
const char* launch_sample_blocks(const SampleArgs& args, DType dtype, void* stream);
const char* launch_sample_draw(const SampleArgs& args, DType dtype, void* stream);
const char* launch_sample_filter(const SampleArgs& args, DType dtype, void* stream);

}  // namespace cuda
}  // namespace qadapter
