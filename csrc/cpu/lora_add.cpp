// out[start:stop] += scaling (x[start:stop] A^T) B^T in place: one low-rank adapter, on the rows of
// a batch that it belongs to.
//
// All in float32, rounded once at the end, where it is added to out. That is what a float32 adapter
// over a bfloat16 layer gives in PEFT (its sums differ in order).
//
// Bytes: A and B once per 16 rows: 4 r (K + O), 37 KB for r = 8 and K = O = 576; x and out are in
// the cache. Operations: 2 M r (K + O). Beside them, each 16 rows of B are transposed in registers
// (64 shuffles with AVX-512, for any r up to 16), so that no sum runs across lanes; for more than 16
// rows once and into memory, and out is passed row by row. A call for one or two rows is bound by
// its overhead. Rows do not depend on one another.
//
// With AMX, 32 rows of bfloat16 or more go through its tiles (lora_amx.h), A, B and x A^T as sums of
// three bfloat16 each, which are theirs exactly. What a row gives then depends on the number of rows
// in that one place.
//
// lora_outer is what training needs beside it, the gradients of A and B: low^T x, summed in float32
// over all rows by one thread a piece of columns, so that threads do not change the sums.
//
// lora_bwd_ is all of a backward that is of low rank, in one call: a layer of 1,400 rows takes one
// or two milliseconds, and a dozen calls from Python for less than that each would be felt.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/drivers.h"
#include "cpu/isa.h"
#include "cpu/layer_rows.h"

#if QADAPTER_X86
#include "cpu/simd_plain.h"
#include "cpu/isa_begin_avx512.h"
#include "cpu/simd_avx512.h"
#include "cpu/isa_end.h"

#include "cpu/isa_begin_amx.h"
namespace qadapter {
namespace amx {
using Simd = avx512::Simd;
#include "cpu/amx_tiles.h"
#include "cpu/lora_amx.h"
}  // namespace amx
}  // namespace qadapter
#include "cpu/isa_end.h"
#endif

namespace qadapter {
namespace {

// Of this thread, until it asks again.
float* memory_of(int64_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(floats)) memory.resize(floats);
  return memory.data();
}

constexpr int64_t kTileRows = 32;    // of a block of AMX's; it takes no fewer
constexpr int64_t kOuterRows = 256;  // from which on AMX is faster in lora_outer

// Whether AMX takes rows of x, which lie `stride` bytes apart.
[[maybe_unused]] bool by_tiles(int64_t isa, DType dtype, const RowView& x, int64_t least,
                               int64_t& stride) {
  stride = x.inner == 1 ? x.far : x.near;
  const bool even = x.inner == 1 || x.count <= x.inner || x.far == x.inner * x.near;
  return choose_isa(isa) == Isa::amx && dtype == DType::bf16 && x.count >= least && even;
}

DType lora_dtype(const Tensor& t, const char* name, const char* op = "lora_add_") {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": ", name,
                  ": expected float32 or bfloat16, got ", name_of(type));
  return type == ScalarType::Float ? DType::f32 : DType::bf16;
}

// Rows [start, stop) of the first dimension.
RowView rows_between(const Tensor& t, DType dtype, int64_t start, int64_t stop, const char* name) {
  const int64_t element = bytes_of(dtype), dims = t.dim();
  STD_TORCH_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1, "lora_add_: ", name,
                  ": expected dense rows, got stride ", t.stride(dims - 1));
  RowView view;
  view.inner = dims == 3 ? t.size(1) : 1;
  view.near = dims == 3 ? t.stride(1) * element : 0;
  view.far = t.stride(0) * element;
  view.count = (stop - start) * view.inner;
  view.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + start * view.far;
  return view;
}

}  // namespace

