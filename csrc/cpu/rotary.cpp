// Rotary position embedding of one tensor of heads, and its gradient; cos and sin have none.
//
//   y  = x cos + [-x2, x1] sin            x = [x1, x2], halves of the last dimension
//   dx = g cos + [g2 sin2, -g1 sin1]      g: the gradient of y
//
// In float32. Forward rounds as transformers' apply_rotary_pos_emb does: both products to the
// dtype, and their sum; so its values are the same, bit for bit. Backward rounds once.
//
// The result lies as a layer's products give their heads, [B, T, H, D]: attention reads it so, and
// the gradient goes into products without a copy. Rows are taken in that order.
//
// Bytes, s an element: x read, y written, 2 s; cos and sin are read again from the cache. Eager
// PyTorch makes four temporaries of the size of x, 11 s.

#include "cpu/rotary.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/drivers.h"
#include "cpu/layer_rows.h"

#define QADAPTER_KERNEL "cpu/rotary_kernel.h"
#include "cpu/isa_each.h"

namespace qadapter {
namespace {

const char* check_angles(const Tensor& t, const char* name, const Tensor& x, int64_t element,
                         int64_t strides[2]) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == 3 &&
                      (t.size(0) == 1 || t.size(0) == x.size(0)) && t.size(1) == x.size(2) &&
                      t.size(2) == x.size(3) && (t.size(2) <= 1 || t.stride(2) == 1),
                  "rotary: ", name, ": expected ", name_of(x.scalar_type()),
                  " [1 or B, T, D] like x ", shape_of(x), " with dense rows, got ",
                  name_of(t.scalar_type()), " ", shape_of(t));
  strides[0] = t.size(0) == 1 ? 0 : t.stride(0) * element;
  strides[1] = t.stride(1) * element;
  return static_cast<const char*>(t.const_data_ptr());
}

}  // namespace

const RotaryTable& rotary_for(int64_t isa, DType dtype) {
  return QADAPTER_FOR_ISA(choose_isa(isa), rotary_tables)[static_cast<int>(dtype)];
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, bool back, int64_t isa) {
  const DType dtype = layer_dtype(x, "rotary: x");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0,
                  "rotary: x: expected [B, H, T, D] with D even, got ", shape_of(x));
  if (x.size(3) > 1 && x.stride(3) != 1) x = torch::stable::contiguous(x);
  const int64_t element = bytes_of(dtype);
  RotaryJob job;
  job.cos = check_angles(cos, "cos", x, element, job.cos_strides);
  job.sin = check_angles(sin, "sin", x, element, job.sin_strides);
  Tensor memory = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
  Tensor out = torch::stable::transpose(memory, 1, 2);
  job.x = static_cast<const char*>(x.const_data_ptr());
  for (int d = 0; d < 3; ++d) job.x_strides[d] = x.stride(d) * element;
  for (int d = 0; d < 3; ++d) job.out_strides[d] = out.stride(d) * element;
  job.out = static_cast<char*>(out.mutable_data_ptr());
  job.heads = x.size(1);
  job.tokens = x.size(2);
  job.half = x.size(3) / 2;
  const int64_t rows = x.size(0) * job.heads * job.tokens;
  if (rows == 0 || job.half == 0) return out;
  const RotaryTable& table = rotary_for(isa, dtype);
  const RotaryRows run = back ? table.bwd : table.fwd;
  const int64_t each = kLayerPiece / (2 * job.half) + 1;
  for_each_piece((rows + each - 1) / each, each * 2 * job.half, [&](int64_t piece) {
    run(job, piece * each, std::min(rows, (piece + 1) * each));
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def("rotary(Tensor x, Tensor cos, Tensor sin, bool back, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("rotary", TORCH_BOX(&rotary));
}

}  // namespace qadapter
