// How fast this machine reads: the ceiling that benchmarks compare kernels with. Reads every byte
// of a tensor once, on torch's threads, and does next to nothing with it.

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/drivers.h"
#include "cpu/fetch.h"
#include "cpu/tensors.h"

namespace qadapter {

// The bitwise or of all whole 64-byte lines of a contiguous CPU tensor, folded to 64 bits.
int64_t read_probe(Tensor t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "qadapter: expected a contiguous CPU tensor");
  typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));
  const Line* lines = static_cast<const Line*>(t.const_data_ptr());
  const int64_t count = t.numel() * static_cast<int64_t>(t.element_size()) / 64;
  constexpr int64_t kPiece = 8192;  // lines: 512 KB
  std::atomic<uint64_t> all{0};
  for_each_piece((count + kPiece - 1) / kPiece, kPiece * 16, [&](int64_t piece) {
    const int64_t end = std::min(count, (piece + 1) * kPiece);
    Line a = {}, b = {};
    int64_t i = piece * kPiece;
    for (; i + 1 < end; i += 2) {
      fetch_ahead(lines + i);
      fetch_ahead(lines + i + 1);
      a |= lines[i];
      b |= lines[i + 1];
    }
    if (i < end) a |= lines[i];
    a |= b;
    uint64_t folded = 0;
    for (int k = 0; k < 8; ++k) folded |= a[k];
    all.fetch_or(folded, std::memory_order_relaxed);
  });
  return static_cast<int64_t>(all.load());
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) { library.def("read_probe(Tensor t) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("read_probe", TORCH_BOX(&read_probe));
}

}  // namespace qadapter
