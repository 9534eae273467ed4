// Per-row statistics of the two streams, one read of each logits tensor.
//
//   x_j = z_q[j] + m z_b[j], m = alpha_0 - center           (m == 0: x = z_q)
//   shift = max_j x_j      log_sum = ln sum_j exp((x_j - shift) / alpha_tilde)
//   base_lse = max_b + ln sum_j exp(z_b[j] - max_b)
//   value = (shift + alpha_tilde log_sum) - alpha_0 base_lse
//
// One read: of a block of columns the maximum first, then, from L1, its terms against the running
// maximum. Differences max - x are taken before the scaling by log2(e) / alpha_tilde, so logits of 1e4
// keep their digits and the maximum's own term is exactly 1. Block sums are added up in double.
//
// Bytes: 2 reads of [N, V] and O(N): 263 MB for N = 256, V = 128,256 in float32, 131 MB in bf16.
// With base_lse given and m == 0 it is one read. Floor: that over the read bandwidth, or the
// arithmetic, whichever is longer. AVX-512: 12 pipe slots per exp of a vector, 6 cycles where two
// such instructions go per cycle (Zen 4), that is 24 cycles per 32 pairs of columns. AVX2: 15
// instructions per vector of 8 and stream (load and subtraction, the exponential's 11 and two
// register copies, the maximum), 3.75 per pair of columns; bf16 takes 3.9. GCC 12 makes 4.6 and 4.9
// of it. 12 or 13 need one of three vector ports, 8 of these one of two: 4.3 cycles a vector of bf16
// on a Sapphire Rapids where nothing is lost, 5.7 measured.
//
// Pieces of rows (drivers.h) give (max, sum) pairs that are merged in double, so that a single row
// uses all threads, and results depend neither on their number nor on the other rows.

#include "cpu/residual_fwd.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/contract.h"
#include "cpu/drivers.h"
#include "cpu/fetch.h"
#include "cpu/subnormals.h"
#include "cpu/tensors.h"

#define QADAPTER_KERNEL "cpu/residual_fwd_kernel.h"
#include "cpu/isa_each.h"

namespace qadapter {
namespace {

struct Statistics {
  float shift;
  double log_sum, lse;

