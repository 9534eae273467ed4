// The portable vector code against float64, without torch: for a compiler of another platform and
// an emulator. Prints a line for each kernel and dtype, and fails where one is wrong.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <vector>

#include "common/contract.h"
#include "common/lowp.h"
#include "cpu/fetch.h"
#include "cpu/linear_fwd.h"
#include "cpu/residual_bwd.h"
#include "cpu/residual_fwd.h"
#include "cpu/rows_linear.h"
#include "cpu/simd_plain.h"

namespace qadapter {
namespace plain {
namespace forward {
#include "cpu/residual_fwd_kernel.h"
}  // namespace forward
namespace backward {
#include "cpu/residual_bwd_kernel.h"
}  // namespace backward
namespace linear {
#include "cpu/gemm_f32.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_kernel.h"
#include "cpu/linear_fwd_kernel.h"
const LinearKernel kernels[3] = {linear_kernel<float>(), linear_kernel<BF16>(),
                                 linear_kernel<Half>()};
}  // namespace linear
namespace rows {
#define QADAPTER_ROWS_BITS 0
#include "cpu/rows_linear_sums.h"
#include "cpu/rows_linear_kernel.h"
#include "cpu/lora_kernel.h"
}  // namespace rows
}  // namespace plain
}  // namespace qadapter

