// SPDX-License-Identifier: Apache-2.0
// Build facts of the library in which the kernels register themselves with torch. No kernel depends on this file.
//
// fused_inpaint/_extension.py loads the library with ctypes and reads the exported function, so Python.h is optional:
// a Debian python3 without python3-dev has none, and a free-threaded Python has no limited API to compile against.
// With Python.h at hand the library is also an importable module, fused_inpaint._C, whose `facts` is the same JSON
// text.

#if defined(Py_LIMITED_API) && __has_include(<Python.h>)
#define FUSED_INPAINT_PYTHON_MODULE
#include <Python.h>
#endif

#include <torch/headeronly/version.h>

#define FUSED_INPAINT_TEXT_(x) #x
#define FUSED_INPAINT_TEXT(x) FUSED_INPAINT_TEXT_(x)

#ifdef _OPENMP
#define FUSED_INPAINT_OPENMP FUSED_INPAINT_TEXT(_OPENMP)
#else
#define FUSED_INPAINT_OPENMP "null"
#endif

#ifdef FUSED_INPAINT_CUDA
#define FUSED_INPAINT_WITH_CUDA "true"
#else
#define FUSED_INPAINT_WITH_CUDA "false"
#endif

#ifdef FUSED_INPAINT_EMULATE
#define FUSED_INPAINT_EMULATED "true"
#else
#define FUSED_INPAINT_EMULATED "false"
#endif

static const char facts[] =
    "{\"torch\": \"" TORCH_VERSION "\", \"torch_target\": \"" FUSED_INPAINT_TEXT(TORCH_TARGET_VERSION) "\", "
    "\"compiler\": \"" __VERSION__ "\", \"cplusplus\": \"" FUSED_INPAINT_TEXT(__cplusplus) "\", "
    "\"openmp\": " FUSED_INPAINT_OPENMP ", \"cuda\": " FUSED_INPAINT_WITH_CUDA ", \"emulated\": " FUSED_INPAINT_EMULATED "}";

extern "C" __attribute__((visibility("default"))) const char* fused_inpaint_build_facts() { return facts; }

#ifdef FUSED_INPAINT_PYTHON_MODULE
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   "Build facts of fused_inpaint's kernels.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "facts", facts) != 0) {
    Py_DecRef(module);
    return nullptr;
  }
  return module;
}
#endif
