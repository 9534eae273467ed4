// The types of logits.
#pragma once

#include <cstdint>

namespace qadapter {
namespace cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int elements_per_vector(DType dtype) { return dtype == DType::f32 ? 4 : 8; }

}  // namespace cuda
}  // namespace qadapter