namespace {

using namespace qadapter;

int failures = 0;

void check(const char* kernel, const char* dtype, double error, double most) {
  const bool good = error <= most;  // NaN is not
  std::printf("%s %s: %.1e of %.1e%s\n", kernel, dtype, error, most, good ? "" : " WRONG");
  failures += !good;
}

void at_least(double& worst, double error) {
  if (worst == worst && !(error <= worst)) worst = error;  // NaN stays
}

float uniform() {  // in [-1, 1)
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
}

struct F32 {
  using T = float;
  static constexpr const char* name = "float32";
  static constexpr int index = 0;
  static constexpr double unit = 0x1p-24;
  static T from(float x) { return x; }
  static double value(T x) { return x; }
};
template <class Stored, class Lowp, int INDEX>
struct Low {
  using T = Stored;
  static constexpr const char* name = INDEX == 1 ? "bfloat16" : "float16";
  static constexpr int index = INDEX;
  static constexpr double unit = INDEX == 1 ? 0x1p-8 : 0x1p-11;
  static T from(float x) { return {lowp::from_float<Lowp>(x).bits}; }
  static double value(T x) { return lowp::to_float(Lowp{x.bits}); }
};
using B16 = Low<BF16, lowp::bf16, 1>;
using F16 = Low<Half, lowp::f16, 2>;

template <class D>
std::vector<typename D::T> filled(int64_t n, float size) {
  std::vector<typename D::T> out(n);
  for (auto& x : out) x = D::from(size * uniform());
  return out;
}

template <class D>
void test_logits() {
  constexpr int64_t kColumns = 5003;
  const double alpha = 1.3;
  auto q = filled<D>(kColumns, 12.0f), base = filled<D>(kColumns, 12.0f);
  for (int64_t j = 0; j < kColumns; j += 97) q[j] = Storage<typename D::T>::neg_inf();
  for (const float m : {0.0f, 0.5f, -0.5f}) {
    const int mix = static_cast<int>(mix_of(m));
    FwdColumns in{q.data(), base.data(), kColumns, m, static_cast<float>(kLog2E / alpha)};
    Partial x, b;
    plain::forward::fwd_tables[D::index].piece[mix][true](in, x, b);
    double max = -1e30, sum = 0, base_sum = 0;
    std::vector<double> right(kColumns);
    for (int64_t j = 0; j < kColumns; ++j) {
      right[j] = D::value(q[j]) + (m == 0 ? 0 : m * D::value(base[j]));
      max = std::max(max, right[j]);
      base_sum += std::exp(D::value(base[j]));
    }
    for (double z : right) sum += std::exp((z - max) / alpha);
    const double lse = max + alpha * std::log(sum);
    double error = std::abs(x.max + alpha * std::log(x.sum) - lse);
    at_least(error, std::abs(b.max + std::log(b.sum) - std::log(base_sum)));
    check("residual_fwd", D::name, error, 2e-6);

    std::vector<typename D::T> grad(kColumns);
    BwdColumns back{};
    back.q = q.data(), back.base = base.data(), back.grad = grad.data(), back.length = kColumns;
    back.m = m, back.q_scale = in.q_scale, back.shift = x.max;
    back.factor = static_cast<float>(-700 / x.sum), back.action = -1;
    plain::backward::bwd_tables[D::index].piece[mix][false](back);
    error = 0;
    for (int64_t j = 0; j < kColumns; ++j) {
      const double g = -700 * std::exp((right[j] - lse) / alpha);
      const double least = D::index == 2 ? 0x1p-14 : 0x1p-126;  // subnormals are rounded coarsely
      at_least(error, std::abs(D::value(grad[j]) - g) / std::max(std::abs(g), least));
    }
    check("residual_bwd", D::name, error, D::unit + 4e-6);
  }
}

template <class D>
void test_linear() {
  constexpr int64_t kRows = 7, kDim = 83, kVocab = 517;
  const auto h = filled<D>(kRows * kDim, 2.0f), w = filled<D>(kVocab * kDim, 1.0f);
  const std::vector<int64_t> actions(kRows, kNoAction);
  LinearJob job{};
  job.q = {reinterpret_cast<const char*>(h.data()), kDim, static_cast<DType>(D::index)};
  job.weight = {reinterpret_cast<const char*>(w.data()), kDim, static_cast<DType>(D::index)};
  job.vocab = kVocab, job.dim = kDim, job.actions = actions.data();
  job.scale = 1, job.x_scale = static_cast<float>(kLog2E), job.need_grad = true;
  const LinearKernel& kernel = plain::linear::kernels[D::index];
  std::vector<float> memory(kernel.memory(job, kRows).total() + 64);
  LinearRow rows[kRows];
  const float* u = kernel.walk(job, 0, kRows, memory.data(), rows);
  double lse_error = 0, u_error = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    std::vector<double> z(kVocab), right(kDim);
    double sum = 0, norm = 0, off = 0;
    for (int64_t v = 0; v < kVocab; ++v) {
      for (int64_t d = 0; d < kDim; ++d) z[v] += D::value(h[i * kDim + d]) * D::value(w[v * kDim + d]);
      sum += std::exp(z[v]);
    }
    for (int64_t v = 0; v < kVocab; ++v) {
      for (int64_t d = 0; d < kDim; ++d) right[d] += std::exp(z[v]) / sum * D::value(w[v * kDim + d]);
    }
    at_least(lse_error, std::abs(rows[i].x.max + std::log(rows[i].x.sum) - std::log(sum)));
    const int64_t width = kernel.panel_width;
    for (int64_t d = 0; d < kDim; ++d) {
      const float got = u[d / width * kernel.filled(kRows) * width + i * width + d % width];
      norm += right[d] * right[d];
      off += std::pow(got / rows[i].x.sum - right[d], 2);
    }
    at_least(u_error, std::sqrt(off / norm));
  }
  check("linear_fwd, statistics", D::name, lse_error, 1e-5);
  check("linear_fwd, u", D::name, u_error, 1e-5);
}

template <class D>
RowView view(std::vector<typename D::T>& data, int64_t columns) {
  RowView v;
  v.data = reinterpret_cast<char*>(data.data());
  v.count = static_cast<int64_t>(data.size()) / columns, v.far = columns * sizeof(typename D::T);
  return v;
}

