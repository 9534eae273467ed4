// The vector code of decoder_layer: attention of one query, and a sum. decoder_layer.cpp has the
// maths. Included once per instruction set, inside namespace qadapter::<set>, hence no include guard
// and no includes.

namespace {

#include "cpu/padded_kernel.h"

// kGroup elements of a row from p on, of which `left` are there; zeros behind them.
template <class T>
inline void load_part(const T* p, int64_t left, Simd::F& a, Simd::F& b) {
  if (left >= Simd::kGroup) return Simd::load2(p, a, b);
  const Padded<T> rest(p, left);
  Simd::load2(rest.elements, a, b);
}

template <class T>
inline void put_part(T* p, int64_t left, Simd::F a, Simd::F b) {
  if (left >= Simd::kGroup) return Simd::template store2<false>(p, a, b);
  Padded<T> made;
  Simd::template store2<false>(made.elements, a, b);
  made.copy_to(p, left);
}

// Scores of COUNT queries against all keys of a head, kWidth keys at a time: partial sums are turned,
// so that no sum runs across lanes. q: floats in load2's order, `padded` a query.
template <class T, int COUNT>
inline void scores_of(const QueryJob& job, const char* keys, const float* q, int64_t padded,
                      float* scores, int64_t stride) {
  constexpr int kWidth = Simd::kWidth, kGroup = Simd::kGroup;
  for (int64_t t = 0; t < job.tokens; t += kWidth) {
    Simd::F partial[COUNT][kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = t + i < job.tokens ? t + i : job.tokens - 1;
      const T* key = reinterpret_cast<const T*>(keys + at * job.key_strides[2]);
      Simd::F sums[COUNT][2];
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; ++c) sums[c][0] = sums[c][1] = Simd::zero();
      for (int64_t d = 0; d < job.dim; d += kGroup) {
        Simd::F a, b;
        load_part(key + d, job.dim - d, a, b);
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) {
          const float* x = q + c * padded + d;
          sums[c][0] = Simd::fma(Simd::load1(x), a, sums[c][0]);
          sums[c][1] = Simd::fma(Simd::load1(x + kWidth), b, sums[c][1]);
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; ++c) partial[c][i] = Simd::add(sums[c][0], sums[c][1]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c) {
      Simd::transpose(partial[c]);
      for (int step = kWidth / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) {
          partial[c][i] = Simd::add(partial[c][i], partial[c][i + step]);
        }
      }
      Simd::store1(scores + c * stride + t, partial[c][0]);
    }
  }
}

// exp(x - max) in place, behind the row -inf; 1 / their sum. 0 where nothing is seen.
inline float exponentials(float* x, int64_t count) {
  Simd::F most = Simd::set1(-__builtin_inff()), sum = Simd::zero();
  for (int64_t j = 0; j < count; j += Simd::kWidth) most = Simd::max(Simd::load1(x + j), most);
  const float max = Simd::reduce_max(most);
  if (max == -__builtin_inff()) {
    std::memset(x, 0, count * sizeof(float));
    return 0.0f;
  }
  const Simd::Decay decay(0x1.715476p+0f);
  for (int64_t j = 0; j < count; j += Simd::kWidth) {
    const Simd::F e = decay.value(Simd::sub(Simd::set1(max), Simd::load1(x + j)));
    sum = Simd::add(sum, e);
    Simd::store1(x + j, e);
  }
  return 1.0f / Simd::reduce_add(sum);
}

