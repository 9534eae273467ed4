// Small helpers around torch::stable::Tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/types.h"

namespace qadapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "qadapter: expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::f32
                                   : (type == ScalarType::BFloat16 ? DType::bf16 : DType::f16);
}

inline int64_t bytes_of(DType d) { return d == DType::f32 ? 4 : 2; }

// A row of logits: base pointer, bytes from one row to the next.
struct Rows {
  const char* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  Rows(const Tensor& t, DType d) : data(static_cast<const char*>(t.const_data_ptr())) {
    STD_TORCH_CHECK(t.dim() == 2 && t.is_cpu() && (t.size(1) <= 1 || t.stride(1) == 1),
                    "qadapter: expected 2-D CPU logits with dense rows");
    STD_TORCH_CHECK(dtype_of(t) == d, "qadapter: expected logits of one dtype");
    stride = t.stride(0) * bytes_of(d);
  }
  const char* row(int64_t i) const { return data + i * stride; }
};

// The rows of the base, which has the shape and dtype of q_logits; no data where it is missing.
inline Rows base_rows(const std::optional<Tensor>& base_logits, const Tensor& q_logits) {
  if (!base_logits.has_value()) return Rows();
  const Rows rows(*base_logits, dtype_of(q_logits));
  STD_TORCH_CHECK(base_logits->size(0) == q_logits.size(0) &&
                      base_logits->size(1) == q_logits.size(1),
                  "qadapter: base_logits and q_logits differ in shape");
  return rows;
}

inline const float* floats(const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                      t.numel() == n,
                  "qadapter: expected a contiguous float32 CPU tensor with one number per row");
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* floats(const std::optional<Tensor>& t, int64_t n) {
  return t.has_value() ? floats(*t, n) : nullptr;
}

inline const int64_t* int64s(const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.is_contiguous() &&
                      t.numel() == n,
                  "qadapter: expected a contiguous int64 CPU tensor with one number per row");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

inline float* out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace qadapter
