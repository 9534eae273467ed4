// The CUDA extension is a Python module only so that Python can find and load it; its operations
// register themselves with torch (namespace qadapter_cuda) when it is loaded. It links no library
// of CUDA but the static runtime, so it loads, and can say why it does not run, on any machine.

#include <Python.h>

#include <string>

#include "cuda/tensors.h"

#include "cuda/status.h"

namespace qadapter {
namespace cuda {
namespace {

std::string unusable(int64_t device) { return unusable_reason(static_cast<int>(device)); }

}  // namespace

QADAPTER_FRAGMENT(QADAPTER_CUDA_LIBRARY, library) { library.def("unusable(int device) -> str"); }

QADAPTER_IMPL(QADAPTER_CUDA_LIBRARY, CompositeExplicitAutograd, library) {
  library.impl("unusable", TORCH_BOX(&unusable));
}

}  // namespace cuda
}  // namespace qadapter

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