void lora_add_(Tensor out, Tensor x, Tensor lora_a, Tensor lora_b, double scaling, int64_t start,
               int64_t stop, std::optional<Tensor> low, int64_t isa) {
  const DType dtype = lora_dtype(x, "x"), low_rank = lora_dtype(lora_a, "lora_a");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "lora_add_: out: expected ",
                  name_of(x.scalar_type()), " like x, got ", name_of(out.scalar_type()));
  STD_TORCH_CHECK(lora_b.scalar_type() == lora_a.scalar_type(), "lora_add_: lora_b: expected ",
                  name_of(lora_a.scalar_type()), " like lora_a, got ",
                  name_of(lora_b.scalar_type()));
  STD_TORCH_CHECK(out.is_cpu() && x.is_cpu() && lora_a.is_cpu() && lora_b.is_cpu(),
                  "lora_add_: expected CPU tensors");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK((dims == 2 || dims == 3) && out.dim() == dims && out.size(0) == x.size(0) &&
                      (dims == 2 || out.size(1) == x.size(1)) && lora_a.dim() == 2 &&
                      lora_a.size(1) == x.size(dims - 1) && lora_b.dim() == 2 &&
                      lora_b.size(0) == out.size(dims - 1) && lora_b.size(1) == lora_a.size(0),
                  "lora_add_: expected out [rows, (T,) O], x [rows, (T,) K], lora_a [r, K] and "
                  "lora_b [O, r], got ",
                  shape_of(out), ", ", shape_of(x), ", ", shape_of(lora_a), " and ",
                  shape_of(lora_b));
  STD_TORCH_CHECK(start >= 0 && start <= stop && stop <= x.size(0),
                  "lora_add_: start, stop: expected 0 <= start <= stop <= ", x.size(0), ", got ",
                  start, " and ", stop);
  STD_TORCH_CHECK((lora_a.size(1) <= 1 || lora_a.stride(1) == 1) &&
                      (lora_b.size(1) <= 1 || lora_b.stride(1) == 1),
                  "lora_add_: lora_a, lora_b: expected dense rows");

  LoraJob job;
  job.x = rows_between(x, dtype, start, stop, "x");
  job.out = rows_between(out, dtype, start, stop, "out");
  job.a = static_cast<const char*>(lora_a.const_data_ptr());
  job.b = static_cast<const char*>(lora_b.const_data_ptr());
  job.a_stride = lora_a.stride(0);
  job.b_stride = lora_b.stride(0);
  job.k = lora_a.size(1);
  job.o = lora_b.size(0);
  job.r = lora_a.size(0);
  job.scaling = static_cast<float>(scaling);
  const int64_t rows = job.x.count;
  if (low.has_value()) {
    STD_TORCH_CHECK(low->is_cpu() && low->scalar_type() == ScalarType::Float && low->dim() == 2 &&
                        low->size(0) == rows && low->size(1) == job.r && low->is_contiguous(),
                    "lora_add_: low: expected a contiguous float32 [", rows, ", ", job.r,
                    "] on the CPU, got ", name_of(low->scalar_type()), " ", shape_of(*low));
    job.low = static_cast<float*>(low->mutable_data_ptr());
  }
  if (rows == 0 || job.r == 0 || (job.o == 0 && job.low == nullptr)) return;

#if QADAPTER_X86
  int64_t x_stride;
  if (by_tiles(isa, dtype, job.x, kTileRows, x_stride)) {
    Tensor packed = torch::stable::new_empty(x, {amx::lora_elements(job)});
    BF16* tiles = static_cast<BF16*>(packed.mutable_data_ptr());
    BF16* room = reinterpret_cast<BF16*>(memory_of(amx::pack_memory(job) / 2 + 1));
    (low_rank == DType::f32 ? amx::pack_lora<float> : amx::pack_lora<BF16>)(job, tiles, room);
    const int64_t work = kTileRows * job.r * (job.k + job.o), floats = amx::block_memory(job);
    for_each_piece((rows + kTileRows - 1) / kTileRows, work, [&](int64_t piece) {
      amx::lora_block(job, tiles, x_stride, piece * kTileRows, memory_of(floats));
    });
    return;
  }
#endif
  const LoraTable run = lora_for(isa, dtype, low_rank);
  Tensor packed;
  float* turned = nullptr;
  if (rows > kLoraRows && job.o > 0) {
    packed = torch::stable::new_empty(x, {job.r * lora_columns(job.o)}, ScalarType::Float);
    run.pack(job, turned = static_cast<float*>(packed.mutable_data_ptr()));
  }
  const int64_t work = std::min(rows, kLoraRows) * job.r * (job.k + job.o);
  for_each_piece((rows + kLoraRows - 1) / kLoraRows, work, [&](int64_t piece) {
    const int64_t first = piece * kLoraRows, end = std::min(rows, first + kLoraRows);
    float* h = memory_of(kLoraRows * lora_stride(job.r));
    run.low(job, first, end, h);
    if (turned) {
      run.rows(job, turned, first, end, h);
    } else {
      run.delta(job, first, end, h, 0, job.o);
    }
  });
}

