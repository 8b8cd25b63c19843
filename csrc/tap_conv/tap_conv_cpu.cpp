// SPDX-License-Identifier: Apache-2.0
// Convolution at the input's resolution on the CPU.
#define FUSED_INPAINT_DEVICE cpu
#include "tap_conv/tap_rows_cpu.h"

#include <optional>

namespace fused_inpaint::cpu {

Tensor tap_conv2d(std::vector<Tensor> maps, Tensor weight, std::optional<Tensor> bias, std::string upsampling,
                  std::string padding_mode, std::string activation, double slope) {
  const TapConv c = describe_taps(maps, weight, upsampling, padding_mode, activation, slope);
  STD_TORCH_CHECK(
      !bias || (bias->is_contiguous() && bias->numel() == c.outputs && bias->scalar_type() == weight.scalar_type()),
      "tap_conv2d: bias must be contiguous (O,) in weight's dtype");
  Tensor y = empty_channels_last({c.n, c.outputs, c.h * c.factor(), c.w * c.factor()}, weight.scalar_type(), weight);
  if (c.n == 0) return y;
  for (Tensor& x : maps) x = channels_last(x);
  const auto run = [&]<typename T>() {
    convolve_taps<T>(c, {{maps, 0}}, nullptr, weight, bias ? data<T>(*bias) : nullptr, y);
  };
  if (weight.scalar_type() == ScalarType::Double)
    run.template operator()<double>();
  else if (weight.scalar_type() == ScalarType::Float)
    run.template operator()<float>();
  else
    STD_TORCH_CHECK(false, "tap_conv2d: dtype must be float32 or float64");
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) { m.impl("tap_conv2d", TORCH_BOX(&tap_conv2d)); }

}  // namespace fused_inpaint::cpu
