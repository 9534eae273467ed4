// What causal_softmax.cpp and its vector code share.
#pragma once

#include "cpu/types.h"

namespace qadapter {

struct CausalJob {
  char* scores;             // dense rows of `keys` elements, changed
  int64_t keys, queries;    // row i is that of query i % queries; the last one sees the last key
  int64_t window;           // keys that a query sees at most
};

// Rows [first, end). `memory`: floats, room for keys rounded up to a group.
using CausalRows = void (*)(const CausalJob&, int64_t first, int64_t end, float* memory);

}  // namespace qadapter
