// The vector code of residual_fwd; residual_fwd.cpp has the maths and the model. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.

namespace {

#include "cpu/streams_kernel.h"

// A running pair (maximum, sum), the maximum also as a vector, part of the sum still in lanes.
struct Running {
  Partial total;
  Simd::F lanes = Simd::zero();
  Simd::F max;
  Simd::F minus_scale;
  double scale;

  explicit Running(float scale_) : minus_scale(Simd::set1(-scale_)), scale(scale_) {
    max = Simd::set1(total.max);
  }
  // Adds exp2(scale * (x - max)) to sum. The sign bit that comes out says that x outgrew max; the
  // difference is taken this way round since then x == max gives +0, without a sign.
  inline Simd::F step(const Simd::Exp2& exp2, Simd::F x, Simd::F& sum) const {
    const Simd::F below = Simd::sub(max, x);
    sum = exp2.add_to(sum, Simd::mul(below, minus_scale));
    return below;
  }
  void flush() {
    total.sum += Simd::reduce_add(lanes);
    lanes = Simd::zero();
  }
  void raise(float block_max) {
    if (!(block_max > total.max)) return;
    flush();
    total.rescale_to(block_max, scale);
    max = Simd::set1(block_max);
  }
};

// The block again, for one stream, after its maximum outgrew the running one. Both streams come
// through here with the same arithmetic: equal inputs have bitwise equal statistics.
template <class T, Mix MIX>
__attribute__((noinline)) void redo(const T* q, const T* base, int n, Simd::F m,
                                    const Simd::Exp2& exp2, Running& run) {
  Simd::F x[2], b[2];
  Simd::F best = run.max;
  for (int j = 0; j < n; j += Simd::kGroup) {
    if (MIX != Mix::none) Simd::load2(base + j, b[0], b[1]);
    load_x<T, MIX>(q + j, m, b, x);
    best = Simd::max_into(best, x[0]);
    best = Simd::max_into(best, x[1]);
  }
  run.raise(Simd::reduce_max(best));
  Simd::F sum[2] = {Simd::zero(), Simd::zero()};
  for (int j = 0; j < n; j += Simd::kGroup) {
    if (MIX != Mix::none) Simd::load2(base + j, b[0], b[1]);
    load_x<T, MIX>(q + j, m, b, x);
    run.step(exp2, x[0], sum[0]);
    run.step(exp2, x[1], sum[1]);
  }
  run.lanes = Simd::add(run.lanes, Simd::add(sum[0], sum[1]));
}

template <class T, Mix MIX, bool BASE>
inline void block(const T* q, const T* base, int n, Simd::F m, const Simd::Exp2& exp2,
                  Running& x_run, Running& b_run) {
  using F = Simd::F;
  F x_sum[2] = {Simd::zero(), Simd::zero()}, b_sum[2] = {Simd::zero(), Simd::zero()};
  F x_grew = Simd::zero(), b_grew = Simd::zero();
  for (int j = 0; j < n; j += Simd::kGroup) {
    F x[2], b[2];
    if (BASE || MIX != Mix::none) Simd::load2(base + j, b[0], b[1]);
    load_x<T, MIX>(q + j, m, b, x);
    for (int k = 0; k < 2; ++k) {
      x_grew = Simd::either(x_grew, x_run.step(exp2, x[k], x_sum[k]));
      if (BASE) b_grew = Simd::either(b_grew, b_run.step(exp2, b[k], b_sum[k]));
    }
  }
  if (__builtin_expect(Simd::any_sign(x_grew), 0)) {
    redo<T, MIX>(q, base, n, m, exp2, x_run);
  } else {
    x_run.lanes = Simd::add(x_run.lanes, Simd::add(x_sum[0], x_sum[1]));
  }
  if (!BASE) return;
  if (__builtin_expect(Simd::any_sign(b_grew), 0)) {
    redo<T, Mix::none>(base, nullptr, n, m, exp2, b_run);
  } else {
    b_run.lanes = Simd::add(b_run.lanes, Simd::add(b_sum[0], b_sum[1]));
  }
}

template <class T, Mix MIX, bool BASE>
void fwd_piece(const FwdColumns& in, Partial& x_out, Partial& b_out) {
  const T* q = static_cast<const T*>(in.q);
  const T* base = static_cast<const T*>(in.base);
  const Simd::F m = Simd::set1(in.m);
  const Simd::Exp2 exp2;
  Running x_run(in.q_scale), b_run(static_cast<float>(kLog2E));
  for_each_block(
      q, base, in.length, BASE || MIX != Mix::none,
      [&](const T* q_block, const T* base_block, int n) {
        block<T, MIX, BASE>(q_block, base_block, n, m, exp2, x_run, b_run);
      },
      [&] {
        x_run.flush();
        if (BASE) b_run.flush();
      });
  x_out = x_run.total;
  b_out = b_run.total;
}

template <class T, Mix MIX>
float fwd_element(const void* q, const void* base, float m) {
  const Few<T> few(static_cast<const T*>(q), static_cast<const T*>(base), 1, MIX != Mix::none);
  Simd::F x[2], b[2];
  Simd::load2(few.base, b[0], b[1]);
  load_x<T, MIX>(few.q, Simd::set1(m), b, x);
  return Simd::first(x[0]);
}

template <class T>
constexpr FwdTable fwd_table() {
  return {{{&fwd_piece<T, Mix::none, false>, &fwd_piece<T, Mix::none, true>},
           {&fwd_piece<T, Mix::positive, false>, &fwd_piece<T, Mix::positive, true>},
           {&fwd_piece<T, Mix::negative, false>, &fwd_piece<T, Mix::negative, true>}},
          {&fwd_element<T, Mix::none>, &fwd_element<T, Mix::positive>,
           &fwd_element<T, Mix::negative>},
          &fwd_element<T, Mix::none>};
}

}  // namespace

// [DType]
const FwdTable fwd_tables[3] = {fwd_table<float>(), fwd_table<BF16>(), fwd_table<Half>()};