  Statistics(Partial p, double alpha) {
    const float nan = __builtin_nanf("");
    if (p.sum >= 0.5) {  // the maximum's own term is 1
      shift = p.max;
      log_sum = std::log(p.sum);
    } else {  // NaN among the columns, or every column -inf
      shift = p.sum < 0.5 ? -__builtin_inff() : nan;
      log_sum = nan;
    }
    lse = shift + alpha * log_sum;
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace

Outputs residual_fwd(std::optional<Tensor> base_logits, Tensor q_logits, Tensor actions,
                     std::optional<Tensor> base_lse_in, std::optional<Tensor> base_logp_in,
                     double alpha_0, double alpha_tilde, double center, int64_t isa) {
  const DType dtype = dtype_of(q_logits);
  const int64_t n = q_logits.size(0), vocab = q_logits.size(1), width = bytes_of(dtype);
  const double m = alpha_0 - center;
  const Mix mix = mix_of(m);
  const Rows q_rows(q_logits, dtype);
  const Rows b_rows = base_rows(base_logits, q_logits);
  STD_TORCH_CHECK(base_logits.has_value() ||
                      (mix == Mix::none && base_lse_in.has_value() && base_logp_in.has_value()),
                  "qadapter: base_logits may be missing only with m == 0 and its statistics given");
  const float* given_lse = floats(base_lse_in, n);
  const float* given_logp = floats(base_logp_in, n);
  const int64_t* action = int64s(actions, n);

  const FwdTable& table =
      QADAPTER_FOR_ISA(choose_isa(isa), fwd_tables)[static_cast<int>(dtype)];
  const bool want_base = given_lse == nullptr;
  const FwdPiece run = table.piece[static_cast<int>(mix)][want_base];
  const FwdElement x_element = table.x[static_cast<int>(mix)];
  const bool read_base = want_base || mix != Mix::none;
  const double q_scale = kLog2E / alpha_tilde;

  const Pieces pieces(n, vocab);
  std::vector<Partial> x_parts(pieces.count()), b_parts(pieces.count());
  for_each_piece(pieces.count(), pieces.length, [&](int64_t piece) {
    [[maybe_unused]] const FlushToZero mode;
    const int64_t row = piece / pieces.per_row, first = piece % pieces.per_row * pieces.length;
    FwdColumns in;
    in.q = q_rows.row(row) + first * width;
    in.base = read_base ? b_rows.row(row) + first * width : nullptr;
    in.length = std::min(pieces.length, vocab - first);
    in.m = static_cast<float>(m);
    in.q_scale = static_cast<float>(q_scale);
    run(in, x_parts[piece], b_parts[piece]);
  });

  Outputs result{new_floats(q_logits, {n}), new_floats(q_logits, {n}), new_floats(q_logits, {n}),
                 new_floats(q_logits, {n}), new_floats(q_logits, {n}), new_floats(q_logits, {n}),
                 new_floats(q_logits, {n})};
  float *q_out = out(std::get<0>(result)), *value_out = out(std::get<1>(result)),
        *base_logp_out = out(std::get<2>(result)), *policy_logp_out = out(std::get<3>(result)),
        *base_lse_out = out(std::get<4>(result)), *shift_out = out(std::get<5>(result)),
        *log_sum_out = out(std::get<6>(result));
  const float nan = __builtin_nanf(""), inf = __builtin_inff();

  for (int64_t row = 0; row < n; ++row) {
    Partial x_total = x_parts[row * pieces.per_row], b_total = b_parts[row * pieces.per_row];
    for (int64_t k = 1; k < pieces.per_row; ++k) {
      x_total.merge(x_parts[row * pieces.per_row + k], q_scale);
      b_total.merge(b_parts[row * pieces.per_row + k], kLog2E);
    }
    const Statistics x(x_total, alpha_tilde);
    const Statistics b(b_total, 1.0);
    const double base_lse = want_base ? b.lse : given_lse[row];
    // A cached base_lse was rounded to float: round the policy's as well, so that equal streams
    // still cancel exactly.
    const double lse = want_base ? x.lse : static_cast<float>(x.lse);
    double value = alpha_0 == 0 ? lse : lse - alpha_0 * base_lse;

    const int64_t a = action[row];
    double q = 0, base_logp = 0, policy_logp = 0;
    if (a != kNoAction && (a < 0 || a >= vocab)) {
      q = base_logp = policy_logp = value = nan;
    } else if (a != kNoAction) {
      const char* q_at = q_rows.row(row) + a * width;
      const char* b_at = b_rows.data ? b_rows.row(row) + a * width : nullptr;
      const double z_q = table.plain_q(q_at, nullptr, 0.0f);
      const double z_b = b_at ? table.plain_q(b_at, nullptr, 0.0f)
                              : static_cast<double>(given_logp[row]) + base_lse;
      base_logp = given_logp ? given_logp[row]
                             : (want_base ? (z_b - b.shift) - b.log_sum : z_b - base_lse);
      q = center == 0 ? z_q : (z_q == -inf ? -inf : z_q - center * z_b);
      const double x_a = x_element(q_at, b_at, static_cast<float>(m));
      policy_logp = (x_a - x.shift) / alpha_tilde - x.log_sum;
      if (std::isnan(x.log_sum)) q = policy_logp = nan;
    }
    q_out[row] = static_cast<float>(q);
    value_out[row] = static_cast<float>(value);
    base_logp_out[row] = static_cast<float>(base_logp);
    policy_logp_out[row] = static_cast<float>(policy_logp);
    base_lse_out[row] = static_cast<float>(base_lse);
    shift_out[row] = x.shift;
    log_sum_out[row] = static_cast<float>(x.log_sum);
  }
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "residual_fwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor? base_lse, "
      "Tensor? base_logp, float alpha_0, float alpha_tilde, float center, int isa) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("residual_fwd", TORCH_BOX(&residual_fwd));
}

}  // namespace qadapter
