// The vector code of sample; sample.cpp has the maths and the model. Included once per instruction
// set, inside namespace qadapter::<set>, hence no include guard and no includes.

namespace {

constexpr int kAccumulators = kSampleGroups / Simd::kWidth;  // vectors of group maxima

// x = q + weight * base. With CAREFUL, -inf in either masks the token whatever the other one is,
// and +inf in the base does not become a mask under a negative weight.
template <class T, Mix MIX, bool CAREFUL>
inline Simd::F compose_one(const T* q, const T* base, Simd::F weight) {
  const Simd::F zq = Simd::load1(q);
  if (MIX == Mix::none) return zq;
  Simd::F zb = Simd::load1(base);
  if (!CAREFUL) return Simd::fma(weight, zb, zq);
  const Simd::F lowest = Simd::set1(-FLT_MAX), masked = Simd::set1(-__builtin_inff());
  if (MIX == Mix::negative) {
    zb = Simd::pick_less(Simd::set1(FLT_MAX), zb, Simd::set1(__builtin_nanf("")), zb);
  }
  const Simd::F x = Simd::fma(weight, zb, zq);
  return Simd::pick_less(zb, lowest, masked, Simd::pick_less(zq, lowest, masked, x));
}

// x of a block, and the maxima of its groups. Returns whether all x are finite or, with CAREFUL,
// whether none is NaN or +inf.
template <class T, Mix MIX, bool CAREFUL, bool FETCH>
inline bool compose_x(const T* q, const T* base, Simd::F weight, float* x, Simd::F* best) {
  using F = Simd::F;
  const F inf = Simd::set1(__builtin_inff()), yes = Simd::set1(-0.0f), no = Simd::zero();
  F check[kAccumulators];
  for (int k = 0; k < kAccumulators; ++k) best[k] = Simd::set1(-__builtin_inff()), check[k] = no;
  for (int j = 0; j < kSampleBlock; j += kSampleGroups) {
    if (FETCH) {
      fetch_ahead(q + j);
      if (MIX != Mix::none) fetch_ahead(base + j);
    }
    for (int k = 0; k < kAccumulators; ++k) {
      const int at = j + k * Simd::kWidth;
      const F value = compose_one<T, MIX, CAREFUL>(q + at, base + at, weight);
      Simd::store1(x + at, value);
      best[k] = Simd::max_into(best[k], value);
      check[k] = CAREFUL ? Simd::either(check[k], Simd::pick_less(value, inf, no, yes))
                         : Simd::fma(value, no, check[k]);  // NaN from anything not finite
    }
  }
  bool good = true;
  for (int k = 0; k < kAccumulators; ++k) {
    good &= CAREFUL ? !Simd::any_sign(check[k]) : Simd::reduce_add(check[k]) == 0.0f;
  }
  return good;
}

// One whole block. False where some x is NaN or +inf.
template <class T, Mix MIX>
inline bool compose_block(const T* q, const T* base, const SampleColumns& in, float* x, float& max,
                          float* groups, float& sum) {
  using F = Simd::F;
  const F weight = Simd::set1(in.weight);
  F best[kAccumulators];
  sum = 0.0f;
  const bool good = in.sums ? compose_x<T, MIX, false, false>(q, base, weight, x, best)
                            : compose_x<T, MIX, false, true>(q, base, weight, x, best);
  if (!good && !compose_x<T, MIX, true, false>(q, base, weight, x, best)) {
    return false;
  }
  F all = best[0];
  for (int k = 0; k < kAccumulators; ++k) {
    Simd::store1(groups + k * Simd::kWidth, best[k]);
    all = Simd::max_into(all, best[k]);
  }
  max = Simd::reduce_max(all);
  if (!in.sums || !(max >= -FLT_MAX)) return true;
  const typename Simd::Decay decay(in.scale2);
  const F top = Simd::set1(max);
  F sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  for (int j = 0; j < kSampleBlock; j += 4 * Simd::kWidth) {
    for (int k = 0; k < 4 * Simd::kWidth; k += 16) {
      fetch_ahead(q + j + k);
      if (MIX != Mix::none) fetch_ahead(base + j + k);
    }
    for (int k = 0; k < 4; ++k) {
      const F value = Simd::load1(x + j + k * Simd::kWidth);
      sums[k] = decay.add_to(sums[k], Simd::sub(top, value));
    }
  }
  sum = Simd::reduce_add(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
  return true;
}

template <class T, Mix MIX>
bool compose(const SampleColumns& in, BlockStats out) {
  const T* q = static_cast<const T*>(in.q);
  const T* base = static_cast<const T*>(in.base);
  bool good = true;
  for (int64_t j = 0, block = 0; j < in.length; j += kSampleBlock, ++block) {
    const T *q_at = q + j, *b_at = MIX == Mix::none ? q_at : base + j;
    const int64_t rest = in.length - j;
    T q_pad[kSampleBlock], b_pad[kSampleBlock];
    if (rest < kSampleBlock) {
      for (int k = 0; k < kSampleBlock; ++k) q_pad[k] = b_pad[k] = Storage<T>::neg_inf();
      std::memcpy(q_pad, q_at, rest * sizeof(T));
      std::memcpy(b_pad, b_at, rest * sizeof(T));
      q_at = q_pad, b_at = b_pad;
    }
    good &= compose_block<T, MIX>(q_at, b_at, in, in.x + block * in.step, out.max[block],
                                  out.groups + block * kSampleGroups, out.sum[block]);
  }
  return good;
}

// Calls f(vector) over n floats; what is left over is padded with -inf.
template <class Each>
inline void for_each_vector(const float* x, int64_t n, const Each& each) {
  int64_t j = 0;
  for (; j + Simd::kWidth <= n; j += Simd::kWidth) each(Simd::load1(x + j));
  if (j == n) return;
  float pad[Simd::kWidth];
  for (int k = 0; k < Simd::kWidth; ++k) pad[k] = j + k < n ? x[j + k] : -__builtin_inff();
  each(Simd::load1(pad));
}

// A sum in float lanes, in double every 64 vectors.
struct LongSum {
  Simd::F lanes;
  int count = 0;
  double total = 0.0;

  inline LongSum() : lanes(Simd::zero()) {}  // an implicit one would not get the instruction set
  inline void add(Simd::F x) {
    lanes = Simd::add(lanes, x);
    if (++count == 64) flush();
  }
  inline void flush() {
    total += Simd::reduce_add(lanes);
    lanes = Simd::zero();
    count = 0;
  }
};

double mass_above(const float* x, int64_t n, float pivot, float ref, float scale2,
                  int64_t& equal) {
  using F = Simd::F;
  const typename Simd::Decay decay(scale2);
  const F top = Simd::set1(ref), low = Simd::set1(pivot);
  const F one = Simd::set1(1.0f), none = Simd::zero();
  LongSum mass, ties;
  for_each_vector(x, n, [&](F value) {
    const F e = decay.value(Simd::sub(top, value));
    mass.add(Simd::pick_less(low, value, e, none));
    ties.add(Simd::pick_less(low, value, none, Simd::pick_less(value, low, none, one)));
  });
  mass.flush();
  ties.flush();
  equal = static_cast<int64_t>(ties.total);
  return mass.total;
}

void gather(const float* x, int64_t n, float least, float* out, int64_t& count) {
  using F = Simd::F;
  constexpr int kFour = 4 * Simd::kWidth;
  const F from = Simd::set1(least), yes = Simd::set1(-0.0f), no = Simd::zero();
  int64_t j = 0;
  for (; j + kFour <= n; j += kFour) {  // mostly there is nothing
    F v[4];
    for (int k = 0; k < 4; ++k) v[k] = Simd::load1(x + j + k * Simd::kWidth);
    const F best = Simd::max(Simd::max(v[0], v[1]), Simd::max(v[2], v[3]));
    if (!Simd::any_sign(Simd::pick_less(best, from, no, yes))) continue;
    for (int k = 0; k < 4; ++k) append_from(v[k], from, out, count);
  }
  for_each_vector(x + j, n - j, [&](F value) { append_from(value, from, out, count); });
}

double split(const float* x, int64_t n, float low, float high, float ref, float scale2, float* out,
             int64_t& count) {
  using F = Simd::F;
  const typename Simd::Decay decay(scale2);
  const F top = Simd::set1(ref);
  const F from = Simd::set1(low), to = Simd::set1(high), none = Simd::zero();
  LongSum mass;
  for_each_vector(x, n, [&](F value) {
    const F e = decay.value(Simd::sub(top, value));
    mass.add(Simd::pick_less(to, value, e, none));
    append(value, from, to, out, count);
  });
  mass.flush();
  return mass.total;
}

void masses(const float* x, int64_t n, float ref, float scale2, float* out) {
  using F = Simd::F;
  const typename Simd::Decay decay(scale2);
  const F top = Simd::set1(ref);
  float last[Simd::kWidth];
  int64_t j = 0;
  for_each_vector(x, n, [&](F value) {
    const F e = decay.value(Simd::sub(top, value));
    Simd::store1(j + Simd::kWidth <= n ? out + j : last, e);
    j += Simd::kWidth;
  });
  if (j > n) std::memcpy(out + j - Simd::kWidth, last, (n - j + Simd::kWidth) * sizeof(float));
}

}  // namespace

const SampleTable sample_table = {
    {{&compose<float, Mix::none>, &compose<float, Mix::positive>, &compose<float, Mix::negative>},
     {&compose<BF16, Mix::none>, &compose<BF16, Mix::positive>, &compose<BF16, Mix::negative>},
     {&compose<Half, Mix::none>, &compose<Half, Mix::positive>, &compose<Half, Mix::negative>}},
    &mass_above,
    &gather,
    &split,
    &masses};
