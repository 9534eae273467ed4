// A logit of the language-model head, and its slope, from what the product h . W_j left.
//
//   z = logit_scale * acc + bias       with a soft cap z = cap tanh(z / cap)
//   slope = dz / d(acc)                logit_scale, or logit_scale (1 - tanh^2)
#pragma once

#include "common/online.h"

namespace qadapter {

struct Logit {
  float z, slope;
};

struct HeadScalars {
  float logit_scale, softcap, cap_inverse;  // softcap 0: none
};

// cap tanh(s / cap) and 1 - tanh^2 without the cancellation of that form. Where 1 - exp(-2 |y|)
// would cancel, the series up to y^9, which is exact there to 1e-8.
QADAPTER_HD Logit soft_cap(float s, float softcap, float cap_inverse) {
  const float y = s * cap_inverse, size = fabsf(y), square = y * y;
  const float t = exp2_fast(size * -2.8853900817779268f);  // exp(-2 |y|)
  float series = fmaf(square, 62.0f / 2835.0f, -17.0f / 315.0f);
  series = fmaf(square, series, 2.0f / 15.0f);
  series = fmaf(square, series, -1.0f / 3.0f);
  series = size * fmaf(square, series, 1.0f);
  const float tanh = size < 0.25f ? series : (1.0f - t) / (1.0f + t);
  const float down = 1.0f + t;
  return {softcap * (y < 0.0f ? -tanh : tanh), 4.0f * t / (down * down)};
}

// The bias has been scaled.
template <bool CAPPED>
QADAPTER_HD Logit head_logit(float acc, float bias, const HeadScalars& head) {
  const float z = add(mul(acc, head.logit_scale), bias);
  if (!CAPPED) return {z, head.logit_scale};
  const Logit capped = soft_cap(z, head.softcap, head.cap_inverse);
  return {capped.z, capped.slope * head.logit_scale};
}

// The probability of a token times its slope, from the row's statistics: share = 1 / sum.
QADAPTER_HD float row_weight(float x, float slope, float origin, float scale, float share) {
  return mul(exp2_fast(mul(add(x, -origin), scale)), mul(slope, share));
}

}  // namespace qadapter