template <class T, int COUNT>
inline void mix_values(const QueryJob& job, const char* values, const float* weights,
                       int64_t stride, const float* inverse, T* out) {
  for (int64_t d = 0; d < job.dim; d += Simd::kGroup) {
    const int64_t left = job.dim - d;
    Simd::F sums[COUNT][2];
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c) sums[c][0] = sums[c][1] = Simd::zero();
    for (int64_t t = 0; t < job.tokens; ++t) {
      Simd::F a, b;
      load_part(reinterpret_cast<const T*>(values + t * job.value_strides[2]) + d, left, a, b);
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; ++c) {
        const Simd::F p = Simd::set1(weights[c * stride + t]);
        sums[c][0] = Simd::fma(p, a, sums[c][0]);
        sums[c][1] = Simd::fma(p, b, sums[c][1]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c) {
      const Simd::F by = Simd::set1(inverse[c]);
      put_part(out + c * job.dim + d, left, Simd::mul(sums[c][0], by), Simd::mul(sums[c][1], by));
    }
  }
}

template <class T, int COUNT>
inline void attend(const QueryJob& job, int64_t row, int64_t head, int64_t query, float* memory) {
  constexpr int kGroup = Simd::kGroup;
  const int64_t padded = (job.dim + kGroup - 1) / kGroup * kGroup;
  const int64_t stride = (job.tokens + Simd::kWidth - 1) / Simd::kWidth * Simd::kWidth;
  const int64_t at = (row * job.heads + query) * job.dim;
  float *q = memory, *scores = memory + COUNT * padded;
  const Simd::F scaling = Simd::set1(job.scaling);
  for (int c = 0; c < COUNT; ++c) {
    const T* from = reinterpret_cast<const T*>(job.q) + at + c * job.dim;
    for (int64_t d = 0; d < job.dim; d += kGroup) {
      Simd::F a, b;
      load_part(from + d, job.dim - d, a, b);
      Simd::store1(q + c * padded + d, Simd::mul(a, scaling));
      Simd::store1(q + c * padded + d + Simd::kWidth, Simd::mul(b, scaling));
    }
  }
  const char* keys = job.keys + row * job.key_strides[0] + head * job.key_strides[1];
  scores_of<T, COUNT>(job, keys, q, padded, scores, stride);
  float inverse[COUNT];
  for (int c = 0; c < COUNT; ++c) {
    float* own = scores + c * stride;
    if (job.mask) {
      const bool* seen = job.mask + row * job.mask_strides[0];
      for (int64_t t = 0; t < job.tokens; ++t) {
        if (!seen[t * job.mask_strides[1]]) own[t] = -__builtin_inff();
      }
    }
    for (int64_t t = job.tokens; t < stride; ++t) own[t] = -__builtin_inff();
    inverse[c] = exponentials(own, stride);
  }
  mix_values<T, COUNT>(job, job.values + row * job.value_strides[0] + head * job.value_strides[1],
                       scores, stride, inverse, reinterpret_cast<T*>(job.out) + at);
}

template <class T>
void queries(const QueryJob& job, int64_t first, int64_t end, float* memory) {
  const int64_t key_heads = job.heads / job.groups;
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = i / key_heads, head = i % key_heads;
    for (int64_t g = 0; g < job.groups;) {
      const int64_t query = head * job.groups + g, left = job.groups - g;
      if (left >= 4) {
        attend<T, 4>(job, row, head, query, memory);
        g += 4;
      } else if (left == 3) {
        attend<T, 3>(job, row, head, query, memory);
        g += 3;
      } else if (left == 2) {
        attend<T, 2>(job, row, head, query, memory);
        g += 2;
      } else {
        attend<T, 1>(job, row, head, query, memory);
        g += 1;
      }
    }
  }
}

template <class T>
void sum_elements(const void* a, const void* b, void* out, int64_t count) {
  const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
  T* z = static_cast<T*>(out);
  for (int64_t j = 0; j < count; j += Simd::kGroup) {
    const int64_t left = count - j;
    Simd::F p, q, u, v;
    load_part(x + j, left, p, q);
    load_part(y + j, left, u, v);
    put_part(z + j, left, Simd::add(p, u), Simd::add(q, v));
  }
}

}  // namespace

const DecoderTable decoder_tables[2] = {{&queries<float>, &sum_elements<float>},
                                        {&queries<BF16>, &sum_elements<BF16>}};
