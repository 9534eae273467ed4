// The two streams' statistics from hidden states: the head's product, the softmax and the
// gradient's product in one walk over the vocabulary, without any [rows, V] of logits.
//
//   z = cap tanh(s / cap), s = scale (h . W_j + bias_j)        x_j = z_q[j] + m z_b[j]
//   value = alpha_tilde lse(x / alpha_tilde) - alpha_0 lse(z_b)
//   u = sum_{j != a} p_j slope_j W_j,  p = softmax(x / alpha_tilde)
//
// A thread takes a block of up to 256 rows (AMX: 384) through the vocabulary in tiles of 128 or 256
// columns. Of each tile it packs W, multiplies into a float32 tile of logits per stream, updates
// the rows' running (max, sum) pairs, turns the tile into p (relative to the running maximum, the
// action's column 0), and adds p W to u in float32; where a maximum grew, that row of u is
// multiplied first. u is divided by the sum and rounded once, at the end.
//
// Operations: 2 N V D for each of up to three products (base, q, p W); a cached base_lse saves the
// first. Floor: that over the rate of multiply-adds: one AVX-512 instruction a cycle on Zen 4, 32
// operations in float32, 64 with AVX512_BF16. Beside it, of the products' cycles for R = 256: 1-2 %
// to pack each element of W twice, 2-4 % for the logits (about 12 cycles per 16 of a stream,
// against D / 2 a product in bf16). Bytes: W once per block, 1 byte per 256 operations a product.
// AMX does 1024 operations a cycle while its operands are near: it is bound by the second-level
// cache, which the left side comes from, and by memory, which W comes from; and the logits weigh six
// times as much beside it.
//
// Memory per thread: R (4 D or 2 D for each stream, 4 D for u, 1 KB of tiles) and a panel of W,
// bounded whatever N, V and the number of threads are. What a row gives depends on neither the
// block it is in nor on the threads: V and D alone fix the order in which it is summed.

#include "cpu/linear_fwd.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "common/contract.h"
#include "cpu/isa.h"
#include "cpu/simd_plain.h"
#include "cpu/subnormals.h"
#include "cpu/tensors.h"

namespace qadapter {
namespace plain {
#include "cpu/gemm_f32.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_kernel.h"
#include "cpu/linear_fwd_kernel.h"
const LinearKernel linear_kernels[3] = {linear_kernel<float>(), linear_kernel<BF16>(),
                                        linear_kernel<Half>()};
}  // namespace plain
}  // namespace qadapter

#if QADAPTER_X86
#include "cpu/isa_begin_avx2.h"
#include "cpu/simd_avx2.h"
namespace qadapter {
namespace avx2 {
#include "cpu/gemm_f32.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_kernel.h"
#include "cpu/linear_fwd_kernel.h"
const LinearKernel linear_kernels[3] = {linear_kernel<float>(), linear_kernel<BF16>(),
                                        linear_kernel<Half>()};
}  // namespace avx2
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_avx512.h"
#include "cpu/simd_avx512.h"
namespace qadapter {
namespace avx512 {
#include "cpu/gemm_f32.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_kernel.h"
#include "cpu/linear_fwd_kernel.h"
const LinearKernel linear_kernels[3] = {linear_kernel<float>(), linear_kernel<BF16>(),
                                        linear_kernel<Half>()};
}  // namespace avx512
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_avx512_bf16.h"
namespace qadapter {
namespace avx512_bf16 {
using Simd = avx512::Simd;
#include "cpu/gemm_bf16.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_kernel.h"
#include "cpu/linear_fwd_kernel.h"
const LinearKernel linear_kernels[3] = {{}, linear_kernel<BF16>(), {}};
}  // namespace avx512_bf16
}  // namespace qadapter
#include "cpu/isa_end.h"

#include "cpu/isa_begin_amx.h"
namespace qadapter {
namespace amx {
using Simd = avx512::Simd;
#include "cpu/gemm_bf16.h"
#include "cpu/gemm_pack.h"
#include "cpu/amx_tiles.h"
#include "cpu/gemm_amx.h"
#include "cpu/linear_fwd_kernel.h"
const LinearKernel linear_kernels[3] = {{}, linear_kernel<BF16>(), {}};
}  // namespace amx
}  // namespace qadapter
#include "cpu/isa_end.h"
#endif

namespace qadapter {
namespace {

constexpr int64_t kThreadBytes = 14 << 20, kAllBytes = 56 << 20;

const LinearKernel& kernel_for(int64_t isa, DType hidden, DType weight) {
  const int w = static_cast<int>(weight);
#if QADAPTER_X86
  if (hidden == DType::bf16 && weight == DType::bf16) {
    if (choose_isa(isa) == Isa::amx) return amx::linear_kernels[w];
    if (choose_isa(isa) == Isa::avx512_bf16) return avx512_bf16::linear_kernels[w];
  }
#endif
  return QADAPTER_FOR_ISA(choose_isa(isa), linear_kernels)[w];
}

Matrix matrix_of(const Tensor& t, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_cpu() && t.size(1) == columns &&
                      (columns <= 1 || t.stride(1) == 1),
                  "qadapter: expected 2-D CPU tensors with dense rows of one length");
  return {static_cast<const char*>(t.const_data_ptr()), t.stride(0), dtype_of(t)};
}

// How rows are shared out. Only speed and memory depend on it.
struct Blocks {
  int64_t rows, count, threads, floats;  // rows of a block, the last has fewer; memory of a thread

