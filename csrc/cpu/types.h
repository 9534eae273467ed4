// Storage types of logits, and what the drivers hand to the vector code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace qadapter {

struct BF16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class T>
struct Storage;
template <>
struct Storage<float> {
  static float neg_inf() { return -__builtin_inff(); }
};
template <>
struct Storage<BF16> {
  static BF16 neg_inf() { return {0xff80}; }
  // the bits of x >= 0, or fewer; where x is of this type, they are its own
  static int16_t bits_below(float x) { return static_cast<int16_t>(float_bits(x) >> 16); }
};
template <>
struct Storage<Half> {
  static Half neg_inf() { return {0xfc00}; }
  static int16_t bits_below(float x) {  // 0 for subnormal halves and infinity
    const uint32_t bits = float_bits(x);
    const bool normal = bits >= 113u << 23 && bits < 143u << 23;
    return static_cast<int16_t>(normal ? (bits >> 13) - (112u << 10) : 0);
  }
};

// How the base logits enter x = z_q + m * z_b. A negative m needs care: -inf * m would be +inf.
enum class Mix : int { none = 0, positive = 1, negative = 2 };

inline Mix mix_of(double m) {
  return m == 0 ? Mix::none : (m > 0 ? Mix::positive : Mix::negative);
}

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace qadapter
