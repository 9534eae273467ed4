// The extension is a Python module only so that Python can find and load it; its operations
// register themselves with torch (namespace qadapter_C) when it is loaded.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace qadapter {

// The best instruction set of this CPU: 0 plain, 1 AVX2, 2 AVX-512.
int64_t best_isa() { return static_cast<int64_t>(detect_isa()); }

// Whether it has AVX512_BF16 too, which operations use where no set is asked for.
bool has_bf16_dot() { return choose_bf16_dot(-1); }

STABLE_TORCH_LIBRARY(qadapter_C, library) {
  library.def("best_isa() -> int");
  library.def("has_bf16_dot() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qadapter_C, CompositeExplicitAutograd, library) {
  library.impl("best_isa", TORCH_BOX(&best_isa));
  library.impl("has_bf16_dot", TORCH_BOX(&has_bf16_dot));
}

}  // namespace qadapter

PyMODINIT_FUNC PyInit__C_cpu(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, nullptr,
                                          nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
