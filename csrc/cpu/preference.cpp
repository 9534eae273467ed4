// The preference loss on per-row values, with its gradient. O(N), one thread: N is thousands.
//
//   r_t = q_t - gamma V'_t       V' = value of the next row (0 after the last) or of the same row
//   R_s = sum r_t (/ number of actions)       margin_i = R_i - R_{P+i}
//   loss = sum softplus(-bt_scale margin) / pairs + reg_coef sum r^2 / actions
//   dloss/dr_t = -+ bt_scale sigmoid(-bt_scale margin) / pairs (/ number of actions)
//                + 2 reg_coef r_t / actions
//   dloss/dq_t = dloss/dr_t      dloss/dV'_t = -gamma dloss/dr_t
//
// All sums in double. Bytes: about 40 N.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/contract.h"
#include "cpu/tensors.h"

namespace qadapter {
namespace {

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

// The sequence bounds, or nothing if they do not cut [0, n) into 2P sequences.
std::vector<int64_t> read_bounds(const Tensor& cu_seqlens, int64_t n) {
  const ScalarType type = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(cu_seqlens.is_cpu() && cu_seqlens.dim() == 1 && cu_seqlens.is_contiguous() &&
                      cu_seqlens.numel() % 2 == 1 &&
                      (type == ScalarType::Int || type == ScalarType::Long),
                  "qadapter: expected cu_seqlens int32 or int64 [2P+1], contiguous, on the CPU");
  std::vector<int64_t> bounds(static_cast<size_t>(cu_seqlens.numel()));
  const void* data = cu_seqlens.const_data_ptr();
  for (size_t i = 0; i < bounds.size(); ++i) {
    bounds[i] = type == ScalarType::Int ? static_cast<const int32_t*>(data)[i]
                                        : static_cast<const int64_t*>(data)[i];
  }
  const bool valid = bounds.front() == 0 && bounds.back() == n &&
                     std::is_sorted(bounds.begin(), bounds.end());
  if (!valid) bounds.clear();
  return bounds;
}

using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace

Outputs preference_fwd(Tensor q_in, Tensor value_in, Tensor actions, Tensor cu_seqlens,
                       std::optional<Tensor> denominators, double gamma, double reg_coef,
                       double bt_scale, bool value_next, bool length_mean) {
  const int64_t n = q_in.numel();
  const float *q = floats(q_in, n), *value = floats(value_in, n);
  const int64_t* action = int64s(actions, n);
  const std::vector<int64_t> bounds = read_bounds(cu_seqlens, n);
  const int64_t pairs = (cu_seqlens.numel() - 1) / 2, sequences = 2 * pairs;

  Outputs result{new_floats(q_in, {}),      new_floats(q_in, {}),      new_floats(q_in, {}),
                 new_floats(q_in, {pairs}), new_floats(q_in, {pairs}), new_floats(q_in, {pairs}),
                 new_floats(q_in, {}),      new_floats(q_in, {n}),     new_floats(q_in, {n})};
  float *loss_out = out(std::get<0>(result)), *bt_out = out(std::get<1>(result)),
        *reg_out = out(std::get<2>(result)), *chosen = out(std::get<3>(result)),
        *rejected = out(std::get<4>(result)), *margins = out(std::get<5>(result)),
        *accuracy = out(std::get<6>(result)), *grad_q = out(std::get<7>(result)),
        *grad_value = out(std::get<8>(result));
  if (bounds.empty()) {
    const float nan = __builtin_nanf("");
    *loss_out = *bt_out = *reg_out = *accuracy = nan;
    for (float* per_pair : {chosen, rejected, margins}) std::fill_n(per_pair, pairs, nan);
    for (float* per_row : {grad_q, grad_value}) std::fill_n(per_row, n, nan);
    return result;
  }

  const auto reward = [&](int64_t t, int64_t end) {
    const double next = t + 1 < end ? value[t + 1] : 0.0;
    return q[t] - gamma * (value_next ? next : value[t]);
  };

  std::vector<double> returns(sequences, 0.0), weight(sequences, 1.0);
  double squares = 0;
  int64_t count = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t here = 0;
    for (int64_t t = bounds[s]; t < bounds[s + 1]; ++t) {
      if (action[t] == kNoAction) continue;
      const double r = reward(t, bounds[s + 1]);
      returns[s] += r;
      squares += r * r;
      ++here;
    }
    if (length_mean) weight[s] = 1.0 / std::max<int64_t>(1, here);
    returns[s] *= weight[s];
    count += here;
  }

  double pairs_denom = std::max<int64_t>(1, pairs), actions_denom = std::max<int64_t>(1, count);
  if (denominators.has_value()) {
    const float* given = floats(*denominators, 2);
    pairs_denom = std::max(1.0f, given[0]);
    actions_denom = std::max(1.0f, given[1]);
  }

  double bt = 0;
  int64_t won = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const double margin = returns[i] - returns[pairs + i];
    chosen[i] = static_cast<float>(returns[i]);
    rejected[i] = static_cast<float>(returns[pairs + i]);
    margins[i] = static_cast<float>(margin);
    bt += softplus(-bt_scale * margin);
    won += margin > 0;
    const double slope = bt_scale * sigmoid(-bt_scale * margin) / pairs_denom;
    weight[i] *= -slope;  // from here on: d bt_loss / d r_t
    weight[pairs + i] *= slope;
  }
  bt /= pairs_denom;
  const double reg = squares / actions_denom;
  *bt_out = static_cast<float>(bt);
  *reg_out = static_cast<float>(reg);
  *loss_out = static_cast<float>(bt + reg_coef * reg);
  *accuracy = pairs > 0 ? static_cast<float>(won) / static_cast<float>(pairs) : 0.0f;

  std::fill_n(grad_q, n, 0.0f);
  std::fill_n(grad_value, n, 0.0f);
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t t = bounds[s]; t < bounds[s + 1]; ++t) {
      if (action[t] == kNoAction) continue;
      const double g = weight[s] + 2 * reg_coef * reward(t, bounds[s + 1]) / actions_denom;
      grad_q[t] = static_cast<float>(g);
      if (!value_next) {
        grad_value[t] = static_cast<float>(-gamma * g);
      } else if (t + 1 < bounds[s + 1]) {
        grad_value[t + 1] = static_cast<float>(-gamma * g);
      }
    }
  }
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "preference_fwd(Tensor q, Tensor value, Tensor actions, Tensor cu_seqlens, "
      "Tensor? denominators, float gamma, float reg_coef, float bt_scale, bool value_next, "
      "bool length_mean) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("preference_fwd", TORCH_BOX(&preference_fwd));
}

}  // namespace qadapter
