// Whether the kernels of this extension can run on a device.
#pragma once

#include <string>

namespace qadapter {
namespace cuda {

// Empty, or the reason: no driver, one too old, a device without a kernel in here.
std::string unusable_reason(int device);

}  // namespace cuda
}  // namespace qadapter
