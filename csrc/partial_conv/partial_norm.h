// SPDX-License-Identifier: Apache-2.0
// A batch norm with fixed statistics as a scale and a shift: scale = weight / sqrt(var + eps), shift = bias - mean *
// scale, in float32 or wider, for each of n channels.
#pragma once

#include <tuple>

#include "common/dispatch.h"

namespace fused_inpaint {

inline int64_t check_norm(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var) {
  for (const Tensor* t : {&weight, &bias, &mean, &var})
    STD_TORCH_CHECK(t->numel() == weight.numel() && t->is_contiguous() && t->scalar_type() == weight.scalar_type() &&
                        t->device() == weight.device(),
                    "norm_constants: weight, bias, mean and var must be contiguous, of one size, dtype and device");
  return weight.numel();
}

}  // namespace fused_inpaint
