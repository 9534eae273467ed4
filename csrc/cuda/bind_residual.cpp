// Bindings of residual_fwd.cu and residual_bwd.cu. The caller has made the logits' device current,
// and hands over its current stream: the stable ABI of torch 2.11 has no portable way to ask.

#include <tuple>

#include "common/contract.h"
#include "cuda/residual_bwd.h"
#include "cuda/residual_fwd.h"
#include "cuda/tensors.h"

namespace qadapter {
namespace cuda {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs residual_fwd(std::optional<Tensor> base_logits, Tensor q_logits, Tensor actions,
                     std::optional<Tensor> base_lse, std::optional<Tensor> base_logp,
                     double alpha_0, double alpha_tilde, double center, int64_t splits_wanted,
                     int64_t stream) {
  const DType dtype = dtype_of(q_logits);
  const int64_t n = q_logits.size(0), vocab = q_logits.size(1);
  const double m = alpha_0 - center;
  STD_TORCH_CHECK(
      base_logits.has_value() || (m == 0 && base_lse.has_value() && base_logp.has_value()),
      "qadapter: base_logits may be missing only with m == 0 and its statistics given");
  Outputs result{new_floats(q_logits, {n}), new_floats(q_logits, {n}), new_floats(q_logits, {n}),
                 new_floats(q_logits, {n}), new_floats(q_logits, {n}), new_floats(q_logits, {n}),
                 new_floats(q_logits, {n})};
  FwdArgs a = {};
  a.q = rows(q_logits, dtype, n, vocab);
  a.q_stride = q_logits.stride(0);
  if (base_logits.has_value()) {
    a.base = rows(*base_logits, dtype, n, vocab);
    a.base_stride = base_logits->stride(0);
  }
  a.actions = int64s(actions, n);
  a.base_lse = floats(base_lse, n);
  a.base_logp = floats(base_logp, n);
  a.q_out = out(std::get<0>(result));
  a.value = out(std::get<1>(result));
  a.base_logp_out = out(std::get<2>(result));
  a.policy_logp = out(std::get<3>(result));
  a.base_lse_out = out(std::get<4>(result));
  a.shift = out(std::get<5>(result));
  a.log_sum = out(std::get<6>(result));
  a.rows = n;
  a.vocab = static_cast<int>(vocab);
  a.composition = {alpha_0, alpha_tilde, center};
  a.m = static_cast<float>(m);
  a.scale = static_cast<float>(kLog2E / alpha_tilde);
  a.base_scale = static_cast<float>(kLog2E);
  if (n == 0) return result;
  const int splits = fwd_splits(n, a.vocab, dtype, static_cast<int>(splits_wanted),
                                &a.vectors_per_split);
  std::optional<Tensor> partial;
  if (splits > 1) {
    partial = new_floats(q_logits, {n, splits, 4});
    a.partial = out(*partial);
  }
  check(launch_residual_fwd(a, dtype, splits, stream_of(stream)));
  return result;
}

Tensor residual_bwd(std::optional<Tensor> base_logits, Tensor q_logits, Tensor actions,
                    Tensor shift, Tensor log_sum, Tensor coef_p, Tensor coef_a, double alpha_0,
                    double alpha_tilde, double center, int64_t stream) {
  const DType dtype = dtype_of(q_logits);
  const int64_t n = q_logits.size(0), vocab = q_logits.size(1);
  const double m = alpha_0 - center;
  STD_TORCH_CHECK(base_logits.has_value() || m == 0,
                  "qadapter: base_logits may be missing only with m == 0");
  Tensor grad = torch::stable::new_empty(q_logits, {n, vocab});
  BwdArgs a = {};
  a.q = rows(q_logits, dtype, n, vocab);
  a.q_stride = q_logits.stride(0);
  if (base_logits.has_value()) {
    a.base = rows(*base_logits, dtype, n, vocab);
    a.base_stride = base_logits->stride(0);
  }
  a.actions = int64s(actions, n);
  a.shift = floats(shift, n);
  a.log_sum = floats(log_sum, n);
  a.coef_p = floats(coef_p, n);
  a.coef_a = floats(coef_a, n);
  a.grad = grad.mutable_data_ptr();
  a.rows = n;
  a.vocab = static_cast<int>(vocab);
  a.m = static_cast<float>(m);
  a.scale = static_cast<float>(kLog2E / alpha_tilde);
  if (n > 0 && vocab > 0) check(launch_residual_bwd(a, dtype, stream_of(stream)));
  return grad;
}

}  // namespace

QADAPTER_FRAGMENT(QADAPTER_CUDA_LIBRARY, library) {
  library.def(
      "residual_fwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor? base_lse, "
      "Tensor? base_logp, float alpha_0, float alpha_tilde, float center, int splits, int stream) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "residual_bwd(Tensor? base_logits, Tensor q_logits, Tensor actions, Tensor shift, "
      "Tensor log_sum, Tensor coef_p, Tensor coef_a, float alpha_0, float alpha_tilde, "
      "float center, int stream) -> Tensor");
}

QADAPTER_IMPL(QADAPTER_CUDA_LIBRARY, QADAPTER_CUDA_KEY, library) {
  library.impl("residual_fwd", TORCH_BOX(&residual_fwd));
  library.impl("residual_bwd", TORCH_BOX(&residual_bwd));
}

}  // namespace cuda
}  // namespace qadapter
