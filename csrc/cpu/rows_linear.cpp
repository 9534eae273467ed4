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
#include <vector>

#include "cpu/isa.h"
#include "cpu/simd_plain.h"

#define QADAPTER_ROWS_BITS 0
namespace qadapter {
namespace plain {
#include "cpu/rows_linear_sums.h"
#include "cpu/rows_linear_kernel.h"
#include "cpu/lora_kernel.h"
const RowsColumns rows_table[2] = {&rows_columns<float>, &rows_columns<BF16>};
const LoraTable lora_table[2][2] = {
    {lora_functions<float, float>(), lora_functions<float, BF16>()},
    {lora_functions<BF16, float>(), lora_functions<BF16, BF16>()}};
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
#include "cpu/lora_kernel.h"
const RowsColumns rows_table[2] = {&rows_columns<float>, &rows_columns<BF16>};
const LoraTable lora_table[2][2] = {
    {lora_functions<float, float>(), lora_functions<float, BF16>()},
    {lora_functions<BF16, float>(), lora_functions<BF16, BF16>()}};
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
#include "cpu/lora_kernel.h"
const RowsColumns rows_table[2] = {&rows_columns<float>, &rows_columns<BF16>};
const LoraTable lora_table[2][2] = {
    {lora_functions<float, float>(), lora_functions<float, BF16>()},
    {lora_functions<BF16, float>(), lora_functions<BF16, BF16>()}};
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
#include "cpu/lora_kernel.h"
const RowsColumns rows_bf16 = &rows_columns<BF16>;
const LoraTable lora_bf16[2] = {lora_functions<BF16, float>(), lora_functions<BF16, BF16>()};
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

// Calls f(job, first, end) for pieces of the columns of every job's out. Each thread walks a slice
// of the weights from its start, so that it reads one stream and its fetching ahead crosses pieces.
// Who is done takes what is left of the others' slices. Pieces are multiples of `units` columns.
template <class F>
void for_each_columns(const RowsJob* jobs, const int64_t* units, int jobs_count, int64_t element,
                      const F& f) {
  constexpr int64_t kMostThreads = 64;
  constexpr int64_t kPiece = 32768;         // bytes of W
  constexpr int64_t kWorthwhile = 1 << 19;  // work to wake another thread for
  int64_t length[kMostProducts], end[kMostProducts], count = 0, work = 0;  // end: of its pieces
  for (int j = 0; j < jobs_count; ++j) {
    const int64_t row_bytes = std::max<int64_t>(1, jobs[j].k * element);
    // One row of x takes about a fourth of the time in which W is read.
    work += jobs[j].o * row_bytes * (4 + jobs[j].x.count);
    length[j] = (kPiece / row_bytes / units[j] + 1) * units[j];
    end[j] = count += (jobs[j].o + length[j] - 1) / length[j];
  }
  const int64_t threads =
      std::min<int64_t>({kMostThreads, count, std::max<int64_t>(1, work / kWorthwhile),
                         static_cast<int64_t>(torch::stable::get_num_threads())});
  if (threads <= 1) {
    for (int j = 0; j < jobs_count; ++j) f(j, 0, jobs[j].o);
    return;
  }
  struct alignas(64) Next {
    std::atomic<int64_t> piece;
  };
  Next next[kMostThreads];
  for (int64_t t = 0; t < threads; ++t) next[t].piece.store(count * t / threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t thread = begin; thread < stop; ++thread) {
      for (int64_t turn = 0; turn < threads; ++turn) {
        const int64_t slice = (thread + turn) % threads, last = count * (slice + 1) / threads;
        for (;;) {
          const int64_t piece = next[slice].piece.fetch_add(1, std::memory_order_relaxed);
          if (piece >= last) break;
          int j = 0;
          while (piece >= end[j]) ++j;
          const int64_t first = (piece - (j > 0 ? end[j - 1] : 0)) * length[j];
          f(j, first, std::min(jobs[j].o, first + length[j]));
        }
      }
    }
  });
}

}  // namespace

void multiply_rows(RowsJob* jobs, int count, DType dtype, int64_t isa, const AfterColumns& after) {
  STD_TORCH_CHECK(count <= kMostProducts, "qadapter: at most ", kMostProducts, " products at once");
  int64_t units[kMostProducts];
  RowsColumns run[kMostProducts];
  BF16* packed = nullptr;
  for (int j = 0; j < count; ++j) {
    const bool tiles = by_tiles(choose_isa(isa), dtype, jobs[j]);
    units[j] = tiles ? 2 * kTileRows : kVectorRows;
    run[j] = columns_for(isa, dtype, jobs[j]);
#if QADAPTER_X86
    if (tiles && packed == nullptr) {
      thread_local std::vector<BF16> memory;
      const size_t elements = static_cast<size_t>(amx::packed_elements(jobs[j]));
      if (memory.size() < elements) memory.resize(elements);
      amx::pack_x(jobs[j], packed = memory.data());
    }
#endif
    jobs[j].packed = packed;
  }
  for_each_columns(jobs, units, count, bytes_of(dtype), [&](int j, int64_t first, int64_t end) {
    run[j](jobs[j], first, end);
    if (after) after(j, first, end);
  });
}

LoraTable lora_for(int64_t isa, DType x, DType a) {
  const int i = static_cast<int>(x), j = static_cast<int>(a);
#if QADAPTER_X86
  if (x == DType::bf16 && choose_isa(isa) >= Isa::avx512_bf16) return avx512_bf16::lora_bf16[j];
#endif
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
  multiply_rows(&job, 1, dtype, isa);
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def("rows_linear(Tensor x, Tensor weight, Tensor? bias, int isa=-1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("rows_linear", TORCH_BOX(&rows_linear));
}

}  // namespace qadapter
