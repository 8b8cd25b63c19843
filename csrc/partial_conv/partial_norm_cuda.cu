// SPDX-License-Identifier: Apache-2.0
// The constants of a batch norm with fixed statistics on the GPU, in one launch.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_norm.h"

namespace fused_inpaint::cuda {
namespace {

template <typename T>
__global__ void norm_constants_kernel(const T* weight, const T* bias, const T* mean, const T* var, acc_t<T> eps,
                                      unsigned n, acc_t<T>* scale, acc_t<T>* shift) {
  for (unsigned c = global_thread(); c < n; c += all_threads()) {
    scale[c] = load(weight[c]) / std::sqrt(load(var[c]) + eps);
    shift[c] = load(bias[c]) - load(mean[c]) * scale[c];
  }
}

}  // namespace

std::tuple<Tensor, Tensor> norm_constants(Tensor weight, Tensor bias, Tensor mean, Tensor var, double eps) {
  const int64_t n = check_norm(weight, bias, mean, var);
  const DeviceGuard guard(weight);
  Tensor scale = empty({n}, wide(weight.scalar_type()), weight), shift = empty({n}, wide(weight.scalar_type()), weight);
  if (n == 0) return {scale, shift};
  dispatch_cuda(weight.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    FUSED_INPAINT_LAUNCH(norm_constants_kernel<T>, blocks_for(n), dim3(kThreads), 0, current_stream(weight),
                         data<T>(weight), data<T>(bias), data<T>(mean), data<T>(var), static_cast<A>(eps), index32(n),
                         mutable_data<A>(scale), mutable_data<A>(shift));
  });
  return {scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("norm_constants", TORCH_BOX(&norm_constants));
}

}  // namespace fused_inpaint::cuda
