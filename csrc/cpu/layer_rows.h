// What the elementwise kernels of a decoder layer share (rms_norm.cpp, silu_mul.cpp).
#pragma once

#include <algorithm>

#include "cpu/rows_linear.h"

namespace qadapter {

// Elements of a piece of work: enough to make taking it cheap, few enough to share out.
constexpr int64_t kLayerPiece = 16384;

inline DType layer_dtype(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  ": expected float32 or bfloat16, got ", name_of(type));
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  return type == ScalarType::Float ? DType::f32 : DType::bf16;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// `t` has the shape and dtype of `like`, whose name is given.
inline void check_alike(const Tensor& t, const char* name, const Tensor& like, const char* other) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == like.scalar_type(), name, ": expected a ",
                  name_of(like.scalar_type()), " CPU tensor like ", other, ", got ",
                  name_of(t.scalar_type()));
  STD_TORCH_CHECK(same_shape(t, like), name, ": expected ", shape_of(like), " like ", other,
                  ", got ", shape_of(t));
}

// The rows of `t`, which becomes a dense copy where two strides do not reach them.
inline RowView layer_rows(Tensor& t, int64_t element) {
  RowView view;
  if (!view_rows(t, element, view)) {
    t = torch::stable::contiguous(t);
    view_rows(t, element, view);
  }
  view.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return view;
}

// The elements of `t` in order; a dense copy where they are not.
inline const void* dense(Tensor& t) {
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  return t.const_data_ptr();
}

}  // namespace qadapter
