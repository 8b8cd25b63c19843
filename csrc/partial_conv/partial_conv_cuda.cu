// SPDX-License-Identifier: Apache-2.0
// Partial convolution on the GPU.
#define FUSED_INPAINT_DEVICE cuda
#include "common/launch.cuh"

namespace fused_inpaint::cuda {
constexpr bool kMatrixUnits = true;
constexpr auto convolution = aten_convolution;
constexpr auto convolution_backward = aten_convolution_backward;
constexpr bool suits_plain_weight(const Tensor&, const Tensor&, const ConvGeometry&) { return false; }
}  // namespace fused_inpaint::cuda

#include "partial_conv/partial_conv_host.h"

namespace fused_inpaint::cuda {

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("partial_conv2d", TORCH_BOX(&partial_conv2d));
  m.impl("partial_conv2d_normed", TORCH_BOX(&partial_conv2d_normed));
  m.impl("partial_conv2d_masked", TORCH_BOX(&partial_conv2d_masked));
  m.impl("partial_conv2d_backward", TORCH_BOX(&partial_conv2d_backward));
  m.impl("partial_conv2d_bn", TORCH_BOX(&partial_conv2d_bn));
  m.impl("partial_conv2d_bn_backward", TORCH_BOX(&partial_conv2d_bn_backward));
}

}  // namespace fused_inpaint::cuda
