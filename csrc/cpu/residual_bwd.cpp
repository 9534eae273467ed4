// The gradient of any loss on (q, value, policy_logp) with respect to the adapter's logits.
//
//   grad_j = coef_p exp((x_j - shift) / alpha_tilde - log_sum) + coef_a [j == a]
//   x_j = z_q[j] + m z_b[j]
//
// in float, rounded once to the logits' dtype. coef_p exp(-log_sum) is multiplied into a table or a
// polynomial of the exponential, so it costs nothing per element. Of a row where it is 0 only the
// action's column is read.
//
// Bytes: m == 0: read z_q, write grad, 2 passes over [N, V]; m != 0: 3 passes; 394 MB for N = 256,
// V = 128,256 in float32. Large gradients are written past the caches (streaming stores), which
// saves the read of every line before it is overwritten. Fresh memory comes from the kernel page by
// page, which can cost more than all the rest: huge pages are asked for where the system grants
// them. Arithmetic: of AVX2 15 instructions per vector of 8, the store included, 1.9 per column;
// bf16, with what widens and rounds, 2.6. GCC 12 makes 2.4 and 3.2 of it.

#include "cpu/residual_bwd.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/contract.h"
#include "cpu/drivers.h"
#include "cpu/fetch.h"
#include "cpu/subnormals.h"
#include "cpu/tensors.h"

#define QADAPTER_KERNEL "cpu/residual_bwd_kernel.h"
#include "cpu/isa_each.h"

namespace qadapter {
namespace {

// Memory that was never touched is handed out in pages of 4 KB, each with a fault; in huge pages
// there are 512 times fewer. Only a hint, and only for the pages wholly inside.
void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void fill_nan(char* at, int64_t count, DType dtype) {
  if (dtype == DType::f32) {
    std::fill_n(reinterpret_cast<float*>(at), count, __builtin_nanf(""));
  } else {
    const uint16_t bits = dtype == DType::bf16 ? 0x7fc0 : 0x7e00;
    std::fill_n(reinterpret_cast<uint16_t*>(at), count, bits);
  }
}

}  // namespace

Tensor residual_bwd(std::optional<Tensor> base_logits, Tensor q_logits, Tensor actions,
                    Tensor shift, Tensor log_sum, Tensor coef_p, Tensor coef_a, double alpha_0,
                    double alpha_tilde, double center, int64_t isa_wanted) {
  const DType dtype = dtype_of(q_logits);
  const int64_t n = q_logits.size(0), vocab = q_logits.size(1), width = bytes_of(dtype);
  const double m = alpha_0 - center;
  const Mix mix = mix_of(m);
  const Rows q_rows(q_logits, dtype);
  const Rows b_rows = base_rows(base_logits, q_logits);
  STD_TORCH_CHECK(base_logits.has_value() || mix == Mix::none,
                  "qadapter: base_logits may be missing only with m == 0");
  const int64_t* action = int64s(actions, n);
  const float *shifts = floats(shift, n), *log_sums = floats(log_sum, n),
              *coefs_p = floats(coef_p, n), *coefs_a = floats(coef_a, n);

  Tensor grad = torch::stable::new_empty(q_logits, {n, vocab});
  char* grad_data = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t bytes = n * vocab * width;
  constexpr int64_t kFitsInCache = int64_t{4} << 20;
  const bool stream = bytes > kFitsInCache;
  if (stream) ask_for_huge_pages(grad_data, static_cast<size_t>(bytes));

  const Isa isa = choose_isa(isa_wanted);
  const BwdTable& table = QADAPTER_FOR_ISA(isa, bwd_tables)[static_cast<int>(dtype)];
  const BwdPiece run = table.piece[static_cast<int>(mix)][stream];
  const Pieces pieces(n, vocab);
  for_each_piece(pieces.count(), pieces.length, [&](int64_t piece) {
    [[maybe_unused]] const FlushToZero mode;
    const int64_t row = piece / pieces.per_row, first = piece % pieces.per_row * pieces.length;
    BwdColumns in;
    in.q = q_rows.row(row) + first * width;
    in.base = mix == Mix::none ? nullptr : b_rows.row(row) + first * width;
    char* to = grad_data + (row * vocab + first) * width;
    in.grad = to;
    in.length = std::min(pieces.length, vocab - first);
    in.m = static_cast<float>(m);
    in.q_scale = static_cast<float>(kLog2E / alpha_tilde);
    in.shift = shifts[row];
    in.factor = static_cast<float>(coefs_p[row] * std::exp(-static_cast<double>(log_sums[row])));
    in.coef_a = coefs_a[row];
    const int64_t a = action[row] - first;
    in.action = action[row] >= 0 && a >= 0 && a < in.length ? a : -1;
    if (std::isnan(in.factor) || std::isnan(in.shift)) {
      fill_nan(to, in.length, dtype);
    } else {
      run(in);
      if (stream) table.fence();
    }
  });
  return grad;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "residual_bwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor shift, "
      "Tensor log_sum, Tensor coef_p, Tensor coef_a, float alpha_0, float alpha_tilde, "
      "float center, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("residual_bwd", TORCH_BOX(&residual_bwd));
}

}  // namespace qadapter
