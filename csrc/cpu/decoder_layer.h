// What decoder_layer.cpp and its vector code share.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qadapter {

// Attention of one query a row: out[b][h] = softmax(scaling q[b][h] K^T) V over the keys and values
// of row b and head h / groups.
struct QueryJob {
  const char* q;                            // dense [rows, heads, dim]
  char* out;                                // the same
  const char *keys, *values;                // [rows, heads / groups, tokens, dim], dense rows
  int64_t key_strides[3], value_strides[3]; // bytes, over rows, heads and tokens
  const bool* mask;                         // [rows, tokens], false: not seen; null: all are seen
  int64_t mask_strides[2];                  // elements
  int64_t heads, groups, tokens, dim;
  float scaling;
};

// Pairs [first, end) of a row and a head of the keys, rows x (heads / groups). `memory`:
// query_memory(job) floats.
using Queries = void (*)(const QueryJob&, int64_t first, int64_t end, float* memory);

// out = round(a + b), `count` elements; out may be a or b.
using Sum = void (*)(const void* a, const void* b, void* out, int64_t count);

struct DecoderTable {
  Queries queries;
  Sum sum;
};

constexpr int kQueries = 4;     // of one head of the keys, that the vector code takes at a time
constexpr int kMostLanes = 32;  // of a group of vector code's elements, at most

inline int64_t query_memory(const QueryJob& job) {
  return kQueries * (job.dim + job.tokens + 2 * kMostLanes);
}

}  // namespace qadapter
