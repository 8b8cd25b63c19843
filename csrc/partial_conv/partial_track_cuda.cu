// SPDX-License-Identifier: Apache-2.0
// Running statistics of a batch norm on the GPU, in one launch.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_track.h"

namespace fused_inpaint::cuda {
namespace {

template <typename T>
__global__ void norm_track_kernel(T* running_mean, T* running_var, const T* mean, const T* var, acc_t<T> momentum,
                                  acc_t<T> factor, unsigned n) {
  for (unsigned c = global_thread(); c < n; c += all_threads()) {
    store(running_mean + c, between(load(running_mean[c]), load(mean[c]), momentum));
    store(running_var + c, between(load(running_var[c]), load(var[c]) * factor, momentum));
  }
}

}  // namespace

void norm_track(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, double momentum, double factor) {
  const int64_t n = check_track(running_mean, running_var, mean, var);
  const DeviceGuard guard(mean);
  if (n == 0) return;
  dispatch_cuda(mean.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    FUSED_INPAINT_LAUNCH(norm_track_kernel<T>, blocks_for(n), dim3(kThreads), 0, current_stream(mean),
                         mutable_data<T>(running_mean), mutable_data<T>(running_var), data<T>(mean), data<T>(var),
                         static_cast<A>(momentum), static_cast<A>(factor), index32(n));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) { m.impl("norm_track", TORCH_BOX(&norm_track)); }

}  // namespace fused_inpaint::cuda
