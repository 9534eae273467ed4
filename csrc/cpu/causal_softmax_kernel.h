// The vector code of causal_softmax; causal_softmax.cpp has the model. Included once per
// instruction set, inside namespace qadapter::<set>, hence no include guard and no includes.

namespace {

#include "cpu/padded_kernel.h"

// `count` elements of x, in place, to exp(x - max) / sum.
template <class T>
inline void softmax_row(T* x, int64_t count, float* memory) {
  const int64_t whole = count / Simd::kGroup * Simd::kGroup, left = count - whole;
  Padded<T> rest;
  if (left > 0) {
    for (T& element : rest.elements) element = Storage<T>::neg_inf();
    std::memcpy(rest.elements, x + whole, left * sizeof(T));
  }
  Simd::F most = Simd::set1(-__builtin_inff());
  const auto take_most = [&](const T* from) {
    Simd::F a, b;
    Simd::load2(from, a, b);
    most = Simd::max_into(Simd::max_into(most, a), b);
  };
  for (int64_t j = 0; j < whole; j += Simd::kGroup) take_most(x + j);
  if (left > 0) take_most(rest.elements);
  const Simd::F max = Simd::set1(Simd::reduce_max(most));
  const Simd::Decay decay(0x1.715476p+0f);
  Simd::F sum = Simd::zero();
  const auto take_sum = [&](const T* from, float* to) {
    Simd::F a, b;
    Simd::load2(from, a, b);
    a = decay.value(Simd::sub(max, a));
    b = decay.value(Simd::sub(max, b));
    sum = Simd::add(sum, Simd::add(a, b));
    Simd::store1(to, a);
    Simd::store1(to + Simd::kWidth, b);
  };
  for (int64_t j = 0; j < whole; j += Simd::kGroup) take_sum(x + j, memory + j);
  if (left > 0) take_sum(rest.elements, memory + whole);
  const Simd::F inverse = Simd::set1(1.0f / Simd::reduce_add(sum));
  const auto put = [&](const float* from, T* to) {
    Simd::template store2<false>(to, Simd::mul(Simd::load1(from), inverse),
                                 Simd::mul(Simd::load1(from + Simd::kWidth), inverse));
  };
  for (int64_t j = 0; j < whole; j += Simd::kGroup) put(memory + j, x + j);
  if (left > 0) {
    put(memory + whole, rest.elements);
    rest.copy_to(x + whole, left);
  }
}

template <class T>
void causal_rows(const CausalJob& job, int64_t first, int64_t end, float* memory) {
  for (int64_t i = first; i < end; ++i) {
    T* row = reinterpret_cast<T*>(job.scores) + i * job.keys;
    const int64_t stop = job.keys - job.queries + i % job.queries + 1;
    const int64_t start = stop > job.window ? stop - job.window : 0;
    softmax_row(row + start, stop - start, memory);
    std::memset(static_cast<void*>(row), 0, start * sizeof(T));
    std::memset(static_cast<void*>(row + stop), 0, (job.keys - stop) * sizeof(T));
  }
}

}  // namespace

const CausalRows causal_rows_bf16 = &causal_rows<BF16>;
