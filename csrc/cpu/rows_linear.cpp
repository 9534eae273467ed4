// y = x W^T (+ bias) for few rows x: the products of a decode step.
//
// W is read once, from its nn.Linear layout. A tile is 4 rows of W by up to 4 rows of x: each pair
// has a vector of partial sums over k, and while one tile is computed the lines of a later one are
// fetched. With AVX512_BF16, bfloat16 goes through vdpbf16ps (pairs multiplied, added in float32;
// subnormal numbers count as 0); elsewhere it is widened to float32 first.
//
// Bytes: W once, 2 O K in bfloat16; x and y are small beside it and stay in the cache. Floor: that
// over the read bandwidth. Operations: 2 M O K; at one vdpbf16ps (64 operations) a cycle they take
// M / 64 cycles per byte of W. A core that reads 4 bytes a cycle is bound by them from M = 16 on.
// AMX (rows_linear_amx.h) has sixteen times that, and takes over above 4 rows. For many rows a
// blocked product, which packs W, is faster: qadapter/ops/few_rows.py has the limits.
//
// What a row gives depends neither on the other rows nor on the threads, and on the number of rows
// only where AMX takes over, which adds up in another order.

#include "cpu/rows_linear.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "cpu/isa.h"
#include "cpu/simd_plain.h"

#define QADAPTER_ROWS_BITS 0
namespace qadapter {
namespace plain {
#include "cpu/rows_linear_sums.h"
#include "cpu/rows_linear_kernel.h"
const RowsColumns rows_table[2] = {&rows_columns<float>, &rows_columns<BF16>};
const LoraRows lora_table[2][2] = {{&lora_rows<float, float>, &lora_rows<float, BF16>},
                                   {&lora_rows<BF16, float>, &lora_rows<BF16, BF16>}};
const OuterColumns outer_table[2] = {&outer_columns<float>, &outer_columns<BF16>};
}  // namespace plain
}  // namespace qadapter
#undef QADAPTER_ROWS_BITS

#if QADAPTER_X86
#define QADAPTER_ROWS_BITS 256
#include "cpu/isa_begin_avx2.h"
#include "cpu/simd_avx2.h"
namespace qadapter {
namespace avx2 {
#include "cpu/rows_linear_sums.h"
#include "cpu/rows_linear_kernel.h"
const RowsColumns rows_table[2] = {&rows_columns<float>, &rows_columns<BF16>};
const LoraRows lora_table[2][2] = {{&lora_rows<float, float>, &lora_rows<float, BF16>},
                                   {&lora_rows<BF16, float>, &lora_rows<BF16, BF16>}};
const OuterColumns outer_table[2] = {&outer_columns<float>, &outer_columns<BF16>};
}  // namespace avx2
}  // namespace qadapter
#include "cpu/isa_end.h"
#undef QADAPTER_ROWS_BITS

#define QADAPTER_ROWS_BITS 512
#include "cpu/isa_begin_avx512.h"
#include "cpu/simd_avx512.h"
namespace qadapter {
namespace avx512 {
#include "cpu/rows_linear_sums.h"
#include "cpu/rows_linear_kernel.h"
const RowsColumns rows_table[2] = {&rows_columns<float>, &rows_columns<BF16>};
const LoraRows lora_table[2][2] = {{&lora_rows<float, float>, &lora_rows<float, BF16>},
                                   {&lora_rows<BF16, float>, &lora_rows<BF16, BF16>}};
const OuterColumns outer_table[2] = {&outer_columns<float>, &outer_columns<BF16>};
}  // namespace avx512
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_avx512_bf16.h"
#define QADAPTER_ROWS_BF16_DOT
namespace qadapter {
namespace avx512_bf16 {
using Simd = avx512::Simd;
#include "cpu/rows_linear_sums.h"
#include "cpu/rows_linear_kernel.h"
const RowsColumns rows_bf16 = &rows_columns<BF16>;
}  // namespace avx512_bf16
}  // namespace qadapter
#undef QADAPTER_ROWS_BF16_DOT
#include "cpu/isa_end.h"
#undef QADAPTER_ROWS_BITS

#include "cpu/isa_begin_amx.h"
namespace qadapter {
namespace amx {
using Simd = avx512::Simd;
#include "cpu/amx_tiles.h"
#include "cpu/rows_linear_amx.h"
}  // namespace amx
}  // namespace qadapter
#include "cpu/isa_end.h"
#endif

namespace qadapter {
namespace {

// Rows of W that a tile of AMX's has; it takes no fewer.
constexpr int64_t kTileRows = 16;
// Of x, AMX takes more than these: vectors read W up to a third faster (docs/kernels-cpu.md).
constexpr int64_t kVectorRows = 4;

bool by_tiles(Isa isa, DType dtype, const RowsJob& job) {
  return isa == Isa::amx && dtype == DType::bf16 && job.o >= kTileRows &&
         job.x.count > kVectorRows;
}

RowsColumns columns_for(int64_t isa, DType dtype, const RowsJob& job) {
  const int d = static_cast<int>(dtype);
#if QADAPTER_X86
  if (by_tiles(choose_isa(isa), dtype, job)) return &amx::rows_columns;
  if (dtype == DType::bf16 && choose_isa(isa) >= Isa::avx512_bf16) return avx512_bf16::rows_bf16;
#endif
  return QADAPTER_FOR_ISA(choose_isa(isa), rows_table)[d];
}

// Calls f(first, end) for pieces of the columns of out. Each thread walks a slice of W from its
// start, so that it reads one stream and its fetching ahead crosses pieces. Who is done takes what
// is left of the others' slices. Pieces are multiples of `unit` columns.
template <class F>
void for_each_columns(const RowsJob& job, int64_t element, int64_t unit, const F& f) {
  constexpr int64_t kMostThreads = 64;
  constexpr int64_t kPiece = 32768;         // bytes of W
  constexpr int64_t kWorthwhile = 1 << 19;  // work to wake another thread for
  // One row of x takes about a fourth of the time in which W is read.
  const int64_t row_bytes = std::max<int64_t>(1, job.k * element);
  const int64_t work = job.o * row_bytes * (4 + job.x.count);
  const int64_t length = (kPiece / row_bytes / unit + 1) * unit, count = (job.o + length - 1) / length;
  const int64_t threads =
      std::min<int64_t>({kMostThreads, count, std::max<int64_t>(1, work / kWorthwhile),
                         static_cast<int64_t>(torch::stable::get_num_threads())});
  if (threads <= 1) return f(0, job.o);
  struct alignas(64) Next {
    std::atomic<int64_t> piece;
  };
  Next next[kMostThreads];
  for (int64_t t = 0; t < threads; ++t) next[t].piece.store(count * t / threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t turn = 0; turn < threads; ++turn) {
        const int64_t slice = (thread + turn) % threads, last = count * (slice + 1) / threads;
        for (;;) {
          const int64_t piece = next[slice].piece.fetch_add(1, std::memory_order_relaxed);
          if (piece >= last) break;
          f(piece * length, std::min(job.o, (piece + 1) * length));
        }
      }
    }
  });
}

}  // namespace

