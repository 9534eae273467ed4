// Philox4x32-10 (Salmon et al. 2011), and a uniform number of 53 bits from it. The upper half of
// the counter is 0.
#pragma once

#include "common/host_device.h"

namespace qadapter {

struct PhiloxWords {
  uint32_t w0, w1;
};

QADAPTER_HD PhiloxWords philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// In [0, 1).
QADAPTER_HD double philox_uniform(uint64_t key, uint64_t counter) {
  const PhiloxWords w = philox(key, counter);
  return ((w.w0 >> 5) * 67108864.0 + (w.w1 >> 6)) * 0x1p-53;
}

// The key of row `row` of a batch that shares a seed.
QADAPTER_HD uint64_t philox_row_key(uint64_t seed, uint64_t row) {
  const PhiloxWords w = philox(seed, row);
  return (static_cast<uint64_t>(w.w0) << 32) | w.w1;
}

}  // namespace qadapter
