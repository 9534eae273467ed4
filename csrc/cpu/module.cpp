// The extension is a Python module only so that Python can find and load it; its operations
// register themselves with torch (namespace qadapter_C) when it is loaded.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace qadapter {

// The best instruction set of this CPU: 0 plain, 1 AVX2, 2 AVX-512, 3 with AVX512_BF16, 4 with AMX.
int64_t best_isa() { return static_cast<int64_t>(detect_isa()); }

STABLE_TORCH_LIBRARY(qadapter_C, library) { library.def("best_isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CompositeExplicitAutograd, library) {
  library.impl("best_isa", TORCH_BOX(&best_isa));
}

}  // namespace qadapter

PyMODINIT_FUNC PyInit__C_cpu(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
