// Numbers that every backend of this package agrees on.
#pragma once

#include <cstdint>

namespace qadapter {

// actions[n] == kNoAction: the row only gives its value.
constexpr int64_t kNoAction = -100;

// statistics are kept in log2 units: exp(x) = exp2(x * kLog2E)
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

}  // namespace qadapter
