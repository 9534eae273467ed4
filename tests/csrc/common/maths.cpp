// csrc/common as a small shared library, for test_maths.py.

#include "common/head.h"
#include "common/lowp.h"
#include "common/online.h"
#include "common/philox.h"
#include "common/row_finish.h"
#include "common/sampling.h"

using namespace qadapter;

extern "C" {

void widen_bf16(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = lowp::to_float(lowp::bf16{in[i]});
}
void widen_f16(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = lowp::to_float(lowp::f16{in[i]});
}
void narrow_bf16(const float* in, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = lowp::from_float<lowp::bf16>(in[i]).bits;
}
void narrow_f16(const float* in, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = lowp::from_float<lowp::f16>(in[i]).bits;
}

// A row as the kernels take it: vectors of 4 dealt out to `lanes`, their pairs merged in a tree;
// `blocks` equal parts of the row one after another, merged in the end. lanes: a power of two.
void row_pair(const float* x, int n, float scale, int lanes, int blocks, float* max, float* sum) {
  Pair row = empty_pair();
  const int part = (n / 4 + blocks - 1) / blocks * 4;
  for (int block = 0; block < blocks; ++block) {
    Pair* pairs = new Pair[lanes];
    for (int lane = 0; lane < lanes; ++lane) pairs[lane] = empty_pair();
    const int first = block * part < n ? block * part : n;
    const int end = block + 1 < blocks && first + part < n ? first + part : n;
    int column = first;
    for (; column + 4 <= end; column += 4) {
      const float four[4] = {x[column], x[column + 1], x[column + 2], x[column + 3]};
      Pair& p = pairs[(column / 4) % lanes];
      p = add_elements(p, four, scale);
    }
    for (; column < end; ++column) {
      const float one[1] = {x[column]};
      pairs[column % lanes] = add_elements(pairs[column % lanes], one, scale);
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) {
        pairs[lane] = merge_pairs(pairs[lane], pairs[lane + step], scale);
      }
    }
    row = merge_pairs(row, pairs[0], scale);
    delete[] pairs;
  }
  *max = row.max, *sum = row.sum;
}

void merge(const float* a, const float* b, float scale, float* out) {
  const Pair p = merge_pairs({a[0], a[1]}, {b[0], b[1]}, scale);
  out[0] = p.max, out[1] = p.sum;
}

float mix(int kind, float z_q, float z_b, float m) {
  if (kind == kMixNone) return mix_streams<kMixNone>(z_q, z_b, m);
  if (kind == kMixPositive) return mix_streams<kMixPositive>(z_q, z_b, m);
  return mix_streams<kMixNegative>(z_q, z_b, m);
}

// numbers: x.max, x.sum, base.max, base.sum, z_q, z_b, x_action, base_lse, base_logp
void finish(const float* numbers, int has_base, int has_lse, int has_logp, int64_t action,
            int64_t vocab, const double* composition, float* out) {
  RowKnown row;
  row.x = {numbers[0], numbers[1]}, row.base = {numbers[2], numbers[3]};
  row.z_q = numbers[4], row.z_b = numbers[5], row.x_action = numbers[6];
  row.base_lse = numbers[7], row.base_logp = numbers[8];
  row.has_base = has_base, row.has_lse = has_lse, row.has_logp = has_logp;
  const RowResult r =
      finish_row(row, action, vocab, {composition[0], composition[1], composition[2]});
  const float results[7] = {r.q,        r.value, r.base_logp, r.policy_logp,
                            r.base_lse, r.shift, r.log_sum};
  for (int i = 0; i < 7; ++i) out[i] = results[i];
}
}

extern "C" {

void uniforms(const int64_t* keys, const int64_t* counters, double* out, int n) {
  for (int i = 0; i < n; ++i) {
    out[i] = philox_uniform(static_cast<uint64_t>(keys[i]), static_cast<uint64_t>(counters[i]));
  }
}
void row_keys(int64_t seed, int64_t* out, int n) {
  for (int i = 0; i < n; ++i) {
    out[i] = static_cast<int64_t>(philox_row_key(static_cast<uint64_t>(seed), i));
  }
}
void keys(const float* x, int64_t* key, float* back, int n) {
  for (int i = 0; i < n; ++i) {
    key[i] = order_key(x[i]);
    back[i] = key_value(static_cast<uint32_t>(key[i]));
  }
}
float value_of(int64_t key) { return key_value(static_cast<uint32_t>(key)); }
void capped(const float* s, float cap, float* z, float* slope, int n) {
  for (int i = 0; i < n; ++i) {
    const Logit logit = head_logit<true>(s[i], 0.0f, {1.0f, cap, 1.0f / cap});
    z[i] = logit.z, slope[i] = logit.slope;
  }
}
void composed(const float* z_q, const float* z_b, float weight, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = compose(z_q[i], z_b[i], weight);
}
void token_masses(const float* x, float max, double scale, int64_t* out, int n) {
  const float scale2 = scale_in_log2(scale);
  for (int i = 0; i < n; ++i) out[i] = static_cast<int64_t>(token_mass(x[i], max, scale2));
}
int64_t draw(double u, int64_t total) { return static_cast<int64_t>(draw_threshold(u, total)); }
int64_t share(double p, int64_t total) { return static_cast<int64_t>(share_of(p, total)); }
int ties(int64_t target, int64_t above, int64_t mass) { return ties_needed(target, above, mass); }
int64_t least(float max, double scale, double log_min_p) {
  return least_key(max, scale, log_min_p);
}
int64_t deepest(float max, double scale, double top_p, double total, int vocab) {
  return deepest_key(max, scale_in_log2(scale), top_p, total, vocab);
}
}
