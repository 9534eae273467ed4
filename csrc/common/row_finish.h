// From a row's statistics and its action's logits to the row's seven results.
//
//   value = (shift + alpha_tilde log_sum) - alpha_0 base_lse      q = z_q[a] - center z_b[a]
//   policy_logp = (x_a - shift) / alpha_tilde - log_sum           base_logp = z_b[a] - base_lse
//
// In double: value is a difference of two numbers of the size of the logits.
#pragma once

#include "common/contract.h"
#include "common/online.h"

namespace qadapter {

struct Composition {
  double alpha_0, alpha_tilde, center;
};

// What is known of a row; members without meaning (no base logits, nothing given) are ignored.
struct RowKnown {
  Pair x, base;  // base only where base_lse is not given
  float z_q, z_b, x_action;
  float base_lse, base_logp;
  bool has_base, has_lse, has_logp;
};

struct RowResult {
  float q, value, base_logp, policy_logp, base_lse, shift, log_sum;
};

struct RowSum {
  float shift;
  double log_sum, lse;
};

// The largest element's own term is 1: a sum below 1/2 means that there was none.
QADAPTER_HD RowSum row_sum(Pair p, double alpha) {
  RowSum s;
  const double nan = not_a_number();
  s.shift = p.sum >= 0.5f ? p.max : (p.sum < 0.5f ? neg_inf() : not_a_number());
  s.log_sum = p.sum >= 0.5f ? log(static_cast<double>(p.sum)) : nan;
  s.lse = s.shift + alpha * s.log_sum;
  return s;
}

QADAPTER_HD RowResult finish_row(const RowKnown& row, int64_t action, int64_t vocab,
                                 const Composition& c) {
  const RowSum x = row_sum(row.x, c.alpha_tilde);
  double base_lse, base_logp;
  // A cached base_lse was rounded to float: the policy's is, too, so that equal streams cancel.
  double lse = x.lse;
  if (row.has_lse) {
    base_lse = row.base_lse;
    base_logp = row.z_b - base_lse;
    lse = static_cast<float>(lse);
  } else {
    const RowSum b = row_sum(row.base, 1.0);
    base_lse = b.lse;
    base_logp = (row.z_b - static_cast<double>(b.shift)) - b.log_sum;
  }
  if (row.has_logp) base_logp = row.base_logp;
  const double z_b = row.has_base ? row.z_b : base_logp + base_lse;

  const float nan = not_a_number();
  RowResult r;
  r.base_lse = static_cast<float>(base_lse);
  r.shift = x.shift;
  r.log_sum = static_cast<float>(x.log_sum);
  // A factor of 0 would still let a NaN through.
  r.value = static_cast<float>(c.alpha_0 == 0 ? lse : lse - c.alpha_0 * base_lse);
  r.q = r.base_logp = r.policy_logp = 0.0f;
  if (action == kNoAction) return r;
  if (action < 0 || action >= vocab) {
    r.q = r.base_logp = r.policy_logp = r.value = nan;
    return r;
  }
  const bool masked = row.z_q == neg_inf() || c.center == 0;
  r.q = masked ? row.z_q : static_cast<float>(row.z_q - c.center * z_b);
  r.base_logp = static_cast<float>(base_logp);
  r.policy_logp = static_cast<float>(
      (row.x_action - static_cast<double>(x.shift)) / c.alpha_tilde - x.log_sum);
  if (x.log_sum != x.log_sum) r.q = r.policy_logp = nan;
  return r;
}

}  // namespace qadapter