template <class D>
void test_rows() {
  constexpr int64_t kRows = 5, kDim = 199, kOut = 14;
  auto x = filled<D>(kRows * kDim, 1.0f), w = filled<D>(kOut * kDim, 1.0f);
  std::vector<typename D::T> out(kRows * kOut);
  RowsJob job{};
  job.x = view<D>(x, kDim), job.out = view<D>(out, kOut);
  job.w = reinterpret_cast<const char*>(w.data());
  job.w_stride = job.k = kDim, job.o = kOut;
  plain::rows::rows_columns<typename D::T>(job, 0, kOut);
  double error = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t o = 0; o < kOut; ++o) {
      double right = 0;
      for (int64_t d = 0; d < kDim; ++d) right += D::value(x[i * kDim + d]) * D::value(w[o * kDim + d]);
      at_least(error, std::abs(D::value(out[i * kOut + o]) - right));
    }
  }
  check("rows_linear", D::name, error, 32 * D::unit + 1e-5);
}

// One row in the way of a few, and all in that of many: the same sums. Then the outer product.
template <class D>
void test_lora() {
  constexpr int64_t kRows = 13, kDim = 37, kOut = 39, kRank = 6;
  auto x = filled<D>(kRows * kDim, 1.0f), out = filled<D>(kRows * kOut, 1.0f);
  const auto a = filled<F32>(kRank * kDim, 1.0f), b = filled<F32>(kOut * kRank, 1.0f);
  const auto before = out;
  LoraJob job{};
  job.x = view<D>(x, kDim), job.out = view<D>(out, kOut);
  job.a = reinterpret_cast<const char*>(a.data()), job.b = reinterpret_cast<const char*>(b.data());
  job.a_stride = job.k = kDim, job.b_stride = job.r = kRank, job.o = kOut, job.scaling = -0.7f;
  constexpr LoraTable run = plain::rows::lora_functions<typename D::T, float>();
  std::vector<float> h(kRows * lora_stride(kRank)), packed(kRank * lora_columns(kOut));
  run.low(job, 0, kRows, h.data());
  run.pack(job, packed.data());
  run.rows(job, packed.data(), 0, kRows, h.data());
  const auto many = out;
  out = before;
  run.delta(job, 0, kRows, h.data(), 0, kOut);
  double error = 0, apart = 0, outer_error = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t o = 0; o < kOut; ++o) {
      double right = 0;
      for (int64_t j = 0; j < kRank; ++j) {
        double low = 0;
        for (int64_t d = 0; d < kDim; ++d) low += D::value(x[i * kDim + d]) * a[j * kDim + d];
        right += low * b[o * kRank + j];
      }
      const int64_t at = i * kOut + o;
      at_least(error, std::abs(D::value(many[at]) - D::value(before[at]) + 0.7 * right));
      at_least(apart, std::abs(D::value(many[at]) - D::value(out[at])));
    }
  }
  check("lora_add", D::name, error, 32 * D::unit + 1e-5);
  check("lora_add, few and many", D::name, apart, 0);

  const auto low = filled<F32>(kRows * kRank, 1.0f);
  std::vector<float> outer(kRank * kDim);
  const OuterJob of{job.x, low.data(), outer.data(), kDim, kRank, 2.0f};
  plain::rows::outer_columns<typename D::T>(of, 0, kDim);
  for (int64_t j = 0; j < kRank; ++j) {
    for (int64_t d = 0; d < kDim; ++d) {
      double right = 0;
      for (int64_t i = 0; i < kRows; ++i) right += low[i * kRank + j] * D::value(x[i * kDim + d]);
      at_least(outer_error, std::abs(outer[j * kDim + d] - 2 * right));
    }
  }
  check("lora_outer", D::name, outer_error, 1e-4);
}

}  // namespace

int main() {
  test_logits<F32>();
  test_logits<B16>();
  test_logits<F16>();
  test_linear<F32>();
  test_linear<B16>();
  test_linear<F16>();
  test_rows<F32>();
  test_rows<B16>();
  test_lora<F32>();
  test_lora<B16>();
  return failures != 0;
}
