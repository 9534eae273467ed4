// The sampler's arithmetic on single tokens.
//
// Masses are integers: exp2((x - max) scale2) in units of 2^-40. Sums of integers do not depend on
// their order, so threads may add in any, atomically too, and a row's result is still the same to
// the bit, whatever the batch. A token 2^-40 times as likely as the first has mass 0; what is lost
// by cutting 2^-41 on average off each of 128,256 tokens is 6e-8 of the largest.
#pragma once

#include "common/online.h"

namespace qadapter {

// z_q + weight z_b, rounded after each step as in the other backends. -inf in either stream masks
// the token, also under a negative weight; +inf in the base is NaN.
QADAPTER_HD float compose(float z_q, float z_b, float weight) {
  if (z_q == neg_inf() || z_b == neg_inf()) return neg_inf();
  return z_b == -neg_inf() ? not_a_number() : add(z_q, mul(weight, z_b));
}

// uint32 in the order of x; -0 and 0 are one key.
QADAPTER_HD uint32_t order_key(float x) {
  const uint32_t bits = x == 0.0f ? 0u : bits_of(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

QADAPTER_HD float key_value(uint32_t key) {
  return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

constexpr uint32_t kLowestKey = 0x00800000u;  // of the smallest finite float
constexpr double kMassUnit = 0x1p-40;

// scale log2(e) in float: never 0 and never infinite, so that -inf times it stays -inf.
QADAPTER_HD float scale_in_log2(double scale) {
  const double scaled = scale * 1.4426950408889634;
  return static_cast<float>(scaled < 1e-30 ? 1e-30 : (scaled > 3e38 ? 3e38 : scaled));
}

QADAPTER_HD uint64_t token_mass(float x, float max, float scale2) {
  return static_cast<uint64_t>(exp2_fast(mul(add(x, -max), scale2)) * 0x1p40f);
}

// The mass of a group from its sum, which is relative to its own maximum.
QADAPTER_HD uint64_t group_mass(float sum, float group_max, float max, float scale2) {
  const double share = exp2_fast(mul(add(group_max, -max), scale2));
  return static_cast<uint64_t>(sum * share * 0x1p40);
}

// The unit of `total` at which a draw ends: a token is drawn where the running mass exceeds it.
QADAPTER_HD uint64_t draw_threshold(double u, uint64_t total) {
  const uint64_t threshold = static_cast<uint64_t>(u * static_cast<double>(total));
  return threshold < total ? threshold : total - 1;
}

// The smallest mass that counts as the share top_p of total.
QADAPTER_HD uint64_t share_of(double top_p, uint64_t total) {
  const uint64_t share = static_cast<uint64_t>(ceil(top_p * static_cast<double>(total)));
  return share < total ? share : total;
}

// How many of the tokens at the pivot, each of this mass, it takes to reach the target; one always.
QADAPTER_HD int ties_needed(uint64_t target, uint64_t above, uint64_t mass) {
  if (target <= above) return 1;
  constexpr uint64_t kAll = 1u << 30;
  const uint64_t wanted = mass ? (target - above + mass - 1) / mass : kAll;
  return static_cast<int>(wanted < kAll ? wanted : kAll);
}

// The smallest key whose token has at least the share min_p of the largest probability.
QADAPTER_HD uint32_t least_key(float max, double scale, double log_min_p) {
  uint32_t key = order_key(max);
  const float near = static_cast<float>(max + log_min_p / scale);
  // Around the rounded threshold, which is off by a few steps at most.
  const uint32_t first = near > -3.4e38f ? order_key(near) - 4 : kLowestKey;
  for (int i = 0; i < 9; ++i) {
    const uint32_t candidate = first + i;
    if (candidate < kLowestKey || candidate >= key) continue;
    const double distance = static_cast<double>(key_value(candidate)) - max;
    if (distance * scale >= log_min_p) key = candidate;
  }
  return key;
}

// A key that no pivot of top_p lies below: what is deeper, all V tokens of it, has less than half
// of the mass 1 - p. `total` is relative to the largest token.
QADAPTER_HD uint32_t deepest_key(float max, float scale2, double top_p, double total, int vocab) {
  const float depth = static_cast<float>(log2(vocab / ((1.0 - top_p) * total))) + 1.0f;
  const float x = max - depth / scale2;
  return x > -3.4e38f ? order_key(x) : kLowestKey;
}

}  // namespace qadapter
