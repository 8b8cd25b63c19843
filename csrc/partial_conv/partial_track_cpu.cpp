// SPDX-License-Identifier: Apache-2.0
// Running statistics of a batch norm on the CPU.
#define FUSED_INPAINT_DEVICE cpu
#include "partial_conv/partial_track.h"

namespace fused_inpaint::cpu {

void norm_track(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, double momentum, double factor) {
  const int64_t n = check_track(running_mean, running_var, mean, var);
  dispatch_float("norm_track", mean.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    T *to_mean = mutable_data<T>(running_mean), *to_var = mutable_data<T>(running_var);
    const A w = static_cast<A>(momentum), f = static_cast<A>(factor);
    for (int64_t c = 0; c < n; ++c) {
      store(to_mean + c, between(load(to_mean[c]), load(data<T>(mean)[c]), w));
      store(to_var + c, between(load(to_var[c]), load(data<T>(var)[c]) * f, w));
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) { m.impl("norm_track", TORCH_BOX(&norm_track)); }

}  // namespace fused_inpaint::cpu
