// Binding of linear_chunk.cu. The caller has made the chunk's device current, and hands over its
// current stream.

#include "cuda/linear_chunk.h"

#include "common/contract.h"
#include "cuda/tensors.h"

namespace qadapter {
namespace cuda {
namespace {

float* chunk(const Tensor& t, int64_t n, int64_t vocab) {
  STD_TORCH_CHECK(on_device(t) && t.scalar_type() == ScalarType::Float && t.dim() == 2 &&
                      t.is_contiguous() && t.size(0) >= n && t.size(1) >= vocab &&
                      t.size(1) % 32 == 0,
                  "qadapter: expected a contiguous float32 CUDA chunk [rows, stride], stride a "
                  "multiple of 32");
  return out(t);
}

// Statistics of the first rows of `z` [rows, stride], and p over its storage, if there is a p.
void linear_chunk(Tensor z, std::optional<Tensor> base_z, std::optional<Tensor> p,
                  std::optional<Tensor> bias, Tensor actions, Tensor statistics, int64_t vocab,
                  double m, double scale, double logit_scale, double softcap, bool sum_base,
                  int64_t cluster_wanted, int64_t stream) {
  const int64_t n = actions.numel();
  ChunkArgs a = {};
  a.z = chunk(z, n, vocab);
  a.stride = z.size(1);
  a.rows = n;
  a.vocab = static_cast<int>(vocab);
  if (base_z.has_value()) {
    a.base_z = chunk(*base_z, n, vocab);
    STD_TORCH_CHECK(base_z->size(1) == a.stride, "qadapter: expected chunks of one stride");
  }
  if (bias.has_value()) a.bias = floats(*bias, a.stride);
  a.actions = int64s(actions, n);
  const int64_t columns = base_z.has_value() ? 2 * kBaseRow : kBaseRow;
  STD_TORCH_CHECK(on_device(statistics) && statistics.scalar_type() == ScalarType::Float &&
                      statistics.dim() == 2 && statistics.size(0) >= columns &&
                      statistics.size(1) == n && (n == 1 || statistics.stride(1) == 1),
                  "qadapter: expected float32 CUDA statistics, a row for each");
  a.statistics = out(statistics);
  a.statistics_stride = statistics.stride(0);
  DType p_dtype = DType::f32;
  if (p.has_value()) {
    p_dtype = dtype_of(*p);
    const int64_t width = p_dtype == DType::f32 ? 4 : 2;
    a.p = p->mutable_data_ptr();
    a.p_stride = p->stride(0);
    // The upper half of each row for 16 bits, the row itself for float32.
    const char* expected = reinterpret_cast<const char*>(a.z) + a.stride * (4 - width);
    STD_TORCH_CHECK(a.p == expected && a.p_stride * width == a.stride * 4,
                    "qadapter: expected p in the upper part of each row of the chunk");
  }
  a.m = static_cast<float>(m);
  a.scale = static_cast<float>(scale);
  a.base_scale = static_cast<float>(kLog2E);
  a.head.logit_scale = static_cast<float>(logit_scale);
  a.head.softcap = static_cast<float>(softcap);
  a.head.cap_inverse = softcap == 0.0 ? 0.0f : static_cast<float>(1.0 / softcap);
  a.sum_base = sum_base;
  if (n == 0) return;
  const int cluster = chunk_cluster(a, static_cast<int>(cluster_wanted), &a.units_per_block);
  check(launch_linear_chunk(a, p_dtype, cluster, stream_of(stream)));
}

}  // namespace

QADAPTER_FRAGMENT(QADAPTER_CUDA_LIBRARY, library) {
  library.def(
      "linear_chunk(Tensor(a!) z, Tensor? base_z, Tensor(b!)? p, Tensor? bias, Tensor actions, "
      "Tensor(c!) statistics, int vocab, float m, float scale, float logit_scale, float softcap, "
      "bool sum_base, int cluster, int stream) -> ()");
}

QADAPTER_IMPL(QADAPTER_CUDA_LIBRARY, QADAPTER_CUDA_KEY, library) {
  library.impl("linear_chunk", TORCH_BOX(&linear_chunk));
}

}  // namespace cuda
}  // namespace qadapter
