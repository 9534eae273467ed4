// What rows_linear.cpp, lora_add.cpp and their vector code share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "cpu/tensors.h"
#include "cpu/types.h"

namespace qadapter {

// The rows of a tensor [.., columns], numbered from 0: row i of the leading dimensions flattened.
struct RowView {
  char* data = nullptr;
  int64_t count = 0;   // rows
  int64_t inner = 1;   // rows i of one value of i / inner lie `near` bytes apart,
  int64_t near = 0;    // their groups `far`
  int64_t far = 0;

  char* row(int64_t i) const {
    return inner == 1 ? data + i * far : data + i / inner * far + i % inner * near;
  }
};

// One product of few rows: out[i][o] = sum_k x[i][k] w[o][k] (+ bias[o]).
struct RowsJob {
  RowView x, out;
  const char* w;
  const void* bias;  // may be null; of the dtype of w
  int64_t w_stride;  // elements
  int64_t k;
  int64_t o;
  const BF16* packed = nullptr;  // x as AMX's kernel wants it, for all threads
};

// Columns [first, end) of out, for all rows.
using RowsColumns = void (*)(const RowsJob&, int64_t first, int64_t end);

// All products of the same rows x, at most kMostProducts, shared out among the threads as one.
// after(job, first, end), where it is given: when columns [first, end) of that job's out are there,
// by the thread that has made them.
constexpr int kMostProducts = 3;
using AfterColumns = std::function<void(int job, int64_t first, int64_t end)>;
void multiply_rows(RowsJob* jobs, int count, DType dtype, int64_t isa,
                   const AfterColumns& after = nullptr);

// out[i] += scaling * (x[i] A^T) B^T for the rows of x.
struct LoraJob {
  RowView x, out;
  const char *a, *b;
  int64_t a_stride, b_stride;  // elements
  int64_t k, o, r;
  float scaling;
  float* low = nullptr;  // takes x A^T [rows, r], where it is wanted
};

// h = x A^T of rows [first, end), at most kLoraRows; h: kLoraRows * lora_stride(r) floats.
using LoraLow = void (*)(const LoraJob&, int64_t first, int64_t end, float* h);
// What h gives, added to columns [from, to) of these rows of out.
using LoraDelta = void (*)(const LoraJob&, int64_t first, int64_t end, const float* h, int64_t from,
                           int64_t to);
// For more rows than that: B^T as vectors, r * lora_columns(o) floats, and all columns with it.
using LoraPack = void (*)(const LoraJob&, float* packed);
using LoraRows = void (*)(const LoraJob&, const float* packed, int64_t first, int64_t end,
                          const float* h);
struct LoraTable {
  LoraLow low;
  LoraDelta delta;
  LoraPack pack;
  LoraRows rows;
};

// The code for x and out of dtype x, A and B of dtype a (float32 or bfloat16); isa as elsewhere.
LoraTable lora_for(int64_t isa, DType x, DType a);

// out[j][c] = scaling * sum_i low[i][j] x[i][c] for columns [first, end) of x.
struct OuterJob {
  RowView x;
  const float* low;  // [rows of x, r]
  float* out;        // [r, k]
  int64_t k, r;
  float scaling;
};
using OuterColumns = void (*)(const OuterJob&, int64_t first, int64_t end);
OuterColumns outer_for(int64_t isa, DType x);
constexpr int64_t kOuterColumns = 32;  // of a piece: the widest vectors, twice

constexpr int64_t kLoraRows = 16;  // most rows of a call of LoraLow

inline int64_t lora_stride(int64_t r) { return (r + 3) / 4 * 4; }  // floats of a row of x A^T
inline int64_t lora_columns(int64_t o) { return (o + 31) / 32 * 32; }  // two of the widest vectors

// "[2, 3]", for errors.
inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline const char* name_of(ScalarType type) {
  return type == ScalarType::Float      ? "float32"
         : type == ScalarType::BFloat16 ? "bfloat16"
         : type == ScalarType::Half     ? "float16"
         : type == ScalarType::Double   ? "float64"
                                        : "another dtype";
}

// Whether the rows of t can be had as a RowView (of two strides, each row dense).
inline bool view_rows(const Tensor& t, int64_t element, RowView& view) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return false;
  int64_t size[2] = {1, 1}, stride[2] = {0, 0}, groups = 0;  // from the innermost dimension out
  view.count = 1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    view.count *= sizes[d];
    if (sizes[d] == 1) continue;
    if (groups > 0 && strides[d] == size[groups - 1] * stride[groups - 1]) {
      size[groups - 1] *= sizes[d];
    } else if (groups == 2) {
      return false;
    } else {
      size[groups] = sizes[d];
      stride[groups++] = strides[d];
    }
  }
  const bool two = groups == 2;
  view.inner = two ? size[0] : 1;
  view.near = two ? stride[0] * element : 0;
  view.far = stride[two ? 1 : 0] * element;
  return true;
}

// An uninitialized [sizes of x but the last.., o]. The dispatcher's way to it takes longer.
inline Tensor new_rows(const Tensor& x, int64_t o) {
  constexpr int64_t kMostDims = 8;
  const auto sizes = x.sizes();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dims <= kMostDims, "qadapter: expected at most 8 dimensions, got ",
                  shape_of(x));
  int64_t size[kMostDims], stride[kMostDims], step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    size[d] = d == dims - 1 ? o : sizes[d];
    stride[d] = step;
    step *= std::max<int64_t>(1, size[d]);
  }
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, size, stride, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace qadapter