LoraRows lora_for(int64_t isa, DType x, DType a) {
  const int i = static_cast<int>(x), j = static_cast<int>(a);
  return QADAPTER_FOR_ISA(choose_isa(isa), lora_table)[i][j];
}

OuterColumns outer_for(int64_t isa, DType x) {
  return QADAPTER_FOR_ISA(choose_isa(isa), outer_table)[static_cast<int>(x)];
}

Tensor rows_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t isa) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "rows_linear: x: expected float32 or bfloat16, got ", name_of(type));
  STD_TORCH_CHECK(weight.scalar_type() == type, "rows_linear: weight: expected ", name_of(type),
                  " like x, got ", name_of(weight.scalar_type()));
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "rows_linear: expected CPU tensors");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1),
                  "rows_linear: expected x [.., K] and weight [O, K], got ", shape_of(x), " and ",
                  shape_of(weight));
  const DType dtype = type == ScalarType::Float ? DType::f32 : DType::bf16;
  const int64_t element = bytes_of(dtype), o = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(k <= 1 || weight.stride(1) == 1,
                  "rows_linear: weight: expected dense rows, got stride ", weight.stride(1));

  RowsJob job;
  job.bias = nullptr;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == type && bias->dim() == 1 &&
                        bias->size(0) == o && bias->is_contiguous(),
                    "rows_linear: bias: expected a contiguous ", name_of(type), " [", o,
                    "] on the CPU, got ", name_of(bias->scalar_type()), " ", shape_of(*bias));
    job.bias = bias->const_data_ptr();
  }
  if (!view_rows(x, element, job.x)) {
    x = torch::stable::contiguous(x);
    view_rows(x, element, job.x);
  }
  Tensor result = new_rows(x, o);
  if (job.x.count == 0 || o == 0) return result;
  job.x.data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  job.out.data = static_cast<char*>(result.mutable_data_ptr());
  job.out.count = job.x.count;
  job.out.far = o * element;
  job.w = static_cast<const char*>(weight.const_data_ptr());
  job.w_stride = weight.stride(0);
  job.k = k;
  job.o = o;
  const RowsColumns run = columns_for(isa, dtype, job);
  const bool tiles = by_tiles(choose_isa(isa), dtype, job);
#if QADAPTER_X86
  std::optional<Tensor> packed;
  if (tiles) {
    packed = torch::stable::new_empty(x, {amx::packed_elements(job)});
    job.packed = static_cast<BF16*>(packed->mutable_data_ptr());
    amx::pack_x(job, job.packed);
  }
#endif

  for_each_columns(job, element, tiles ? 2 * kTileRows : 4, [&](int64_t first, int64_t end) { run(job, first, end); });
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def("rows_linear(Tensor x, Tensor weight, Tensor? bias, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("rows_linear", TORCH_BOX(&rows_linear));
}

}  // namespace qadapter
