// Launches linear_chunk.cu; plain pointers, so that nvcc sees no header of torch.
#pragma once

#include "common/head.h"
#include "cuda/dtype.h"

namespace qadapter {
namespace cuda {

constexpr int kUnit = 8;  // columns that a thread takes at a time

// Rows of `statistics`: of x, and from kBaseRow on of the base stream.
enum StatisticsRow { kShift, kLogSum, kXAction, kZAction, kSlope, kBaseRow };

struct ChunkArgs {
  float* z;             // [rows, stride]
  const float* base_z;  // the same, or null
  void* p;              // row 0 of p, inside row 0 of z; null: statistics only
  int64_t p_stride;     // in elements of p
  const float* bias;    // [stride], or null
  const int64_t* actions;
  float* statistics;  // [kBaseRow, rows], with base_z [2 * kBaseRow, rows]
  int64_t statistics_stride;
  int64_t rows, stride;
  int vocab, units_per_block;
  float m, scale, base_scale;
  HeadScalars head;
  bool sum_base;
};

// Blocks that share a row, 0 for the kernel without clusters. wanted >= 0 is taken as it is.
int chunk_cluster(const ChunkArgs& args, int wanted, int* units_per_block);

// Null, or what went wrong.
const char* launch_linear_chunk(const ChunkArgs& args, DType p_dtype, int cluster, void* stream);

}  // namespace cuda
}  // namespace qadapter
