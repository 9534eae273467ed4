// What varlen_attention.cpp and its vector code share.
#pragma once

#include "cpu/types.h"

namespace qadapter {

// [heads, tokens] of `dim` bfloat16 elements that follow each other.
struct HeadRows {
  char* data = nullptr;
  int64_t head = 0, token = 0;  // bytes

  BF16* row(int64_t h, int64_t t) const {
    return reinterpret_cast<BF16*>(data + h * head + t * token);
  }
};

// A sequence: `own` tokens from `start` on, which see each other causally, and before them all of
// the `prefix` tokens from `prefix_start` on.
struct Sequence {
  int64_t prefix_start, prefix, start, own;

  int64_t keys() const { return prefix + own; }
  int64_t token(int64_t key) const {
    return key < prefix ? prefix_start + key : start + key - prefix;
  }
};

struct VarlenJob {
  HeadRows q, k, v;
  HeadRows out;             // forward
  HeadRows grad;            // backward: the gradient of out
  HeadRows grad_q, grad_k, grad_v;
  float* lse = nullptr;     // [heads, tokens], log-sum-exp of each query's scaled scores
  int64_t tokens = 0, dim = 0, group = 0;  // group: query heads of a key head
  int64_t window = 0;       // keys that a query sees at most
  float scaling = 1.0f;
};

// The code of an instruction set, with the bytes of memory that it wants: forward for the query
// heads of key head h and one sequence, backward for those and a group of sequences [first, end),
// which begins at token `start` and has `tokens`.
struct AttentionKernel {
  int64_t (*forward_memory)(const VarlenJob&, const Sequence&);
  void (*forward)(const VarlenJob&, const Sequence&, int64_t h, char* room);
  int64_t (*backward_memory)(const VarlenJob&, const Sequence&, int64_t tokens);
  void (*backward)(const VarlenJob&, const Sequence* first, const Sequence* end, int64_t h,
                   int64_t start, int64_t tokens, char* room);
};

}  // namespace qadapter