  Blocks(const LinearJob& job, const LinearKernel& kernel, int64_t n, int64_t chunk_size) {
    constexpr double kWorthwhile = 1e6;  // multiply-adds, to start a thread for
    const double work = static_cast<double>(n) * job.vocab * job.dim;
    threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    threads = std::min<int64_t>(threads, 1 + static_cast<int64_t>(work / kWorthwhile));
    const auto bytes = [&](int64_t rows) {
      return kernel.memory(job, rows).total() * static_cast<int64_t>(sizeof(float));
    };
    const int64_t most = chunk_size > 0 ? std::min<int64_t>(chunk_size, kernel.most_rows)
                                        : kernel.most_rows;
    const int64_t few = std::min<int64_t>(most, kernel.max_height);
    threads = std::max<int64_t>(1, std::min(threads, kAllBytes / bytes(few)));
    const int64_t room = std::min(kThreadBytes, kAllBytes / threads);
    const int64_t per_row = (bytes(64 + few) - bytes(few)) / 64 + 1;
    const int64_t fit = std::max(few, std::min(most, few + (room - bytes(few)) / per_row));
    count = (n + fit - 1) / fit;
    count = std::max<int64_t>(1, (count + threads - 1) / threads * threads);
    rows = kernel.filled(std::max<int64_t>(1, (n + count - 1) / count));
    count = (n + rows - 1) / rows;
    threads = std::min(threads, count);
    floats = bytes(std::min(rows, n)) / static_cast<int64_t>(sizeof(float));
  }
};

struct Lse {
  double log_sum, lse;
  Lse(const Partial& p, double alpha) {  // NaN where no column counts, or one is NaN
    log_sum = p.sum >= 0.5 ? std::log(p.sum) : __builtin_nan("");
    lse = p.max + alpha * log_sum;
  }
};

void store(float x, float* out) { *out = x; }
void store(float x, BF16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = {static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
void store(float x, Half* out) {
  *out = {static_cast<uint16_t>(x != x ? 0x7e00 : plain::Simd::to_half(plain::Simd::set1(x))[0])};
}

// u / sum, from panels to rows
template <class T>
void write_u(const float* u, const LinearRow* rows, int64_t count, int64_t filled, int64_t dim,
             int width, float scale, void* out_) {
  T* out = static_cast<T*>(out_);
  for (int64_t i = 0; i < count; ++i) {
    const double sum = rows[i].x.sum;
    const float factor = sum >= 0.5 ? static_cast<float>(scale / sum) : __builtin_nanf("");
    for (int64_t d = 0; d < dim; d += width) {
      const float* from = u + d * filled + i * width;
      const int64_t n = std::min<int64_t>(width, dim - d);
      for (int64_t k = 0; k < n; ++k) store(factor * from[k], out + i * dim + d + k);
    }
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace

Outputs linear_fwd(std::optional<Tensor> base_hidden, Tensor q_hidden, Tensor weight,
                   Tensor actions, std::optional<Tensor> bias, std::optional<Tensor> base_lse_in,
                   std::optional<Tensor> base_logp_in, double alpha_0, double alpha_tilde,
                   double center, double logit_scale, double logit_softcap, int64_t chunk_size,
                   bool need_grad, int64_t isa) {
  const int64_t n = q_hidden.size(0);
  const double m = alpha_0 - center;
  LinearJob job;
  job.vocab = weight.size(0);
  job.dim = weight.size(1);
  STD_TORCH_CHECK(job.vocab > 0 && job.dim > 0, "qadapter: an empty weight");
  job.q = matrix_of(q_hidden, job.dim);
  job.weight = matrix_of(weight, job.dim);
  if (base_hidden.has_value()) {
    job.base = matrix_of(*base_hidden, job.dim);
    STD_TORCH_CHECK(base_hidden->size(0) == n && job.base.dtype == job.q.dtype,
                    "qadapter: base_hidden and q_hidden differ in shape or dtype");
  }
  job.mix = mix_of(m);
  STD_TORCH_CHECK(base_hidden.has_value() || (job.mix == Mix::none && base_lse_in.has_value() &&
                                              base_logp_in.has_value()),
                  "qadapter: base_hidden may be missing only with m == 0 and its statistics given");
  const float* given_lse = floats(base_lse_in, n);
  const float* given_logp = floats(base_logp_in, n);
  job.actions = int64s(actions, n);
  job.bias = floats(bias, job.vocab);
  job.m = static_cast<float>(m);
  job.bias_factor = static_cast<float>(1.0 + m);
  job.scale = static_cast<float>(logit_scale);
  job.cap = static_cast<float>(logit_softcap);
  job.x_scale = static_cast<float>(kLog2E / alpha_tilde);
  job.base_sum = given_lse == nullptr;
  job.merged = job.mix != Mix::none && !job.base_sum && job.cap == 0.0f;
  job.two = job.base_sum || (job.mix != Mix::none && !job.merged);
  job.action_dot = !job.two;
  job.need_grad = need_grad;

  const LinearKernel& kernel = kernel_for(isa, job.q.dtype, job.weight.dtype);
  const Blocks blocks(job, kernel, n, chunk_size);
  const Tensor memory = new_floats(q_hidden, {blocks.threads * blocks.floats});
  Tensor u = torch::stable::new_empty(q_hidden, {need_grad ? n : 0, job.dim});
  const int64_t u_bytes = job.dim * bytes_of(job.q.dtype);
  char* u_out = static_cast<char*>(u.mutable_data_ptr());
  std::vector<LinearRow> rows(n);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, blocks.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks.count;) {
        const int64_t first = i * blocks.rows, count = std::min(blocks.rows, n - first);
        float* own = out(memory) + t * blocks.floats;
        const float* sums = [&] {
          [[maybe_unused]] const FlushToZero mode;
          return kernel.walk(job, first, count, own, &rows[first]);
        }();
        if (!need_grad) continue;
        const auto write = job.q.dtype == DType::f32
                               ? &write_u<float>
                               : (job.q.dtype == DType::bf16 ? &write_u<BF16> : &write_u<Half>);
        write(sums, &rows[first], count, kernel.filled(count), job.dim, kernel.panel_width,
              job.scale, u_out + first * u_bytes);
      }
    }
  });

  Outputs result{new_floats(q_hidden, {n}), new_floats(q_hidden, {n}), new_floats(q_hidden, {n}),
                 new_floats(q_hidden, {n}), new_floats(q_hidden, {n}), new_floats(q_hidden, {n}),
                 new_floats(q_hidden, {n}), u};
  float *q_out = out(std::get<0>(result)), *value_out = out(std::get<1>(result)),
        *base_logp_out = out(std::get<2>(result)), *policy_logp_out = out(std::get<3>(result)),
        *base_lse_out = out(std::get<4>(result)), *p_action_out = out(std::get<5>(result)),
        *slope_out = out(std::get<6>(result));
  const double nan = __builtin_nan(""), inf = __builtin_inf();

  for (int64_t i = 0; i < n; ++i) {
    const LinearRow& row = rows[i];
    const Lse x(row.x, alpha_tilde), b(row.base, 1.0);
    const double base_lse = job.base_sum ? b.lse : given_lse[i];
    // A cached base_lse was rounded to float: round the policy's as well, so that equal streams
    // still cancel exactly.
    const double lse = job.base_sum ? x.lse : static_cast<float>(x.lse);
    double value = alpha_0 == 0 ? lse : lse - alpha_0 * base_lse;

    const int64_t a = job.actions[i];
    double q = 0, base_logp = 0, policy_logp = 0, p_action = 0, slope = 0;
    if (a != kNoAction && (a < 0 || a >= job.vocab)) {
      q = base_logp = policy_logp = p_action = value = nan;
    } else if (a != kNoAction) {
      const double z_b =
          job.base.data ? row.z_b : static_cast<double>(given_logp[i]) + base_lse;
      // In float32 from the entry that is in the sum: its rounding cancels in q - value where p_a
      // nears 1. A sum of two 16-bit hidden states is rounded to 16 bits, which is too coarse.
      const bool of_sum = job.merged && job.q.dtype == DType::f32 && std::isfinite(row.x_a);
      const double z_q = of_sum ? row.x_a - m * z_b : static_cast<double>(row.z_q);
      base_logp = given_logp ? given_logp[i]
                             : (job.base_sum ? (z_b - row.base.max) - b.log_sum : z_b - base_lse);
      q = center == 0 ? z_q : (z_q == -inf ? -inf : z_q - center * z_b);
      policy_logp = (static_cast<double>(row.x_a) - row.x.max) / alpha_tilde - x.log_sum;
      if (std::isnan(x.log_sum)) q = policy_logp = nan;
      p_action = std::exp(policy_logp);
      slope = static_cast<double>(job.scale) * row.slope;
    }
    q_out[i] = static_cast<float>(q);
    value_out[i] = static_cast<float>(value);
    base_logp_out[i] = static_cast<float>(base_logp);
    policy_logp_out[i] = static_cast<float>(policy_logp);
    base_lse_out[i] = static_cast<float>(base_lse);
    p_action_out[i] = static_cast<float>(p_action);
    slope_out[i] = static_cast<float>(slope);
  }
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(qadapter_C, library) {
  library.def(
      "linear_fwd(Tensor? base_hidden, Tensor q_hidden, Tensor weight, Tensor actions, "
      "Tensor? bias, Tensor? base_lse, Tensor? base_logp, float alpha_0, float alpha_tilde, "
      "float center, float logit_scale, float logit_softcap, int chunk_size, bool need_grad, "
      "int isa) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CPU, library) {
  library.impl("linear_fwd", TORCH_BOX(&linear_fwd));
}

}  // namespace qadapter