Tensor lora_outer(Tensor low, Tensor x, double scaling, int64_t isa) {
  const DType dtype = lora_dtype(x, "x", "lora_outer");
  STD_TORCH_CHECK(low.is_cpu() && x.is_cpu(), "lora_outer: expected CPU tensors");
  STD_TORCH_CHECK(low.scalar_type() == ScalarType::Float && low.dim() == 2 && x.dim() == 2 &&
                      low.size(0) == x.size(0) && low.is_contiguous(),
                  "lora_outer: expected contiguous float32 low [N, r] and x [N, K], got ",
                  name_of(low.scalar_type()), " ", shape_of(low), " and ", shape_of(x));
  OuterJob job;
  job.x = layer_rows(x, bytes_of(dtype));
  Tensor out = torch::stable::new_empty(low, {low.size(1), x.size(1)});
  job.low = static_cast<const float*>(low.const_data_ptr());
  job.out = static_cast<float*>(out.mutable_data_ptr());
  job.k = x.size(1);
  job.r = low.size(1);
  job.scaling = static_cast<float>(scaling);
#if QADAPTER_X86
  int64_t x_stride;
  if (by_tiles(isa, dtype, job.x, kOuterRows, x_stride)) {
    constexpr int64_t kColumns = 64;
    Tensor packed = torch::stable::new_empty(x, {amx::low_elements(job)});
    BF16* tiles = static_cast<BF16*>(packed.mutable_data_ptr());
    amx::pack_low(job, tiles);
    const int64_t pieces = (job.k + kColumns - 1) / kColumns;
    for_each_piece(pieces, x.size(0) * job.r * kColumns, [&](int64_t piece) {
      const int64_t first = piece * kColumns, end = std::min(job.k, first + kColumns);
      amx::outer_tiles(job, tiles, first, end, memory_of(amx::outer_memory(job)));
    });
    return out;
  }
#endif
  const OuterColumns run = outer_for(isa, dtype);
  const int64_t pieces = (job.k + kOuterColumns - 1) / kOuterColumns;
  for_each_piece(pieces, x.size(0) * job.r * kOuterColumns, [&](int64_t piece) {
    const int64_t first = piece * kOuterColumns;
    run(job, first, std::min(job.k, first + kOuterColumns));
  });
  return out;
}

// dx += s (g B) A; dA = s (g B)^T x [r, K] and dB = s g^T low [O, r], float32. Where dx has no
// columns it is left out.
std::tuple<Tensor, Tensor> lora_bwd_(Tensor dx, Tensor grad, Tensor x, Tensor low, Tensor lora_a,
                                     Tensor lora_b, double scaling, int64_t isa) {
  STD_TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2 && grad.dim() == 2 && x.dim() == 2,
                  "lora_bwd_: expected grad [N, O], x [N, K], lora_a [r, K] and lora_b [O, r], got ",
                  shape_of(grad), ", ", shape_of(x), ", ", shape_of(lora_a), " and ",
                  shape_of(lora_b));
  const auto turned = [](const Tensor& t) {
    return torch::stable::contiguous(torch::stable::transpose(t, 0, 1));
  };
  Tensor up = dx.size(1) == 0 ? torch::stable::new_empty(lora_a, {0, lora_a.size(0)})
                              : turned(lora_a);
  Tensor grad_low = torch::stable::new_empty(low, {grad.size(0), lora_a.size(0)});
  lora_add_(dx, grad, turned(lora_b), up, scaling, 0, grad.size(0), grad_low, isa);
  return {lora_outer(grad_low, x, scaling, isa), turned(lora_outer(low, grad, scaling, isa))};
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "lora_bwd_(Tensor(a!) dx, Tensor grad, Tensor x, Tensor low, Tensor lora_a, Tensor lora_b, "
      "float scaling, int isa=-1) -> (Tensor, Tensor)");
  library.def(
      "lora_add_(Tensor(a!) out, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, int start, "
      "int stop, Tensor(b!)? low=None, int isa=-1) -> ()");
  library.def("lora_outer(Tensor low, Tensor x, float scaling, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("lora_bwd_", TORCH_BOX(&lora_bwd_));
  library.impl("lora_add_", TORCH_BOX(&lora_add_));
  library.impl("lora_outer", TORCH_BOX(&lora_outer));
}

}  // namespace qadapter
