// The vector code of residual_bwd; residual_bwd.cpp has the maths and the model. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.

namespace {

#include "cpu/streams_kernel.h"

template <class T, Mix MIX>
struct Gradient {
  Simd::F m, shift;
  Simd::Decay decay;  // coef_p * probability

  explicit Gradient(const BwdColumns& in)
      : m(Simd::set1(in.m)),
        shift(Simd::set1(in.shift)),
        decay(in.q_scale, in.factor) {}

  inline void group(const T* q, const T* base, Simd::F g[2]) const {
    Simd::F x[2], b[2];
    if (MIX != Mix::none) Simd::load2(base, b[0], b[1]);
    load_x<T, MIX>(q, m, b, x);
    g[0] = decay.value(Simd::sub(shift, x[0]));
    g[1] = decay.value(Simd::sub(shift, x[1]));
  }

  template <bool STREAM>
  inline void store(const T* q, const T* base, T* grad) const {
    Simd::F g[2];
    group(q, base, g);
    Simd::store2<STREAM>(grad, g[0], g[1]);
  }

  // fewer than a group, by way of padded copies
  void part(const T* q, const T* base, T* grad, int count) const {
    const Few<T> few(q, base, count, MIX != Mix::none);
    T g_pad[Simd::kGroup];
    store<false>(few.q, few.base, g_pad);
    std::memcpy(grad, g_pad, count * sizeof(T));
  }

  // the action's column: its two terms are added in float, then rounded once
  void action(const T* q, const T* base, T* grad, float coef_a) const {
    const Few<T> few(q, base, 1, MIX != Mix::none);
    T g_pad[Simd::kGroup];
    Simd::F g[2];
    group(few.q, few.base, g);
    g[0] = Simd::add(g[0], Simd::set1(coef_a));
    Simd::store2<false>(g_pad, g[0], g[1]);
    *grad = g_pad[0];
  }
};

template <class T, Mix MIX, bool STREAM>
void bwd_piece(const BwdColumns& in) {
  const T* q = static_cast<const T*>(in.q);
  const T* base = static_cast<const T*>(in.base);
  T* grad = static_cast<T*>(in.grad);
  const Gradient<T, MIX> gradient(in);
  int64_t j = 0;
  if (in.factor == 0) {
    std::memset(static_cast<void*>(grad), 0, in.length * sizeof(T));
    j = in.length;
  } else if (STREAM) {  // streaming stores need aligned addresses
    constexpr uintptr_t kAlign = sizeof(Simd::F);
    const uintptr_t over = reinterpret_cast<uintptr_t>(grad) % kAlign;
    if (over != 0) {
      j = std::min<int64_t>((kAlign - over) / sizeof(T), in.length);
      gradient.part(q, base, grad, static_cast<int>(j));
    }
  }
#pragma GCC unroll 2
  for (; j + Simd::kGroup <= in.length; j += Simd::kGroup) {
    fetch_ahead(q + j);
    if (MIX != Mix::none) fetch_ahead(base + j);
    gradient.template store<STREAM>(q + j, base + j, grad + j);
  }
  if (j < in.length) {
    gradient.part(q + j, base + j, grad + j, static_cast<int>(in.length - j));
  }
  if (in.action >= 0) {
    gradient.action(q + in.action, base + in.action, grad + in.action, in.coef_a);
  }
}

template <class T, Mix MIX>
constexpr BwdPiece bwd_variant(bool stream) {
  return stream && Simd::kStreams ? &bwd_piece<T, MIX, Simd::kStreams> : &bwd_piece<T, MIX, false>;
}

template <class T>
constexpr BwdTable bwd_table() {
  return {{{bwd_variant<T, Mix::none>(false), bwd_variant<T, Mix::none>(true)},
           {bwd_variant<T, Mix::positive>(false), bwd_variant<T, Mix::positive>(true)},
           {bwd_variant<T, Mix::negative>(false), bwd_variant<T, Mix::negative>(true)}},
          &Simd::fence};
}

}  // namespace

// [DType]
const BwdTable bwd_tables[3] = {bwd_table<float>(), bwd_table<BF16>(), bwd_table<Half>()};
