// SPDX-License-Identifier: Apache-2.0
// Partial convolution on the CPU.
#define FUSED_INPAINT_DEVICE cpu
#include "common/convolution_cpu.h"

namespace fused_inpaint::cpu {
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
constexpr bool kMatrixUnits = false;
}  // namespace fused_inpaint::cpu

#include "partial_conv/partial_conv_host.h"

namespace fused_inpaint::cpu {

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("partial_conv2d", TORCH_BOX(&partial_conv2d));
  m.impl("partial_conv2d_normed", TORCH_BOX(&partial_conv2d_normed));
  m.impl("partial_conv2d_masked", TORCH_BOX(&partial_conv2d_masked));
  m.impl("partial_conv2d_backward", TORCH_BOX(&partial_conv2d_backward));
  m.impl("partial_conv2d_bn", TORCH_BOX(&partial_conv2d_bn));
  m.impl("partial_conv2d_bn_backward", TORCH_BOX(&partial_conv2d_bn_backward));
}

// A packed weight is an opaque oneDNN tensor and brings its own dispatch key.
STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, MkldnnCPU, m) {
  m.impl("partial_conv2d", TORCH_BOX(&partial_conv2d));
  m.impl("partial_conv2d_normed", TORCH_BOX(&partial_conv2d_normed));
  m.impl("partial_conv2d_masked", TORCH_BOX(&partial_conv2d_masked));
}

}  // namespace fused_inpaint::cpu
