// Statistics of a row that is read once: pairs (max, sum) with sum = sum_j exp2((x_j - max) scale).
//
// max stays in the units of x, so differences keep every digit that the logits have. NaN and +inf
// need not reach max (a hardware maximum drops NaN), but they always reach sum, through exp2(NaN)
// or exp2(inf - inf), and stay there. All functions run the same instructions for both streams:
// equal logits with equal scales give equal pairs, bit for bit.
#pragma once

#include "common/host_device.h"

namespace qadapter {

struct Pair {
  float max, sum;
};

QADAPTER_HD Pair empty_pair() { return {neg_inf(), 0.0f}; }

// Where nothing but -inf was seen, -inf - -inf must not arise.
QADAPTER_HD float origin_of(float max) { return max == neg_inf() ? 0.0f : max; }

// N elements into a pair: one exp2 each, and one for the rescaling.
template <int N>
QADAPTER_HD Pair add_elements(Pair p, const float (&x)[N], float scale) {
  float max = p.max;
  QADAPTER_UNROLL
  for (int i = 0; i < N; ++i) max = fmaxf(max, x[i]);
  const float origin = origin_of(max);
  float sum = mul(p.sum, exp2_fast(mul(add(p.max, -origin), scale)));
  QADAPTER_UNROLL
  for (int i = 0; i < N; ++i) sum = add(sum, exp2_fast(mul(add(x[i], -origin), scale)));
  return {max, sum};
}

// Symmetric in a and b, so that two lanes that exchange their pairs get the same one.
QADAPTER_HD Pair merge_pairs(Pair a, Pair b, float scale) {
  const float max = fmaxf(a.max, b.max), origin = origin_of(max);
  const float left = mul(a.sum, exp2_fast(mul(add(a.max, -origin), scale)));
  const float right = mul(b.sum, exp2_fast(mul(add(b.max, -origin), scale)));
  return {max, add(left, right)};
}

// How the base logits enter x = z_q + m z_b: m == 0, m > 0, m < 0.
constexpr int kMixNone = 0, kMixPositive = 1, kMixNegative = 2;

QADAPTER_HD int mix_kind(double m) {
  return m == 0 ? kMixNone : (m > 0 ? kMixPositive : kMixNegative);
}

// -inf in either stream masks the token. For m > 0 the sum alone does that; for m < 0 a masked base
// token would become +inf, and +inf in the base, which poisons its row, would become a mask.
template <int MIX>
QADAPTER_HD float mix_streams(float z_q, float z_b, float m) {
  if (MIX == kMixNone) return z_q;
  const float x = fmaf(m, z_b, z_q);
  if (MIX == kMixPositive) return x;
  if (z_q == neg_inf() || z_b == neg_inf()) return neg_inf();
  return z_b == -neg_inf() ? not_a_number() : x;
}

}  // namespace qadapter
