// The vector code of residual_fwd; residual_fwd.cpp has the maths and the model. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.

namespace {

#include "cpu/streams_kernel.h"

// A running pair (maximum, sum), the maximum also as a vector, part of the sum still in lanes.
struct Running {
  Partial total;
  Simd::F lanes = Simd::zero();
  Simd::F max;
  Simd::Decay decay;
  double scale;

  explicit Running(float scale_) : decay(scale_), scale(scale_) { max = Simd::set1(total.max); }
  void flush() {
    total.sum += Simd::reduce_add(lanes);
    lanes = Simd::zero();
  }
  void raise(float block_max) {
    flush();
    total.rescale_to(block_max, scale);
    max = Simd::set1(block_max);
  }
};

// False only where no column exceeds max. In 16 bits that is told without widening: where a number
// is not negative, its bits compare with those of others as signed integers do.
inline bool may_exceed(const float*, int, float) { return true; }
template <class T>
inline bool may_exceed(const T* q, int n, float max) {
  const int16_t limit = max < 0 ? INT16_MIN : Storage<T>::bits_below(max);
  return Simd::any_above(reinterpret_cast<const int16_t*>(q), n, limit);
}

// A block of one stream: its maximum, then, from L1, its terms, while a later block is fetched.
// Not inlined: both streams must get the same instructions, that equal ones give equal bits.
template <class T, Mix MIX>
__attribute__((noinline)) void add_block(const T* q, const T* base, int n, Simd::F m,
                                         Running& run) {
  using F = Simd::F;
  F x[2], b[2];
  if (MIX != Mix::none || may_exceed(q, n, run.total.max)) {
    F best[2] = {run.max, run.max};
#pragma GCC unroll 4
    for (int j = 0; j < n; j += Simd::kGroup) {
      if (MIX != Mix::none) Simd::load2(base + j, b[0], b[1]);
      load_x<T, MIX>(q + j, m, b, x);
      best[0] = Simd::max(best[0], x[0]);
      best[1] = Simd::max(best[1], x[1]);
    }
    best[0] = Simd::max(best[0], best[1]);
    if (__builtin_expect(Simd::any_sign(Simd::sub(run.max, best[0])), 0)) {
      run.raise(Simd::reduce_max(best[0]));
    }
  }
  const Simd::Decay decay = run.decay;
  const F max = run.max;
  F sum[2] = {Simd::zero(), Simd::zero()};
#pragma GCC unroll 2
  for (int j = 0; j < n; j += Simd::kGroup) {
    fetch_ahead(q + j);
    if (MIX != Mix::none) fetch_ahead(base + j), Simd::load2(base + j, b[0], b[1]);
    load_x<T, MIX>(q + j, m, b, x);
    sum[0] = decay.add_to(sum[0], Simd::sub(max, x[0]));  // a loop would stay one in plain code
    sum[1] = decay.add_to(sum[1], Simd::sub(max, x[1]));
  }
  run.lanes = Simd::add(run.lanes, Simd::add(sum[0], sum[1]));
}

template <class T, Mix MIX, bool BASE>
void fwd_piece(const FwdColumns& in, Partial& x_out, Partial& b_out) {
  const T* q = static_cast<const T*>(in.q);
  const T* base = static_cast<const T*>(in.base);
  const Simd::F m = Simd::set1(in.m);
  Running x_run(in.q_scale), b_run(static_cast<float>(kLog2E));
  for_each_block(
      q, base, in.length, BASE || MIX != Mix::none,
      [&](const T* q_block, const T* base_block, int n) {
        add_block<T, MIX>(q_block, base_block, n, m, x_run);
        if (BASE) add_block<T, Mix::none>(base_block, nullptr, n, m, b_run);
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
