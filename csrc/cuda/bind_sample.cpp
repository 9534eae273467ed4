// Binding of the sampler's kernels. The caller has made the logits' device current, and hands over
// its current stream.

#include "cuda/sample.h"

#include <cmath>
#include <tuple>

#include "cuda/tensors.h"

namespace qadapter {
namespace cuda {
namespace {

// A column of the device, one number of it or one per row; null for a number on the host, which
// goes by value.
template <class V>
const V* column_or_value(const Tensor& t, ScalarType type, int64_t n, V* value) {
  if (!t.is_cpu() || t.numel() != 1) return column<V>(t, type, t.numel() == 1 ? 1 : n);
  STD_TORCH_CHECK(t.scalar_type() == type, "qadapter: expected a number of another type");
  *value = *static_cast<const V*>(t.const_data_ptr());
  return nullptr;
}

std::tuple<Tensor, Tensor> sample(std::optional<Tensor> base_logits, Tensor q_logits, Tensor scale,
                                  Tensor base_weight, Tensor seed, Tensor position, bool greedy,
                                  int64_t top_k, double top_p, double min_p, int64_t stream) {
  const DType dtype = dtype_of(q_logits);
  const int64_t n = q_logits.size(0), vocab = q_logits.size(1);
  STD_TORCH_CHECK(vocab > 0, "qadapter: expected at least one column of logits");
  // Masses of a whole row fit 64 bits.
  STD_TORCH_CHECK(vocab < (int64_t{1} << 22), "qadapter: expected fewer than 2^22 columns");
  Tensor tokens = torch::stable::new_empty(q_logits, {n}, ScalarType::Long);
  Tensor logprobs = new_floats(q_logits, {n});
  SampleArgs a = {};
  a.q = rows(q_logits, dtype, n, vocab);
  a.q_stride = q_logits.stride(0);
  if (base_logits.has_value()) {
    a.base = rows(*base_logits, dtype, n, vocab);
    a.base_stride = base_logits->stride(0);
  }
  const auto step = [](const Tensor& t) { return t.numel() == 1 ? 0 : 1; };
  a.scale = column_or_value(scale, ScalarType::Double, n, &a.scale_value);
  a.weight = column_or_value(base_weight, ScalarType::Double, n, &a.weight_value);
  a.scale_step = step(scale), a.weight_step = step(base_weight);
  a.shared_seed = seed.numel() != n;
  a.seed = column_or_value(seed, ScalarType::Long, n, &a.seed_value);
  a.position_step = step(position);
  a.position = column_or_value(position, ScalarType::Long, n, &a.position_value);
  a.greedy = greedy;
  a.top_k = top_k > 0 && top_k < vocab ? static_cast<int>(top_k) : 0;
  a.top_p = top_p, a.by_p = top_p < 1.0;
  a.by_min = min_p > 0.0, a.log_min_p = a.by_min ? std::log(min_p) : 0.0;
  a.tokens = out<int64_t>(tokens), a.logprobs = out(logprobs);
  a.batch = n;
  a.vocab = static_cast<int>(vocab);
  a.groups = (a.vocab + kSampleGroup - 1) / kSampleGroup;
  if (n == 0) return {tokens, logprobs};

  Tensor statistics = new_floats(q_logits, {2, n, a.groups});
  a.group_max = out(statistics);
  a.group_sum = a.group_max + n * a.groups;
  check(launch_sample_blocks(a, dtype, stream_of(stream)));
  if (a.top_k == 0 && !a.by_p && !a.by_min) {
    check(launch_sample_draw(a, dtype, stream_of(stream)));
    return {tokens, logprobs};
  }
  // kept first: 8-byte elements on 8-byte boundaries
  Tensor workspace = torch::stable::new_empty(q_logits, {2, n, a.groups}, ScalarType::Long);
  a.kept = out<uint64_t>(workspace);
  a.list = reinterpret_cast<int*>(a.kept + n * a.groups);
  a.ties = a.list + n * a.groups;
  check(launch_sample_filter(a, dtype, stream_of(stream)));
  return {tokens, logprobs};
}

}  // namespace

QADAPTER_FRAGMENT(QADAPTER_CUDA_LIBRARY, library) {
  library.def(
      "sample(Tensor? base_logits, Tensor q_logits, Tensor scale, Tensor base_weight, Tensor seed, "
      "Tensor position, bool greedy, int top_k, float top_p, float min_p, int stream) "
      "-> (Tensor, Tensor)");
}

QADAPTER_IMPL(QADAPTER_CUDA_LIBRARY, QADAPTER_CUDA_KEY, library) {
  library.impl("sample", TORCH_BOX(&sample));
}

}  // namespace cuda
}  // namespace qadapter
