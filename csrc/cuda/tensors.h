// Small helpers around torch::stable::Tensor for the bindings of the CUDA kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cuda/dtype.h"

// Tests compile the kernels for a host, where they take CPU tensors under a name of their own.
#ifndef QADAPTER_CUDA_LIBRARY
#define QADAPTER_CUDA_LIBRARY qadapter_cuda
#define QADAPTER_CUDA_KEY CUDA
#endif
#define QADAPTER_FRAGMENT(name, library) STABLE_TORCH_LIBRARY_FRAGMENT(name, library)
#define QADAPTER_IMPL(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)

namespace qadapter {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool on_device(const Tensor& t) {
#ifdef QADAPTER_EMULATED
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

inline DType dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "qadapter: expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::f32
                                   : (type == ScalarType::BFloat16 ? DType::bf16 : DType::f16);
}

// [n, vocab] with dense rows, in this dtype.
inline const void* rows(const Tensor& t, DType dtype, int64_t n, int64_t vocab) {
  STD_TORCH_CHECK(t.dim() == 2 && on_device(t) && (t.size(1) <= 1 || t.stride(1) == 1),
                  "qadapter: expected 2-D CUDA logits with dense rows");
  STD_TORCH_CHECK(t.size(0) == n && t.size(1) == vocab && dtype_of(t) == dtype,
                  "qadapter: expected logits of one shape and dtype");
  STD_TORCH_CHECK(vocab < (int64_t{1} << 30), "qadapter: expected fewer than 2^30 columns");
  return t.const_data_ptr();
}

template <class V>
const V* column(const Tensor& t, ScalarType type, int64_t n) {
  STD_TORCH_CHECK(on_device(t) && t.scalar_type() == type && t.is_contiguous() && t.numel() == n,
                  "qadapter: expected a contiguous CUDA tensor with one number per row");
  return static_cast<const V*>(t.const_data_ptr());
}

inline const float* floats(const Tensor& t, int64_t n) {
  return column<float>(t, ScalarType::Float, n);
}
inline const float* floats(const std::optional<Tensor>& t, int64_t n) {
  return t.has_value() ? floats(*t, n) : nullptr;
}
inline const int64_t* int64s(const Tensor& t, int64_t n) {
  return column<int64_t>(t, ScalarType::Long, n);
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

template <class V = float>
V* out(const Tensor& t) {
  return static_cast<V*>(t.mutable_data_ptr());
}

// The launchers' answer: null, or what went wrong.
inline void check(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "qadapter: CUDA: ", error ? error : "");
}

inline void* stream_of(int64_t handle) { return reinterpret_cast<void*>(handle); }

}  // namespace cuda
}  // namespace qadapter
