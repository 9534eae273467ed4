// Softmax of attention scores over the keys that each query sees, in place.
//
// In float32, rounded once, as torch.softmax of bfloat16; keys behind the query, or before its
// window, get exactly 0 and their scores are not looked at. Eager PyTorch adds a mask of -inf and
// takes the softmax of all: twice the exponentials, and 10 bytes an element where this reads and
// writes 4, of which a causal square needs about half.
//
// Rows do not depend on one another, nor on the threads.

#include "cpu/causal_softmax.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/drivers.h"
#include "cpu/layer_rows.h"

#define QADAPTER_KERNEL "cpu/causal_softmax_kernel.h"
#include "cpu/isa_each.h"

namespace qadapter {

void causal_softmax_(Tensor scores, int64_t queries, int64_t window, int64_t isa) {
  STD_TORCH_CHECK(scores.is_cpu() && scores.scalar_type() == ScalarType::BFloat16 &&
                      scores.dim() == 3 && scores.is_contiguous(),
                  "causal_softmax_: scores: expected a contiguous bfloat16 CPU tensor [H, rows, "
                  "keys], got ",
                  name_of(scores.scalar_type()), " ", shape_of(scores));
  const int64_t rows = scores.size(0) * scores.size(1), keys = scores.size(2);
  STD_TORCH_CHECK(queries >= 1 && queries <= keys && scores.size(1) % queries == 0,
                  "causal_softmax_: queries: expected a divisor of ", scores.size(1),
                  ", at most ", keys, ", got ", queries);
  STD_TORCH_CHECK(window >= 1, "causal_softmax_: window: expected 1 or more, got ", window);
  CausalJob job;
  job.scores = static_cast<char*>(scores.mutable_data_ptr());
  job.keys = keys;
  job.queries = queries;
  job.window = window;
  const CausalRows run = QADAPTER_FOR_ISA(choose_isa(isa), causal_rows_bf16);
  const int64_t each = kLayerPiece / keys + 1;
  for_each_piece((rows + each - 1) / each, each * keys, [&](int64_t piece) {
    thread_local std::vector<float> memory;
    if (memory.size() < static_cast<size_t>(keys + 64)) memory.resize(keys + 64);
    run(job, piece * each, std::min(rows, (piece + 1) * each), memory.data());
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def("causal_softmax_(Tensor(a!) scores, int queries, int window, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("causal_softmax_", TORCH_BOX(&causal_softmax_));
}

}  // namespace qadapter
