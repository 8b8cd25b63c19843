// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/aten.h"
#include "common/simd.h"

namespace fused_inpaint {

// Calls body.template operator()<T>() for the element type of a feature map.
template <typename F>
void dispatch_float(const char* op, ScalarType dtype, F&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::BFloat16:
      return body.template operator()<bf16>();
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float64 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fused_inpaint
