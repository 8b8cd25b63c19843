// SPDX-License-Identifier: Apache-2.0
// A batch norm's running statistics, moved towards those of a batch: running += momentum * (batch - running), the
// variance times `factor` first, which makes it the unbiased one.
#pragma once

#include "common/dispatch.h"

namespace fused_inpaint {

inline int64_t check_track(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                           const Tensor& var) {
  for (const Tensor* t : {&running_mean, &running_var, &mean, &var})
    STD_TORCH_CHECK(t->numel() == mean.numel() && t->is_contiguous() && t->scalar_type() == mean.scalar_type() &&
                        t->device() == mean.device(),
                    "norm_track: running and batch statistics must be contiguous, of one size, dtype and device");
  return mean.numel();
}

// As torch's lerp: exact at both ends.
template <typename A>
FUSED_INPAINT_INLINE A between(A from, A to, A w) {
  return w < A(0.5) ? from + w * (to - from) : to - (to - from) * (A(1) - w);
}

}  // namespace fused_inpaint
