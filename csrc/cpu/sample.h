// What sample.cpp, sample_cut.h and their vector code share.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qadapter {

constexpr int kSampleBlock = 512;  // columns with a maximum, and a sum, of their own
constexpr int kSampleGroups = 16;  // maxima per block, over every 16th column

// Columns of one row, from a block's first on; the last block may be shorter.
struct SampleColumns {
  const void* q;
  const void* base;  // not read with Mix::none
  int64_t length;
  float weight;  // x = z_q + weight * z_b
  float scale2;  // scale * log2(e)
  bool sums;     // whether the sums are wanted
  float* x;      // where x goes, padded with -inf to whole blocks
  int64_t step;  // from one block's x to the next: 0 where x is not to be kept
};

// Per block: max x, maxima of its groups, sum exp2(scale2 * (x - max)) (0 for a block of -inf).
struct BlockStats {
  float* max;
  float* groups;
  float* sum;
};

struct SampleTable {
  // False where some x is NaN or +inf; the statistics are then without meaning.
  bool (*compose[3][3])(const SampleColumns&, BlockStats);  // [DType][Mix]
  // sum exp2(scale2 * (x - ref)) over x > pivot, and how many equal it
  double (*mass_above)(const float* x, int64_t n, float pivot, float ref, float scale2,
                       int64_t& equal);
  // Appends x >= least to out, which needs room for 16 more.
  void (*gather)(const float* x, int64_t n, float least, float* out, int64_t& count);
  // The mass of x > high; those in (low, high] are appended to out, which needs room for 16 more.
  double (*split)(const float* x, int64_t n, float low, float high, float ref, float scale2,
                  float* out, int64_t& count);
  // out[j] = exp2(scale2 * (x[j] - ref))
  void (*masses)(const float* x, int64_t n, float ref, float scale2, float* out);
};

}  // namespace qadapter
