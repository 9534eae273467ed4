// RMSNorm and its gradient with respect to x; the weight is frozen.
//
//   y  = w * round(x r)                r = 1 / sqrt(mean(x^2) + eps)
//   dx = r g w - x r^3 mean(x g w)     g: the gradient of y
//
// In float32. Forward rounds as transformers' LlamaRMSNorm does: x r to the dtype, and the product
// with w again. Backward takes x r as not rounded, as autograd does, recomputes r, and rounds once.
//
// Bytes, s an element: forward reads x and writes y, 2 s; backward reads x and g and writes dx, 3 s;
// a row is read again from L1. For 1400 x 576 in bfloat16 3.2 and 4.8 MB. Eager PyTorch goes over
// float32 temporaries: 36 bytes an element forward where s = 2, against 4.
//
// Rows do not depend on one another, nor on the threads.

#include "cpu/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/drivers.h"
#include "cpu/layer_rows.h"

#define QADAPTER_KERNEL "cpu/rms_norm_kernel.h"
#include "cpu/isa_each.h"

namespace qadapter {
namespace {

DType check_norm(const Tensor& x, const Tensor& weight) {
  const DType dtype = layer_dtype(x, "rms_norm: x");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && weight.dim() == 1 && weight.size(0) == x.size(dims - 1),
                  "rms_norm: expected x [.., D] and weight [D], got ", shape_of(x), " and ",
                  shape_of(weight));
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == x.scalar_type() &&
                      weight.is_contiguous(),
                  "rms_norm: weight: expected a contiguous ", name_of(x.scalar_type()),
                  " CPU tensor like x, got ", name_of(weight.scalar_type()));
  return dtype;
}

void run_rows(const NormJob& job, NormRows run) {
  const int64_t rows = job.x.count, each = kLayerPiece / job.columns + 1;
  for_each_piece((rows + each - 1) / each, each * job.columns, [&](int64_t piece) {
    run(job, piece * each, std::min(rows, (piece + 1) * each));
  });
}

// x may become a dense copy of itself.
NormJob norm_job(Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  NormJob job;
  job.x = layer_rows(x, bytes_of(layer_dtype(x, "rms_norm: x")));
  job.out = static_cast<char*>(out.mutable_data_ptr());
  job.weight = weight.const_data_ptr();
  job.columns = weight.size(0);
  job.eps = static_cast<float>(eps);
  return job;
}

}  // namespace

const NormTable& norm_for(int64_t isa, DType dtype) {
  return QADAPTER_FOR_ISA(choose_isa(isa), norm_tables)[static_cast<int>(dtype)];
}

Tensor rms_norm_fwd(Tensor x, Tensor weight, double eps, int64_t isa) {
  const DType dtype = check_norm(x, weight);
  Tensor y = new_rows(x, weight.size(0));
  const NormJob job = norm_job(x, weight, eps, y);
  if (job.columns > 0) run_rows(job, norm_for(isa, dtype).fwd);
  return y;
}

Tensor rms_norm_bwd(Tensor grad, Tensor x, Tensor weight, double eps, int64_t isa) {
  const DType dtype = check_norm(x, weight);
  check_alike(grad, "rms_norm: grad", x, "x");
  Tensor dx = new_rows(x, weight.size(0));
  NormJob job = norm_job(x, weight, eps, dx);
  job.grad = layer_rows(grad, bytes_of(dtype));
  if (job.columns > 0) run_rows(job, norm_for(isa, dtype).bwd);
  return dx;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def("rms_norm_fwd(Tensor x, Tensor weight, float eps, int isa) -> Tensor");
  library.def("rms_norm_bwd(Tensor grad, Tensor x, Tensor weight, float eps, int isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  library.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace qadapter
