// SPDX-License-Identifier: Apache-2.0
// The constants of a batch norm with fixed statistics on the CPU.
#define FUSED_INPAINT_DEVICE cpu
#include <cmath>

#include "partial_conv/partial_norm.h"

namespace fused_inpaint::cpu {

std::tuple<Tensor, Tensor> norm_constants(Tensor weight, Tensor bias, Tensor mean, Tensor var, double eps) {
  const int64_t n = check_norm(weight, bias, mean, var);
  Tensor scale = empty({n}, wide(weight.scalar_type()), weight), shift = empty({n}, wide(weight.scalar_type()), weight);
  dispatch_float("norm_constants", weight.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    A *gain = mutable_data<A>(scale), *offset = mutable_data<A>(shift);
    for (int64_t c = 0; c < n; ++c) {
      gain[c] = load(data<T>(weight)[c]) / std::sqrt(load(data<T>(var)[c]) + static_cast<A>(eps));
      offset[c] = load(data<T>(bias)[c]) - load(data<T>(mean)[c]) * gain[c];
    }
  });
  return {scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) { m.impl("norm_constants", TORCH_BOX(&norm_constants)); }

}  // namespace fused_inpaint::cpu
