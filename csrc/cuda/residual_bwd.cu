// Gradient of the adapter's logits for any loss on (q, value, policy_logp).
//
//   grad_j = coef_p exp((x_j - shift) / alpha_tilde - log_sum) + coef_a [j == a]
//   x_j    = z_q[j] + m z_b[j], m = alpha_0 - center
//
// in float, the action's term included, and rounded once. A row whose log_sum is NaN gets a NaN
// gradient; of a row with coef_p == 0 no logit is read. Grid (row, block of columns), nothing
// shared, no reduction: a thread has two 16-byte vectors.
//
// Bytes per element: 6 in bf16/fp16 (read both, write one; 4 with m = 0), 12 in fp32 (8). Floor at
// 3.0 TB/s for N = 8192, V = 128256, bf16: 2.10 ms. Not measured on a GPU.

#include "cuda/residual_bwd.h"

#include "common/contract.h"
#include "cuda/device.cuh"

namespace qadapter {
namespace cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 2;

struct RowCoefs {
  float shift, log2_sum, coef_p, coef_a, m, scale;
  int action;  // -1: none

  template <int MIX>
  __device__ __forceinline__ float gradient(float z_q, float z_b, int column) const {
    const float x = mix_streams<MIX>(z_q, z_b, m);
    const float grad = coef_p * exp2_fast((x - shift) * scale - log2_sum);
    return column == action ? grad + coef_a : grad;
  }
};

template <class T, int MIX>
__global__ void __launch_bounds__(kThreads) residual_bwd_kernel(const BwdArgs a) {
  constexpr int kCount = Packed<T>::kCount;
  const int64_t row = block_x();
  const int block = block_y(), thread = thread_index(), threads = block_size();
  const T* q = static_cast<const T*>(a.q) + row * a.q_stride;
  const T* base = MIX == kMixNone ? q : static_cast<const T*>(a.base) + row * a.base_stride;
  T* grad = static_cast<T*>(a.grad) + row * a.vocab;

  RowCoefs c;
  c.shift = a.shift[row], c.log2_sum = a.log_sum[row] * static_cast<float>(kLog2E);
  c.coef_p = a.coef_p[row], c.coef_a = a.coef_a[row];
  c.m = a.m, c.scale = a.scale;
  const int64_t action = a.actions[row];
  c.action = action >= 0 && action < a.vocab ? static_cast<int>(action) : -1;
  // NaN in either fails the comparison: then the row is computed, and comes out as NaN.
  const bool skip = c.coef_p == 0.0f && c.shift - c.shift == 0.0f && c.log2_sum == c.log2_sum;

  const RowShape shape = row_shape(a.vocab, q, base, static_cast<const T*>(grad));
  const auto one = [&](int column) {
    const float z_q = skip ? 0.0f : lowp::to_float(q[column]);
    const float z_b = skip || MIX == kMixNone ? 0.0f : lowp::to_float(base[column]);
    const float value = skip ? (column == c.action ? c.coef_a : 0.0f)
                             : c.gradient<MIX>(z_q, z_b, column);
    grad[column] = lowp::from_float<T>(value);
  };
  const int first = block * threads * kPerThread;
  if (shape.together) {
    float z_q[kPerThread][kCount], z_b[kPerThread][kCount] = {};
  QADAPTER_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int vector = first + i * threads + thread;
      if (vector >= shape.vectors || skip) continue;
      const int64_t at = shape.head + static_cast<int64_t>(vector) * kCount;
      load_packed(q + at, z_q[i]);
      if (MIX != kMixNone) load_packed(base + at, z_b[i]);
    }
  QADAPTER_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int vector = first + i * threads + thread;
      if (vector >= shape.vectors) continue;
      const int at = shape.head + vector * kCount;
      float out[kCount];
  QADAPTER_UNROLL
      for (int k = 0; k < kCount; ++k) {
        out[k] = skip ? (at + k == c.action ? c.coef_a : 0.0f)
                      : c.gradient<MIX>(z_q[i][k], z_b[i][k], at + k);
      }
      store_packed(grad + at, out);
    }
  } else {
    const int end = min(shape.vectors, first + threads * kPerThread) * kCount;
    for (int column = first * kCount + thread; column < end; column += threads) one(column);
  }
  if (block == 0 && thread < shape.head + shape.tail) one(ragged_column(shape, a.vocab, thread));
}

template <class T>
const char* run(const BwdArgs& a, void* stream) {
  const int vectors = a.vocab / Packed<T>::kCount;
  int threads = kWarp;
  while (threads < kThreads && threads * kPerThread < vectors) threads *= 2;
  const int tile = threads * kPerThread, blocks = vectors > tile ? (vectors + tile - 1) / tile : 1;
  switch (mix_kind(a.m)) {
    case kMixNone:
      return launch(residual_bwd_kernel<T, kMixNone>, a.rows, blocks, threads, 1, 0, stream, a);
    case kMixPositive:
      return launch(residual_bwd_kernel<T, kMixPositive>, a.rows, blocks, threads, 1, 0, stream, a);
    default:
      return launch(residual_bwd_kernel<T, kMixNegative>, a.rows, blocks, threads, 1, 0, stream, a);
  }
}

}  // namespace

const char* launch_residual_bwd(const BwdArgs& a, DType dtype, void* stream) {
  if (dtype == DType::f32) return run<float>(a, stream);
  if (dtype == DType::bf16) return run<lowp::bf16>(a, stream);
  return run<lowp::f16>(a, stream);
}

}  // namespace cuda
}  // namespace qadapter
