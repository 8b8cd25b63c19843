// SPDX-License-Identifier: Apache-2.0
// The masks of a layer, or of a network's sequence of layers, on either device. Included once for each device, after
// FUSED_INPAINT_DEVICE names the namespace of its passes.
#pragma once

#include "common/dispatch.h"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::FUSED_INPAINT_DEVICE {
namespace {

constexpr int64_t kIndexLimit = int64_t{1} << 31;  // the GPU's index arithmetic is 32-bit

// A partial convolution for its masks alone.
struct WindowStep {
  std::vector<Tensor> masks;  // (N or 1, 1 or C_i, H_i, W_i), uint8 and 0 or 1 unless they are packed as well
  Ints channels, upsample, kernel, stride, padding, dilation;
  Tensor counts, valid;        // (N or 1, 1, H', W'), int32 and of any mask's type
  std::vector<Tensor> planes;  // where the masks are to be packed, if they are
};

// Of each device: fills counts and valid, in the order of the steps.
void sum_windows(std::vector<WindowStep>& steps);

void check_masks(const char* op, const std::vector<Tensor>& masks, const Ints& channels, const Ints& upsample) {
  STD_TORCH_CHECK(!masks.empty() && masks.size() == channels.size() && masks.size() == upsample.size(), op,
                  ": masks, channels and upsample must be of one length, at least 1");
  for (size_t i = 0; i < masks.size(); ++i) {
    const Tensor& m = masks[i];
    STD_TORCH_CHECK(m.dim() == 4 && m.is_contiguous() && m.numel() < kIndexLimit && m.device() == masks[0].device(), op,
                    ": masks must be contiguous (N, C, H, W) of fewer than 2^31 elements on one device");
    STD_TORCH_CHECK((upsample[i] == 1 || upsample[i] == 2) && (m.size(0) == 1 || m.size(0) == batch_of(masks)) &&
                        m.size(2) * upsample[i] == masks[0].size(2) * upsample[0] &&
                        m.size(3) * upsample[i] == masks[0].size(3) * upsample[0],
                    op, ": masks must be of one batch, and of one size after upsampling by 1 or 2");
    STD_TORCH_CHECK(m.size(1) > 0 && channels[i] > 0 && channels[i] % m.size(1) == 0 && channels[i] < kIndexLimit, op,
                    ": a mask for ", channels[i], " channels must have 1 or as many, got ", m.size(1));
  }
}

void check_planes(const char* op, const std::vector<Tensor>& masks) {
  for (const Tensor& m : masks) STD_TORCH_CHECK(m.scalar_type() == ScalarType::Byte, op, ": masks must be uint8");
}

// A step that is safe to run, its results allocated.
WindowStep window_step(const char* op, const std::vector<Tensor>& masks, const Ints& channels, const Ints& upsample,
                       const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
                       ScalarType valid) {
  check_masks(op, masks, channels, upsample);
  auto within = [&](const Ints& pair, int64_t least) {
    return pair.size() == 2 && pair[0] >= least && pair[0] < kIndexLimit && pair[1] >= least && pair[1] < kIndexLimit;
  };
  STD_TORCH_CHECK(within(kernel, 1) && within(stride, 1) && within(padding, 0) && within(dilation, 1), op,
                  ": kernel, stride and dilation must be two numbers of at least 1, and padding of at least 0");
  int64_t size[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t side = masks[0].size(2 + d) * upsample[0];
    size[d] = window_output(side, kernel[d], stride[d], padding[d], dilation[d]);
    STD_TORCH_CHECK(size[d] > 0 && side + 2 * padding[d] < kIndexLimit, op,
                    ": masks must be at least as large as the kernel, and below 2^31 padded, got a side of ", side);
  }
  const int64_t batch = batch_of(masks);
  STD_TORCH_CHECK(size[0] < kIndexLimit / size[1] && batch * size[0] * size[1] < kIndexLimit, op,
                  ": counts must be fewer than 2^31");
  return {masks,
          channels,
          upsample,
          kernel,
          stride,
          padding,
          dilation,
          empty({batch, 1, size[0], size[1]}, ScalarType::Int, masks[0]),
          empty({batch, 1, size[0], size[1]}, valid, masks[0]),
          {}};
}

}  // namespace

std::tuple<Tensor, Tensor> partial_window(std::vector<Tensor> masks, Ints channels, Ints upsample, Ints kernel,
                                          Ints stride, Ints padding, Ints dilation) {
  const char* op = "partial_window";
  check_planes(op, masks);
  std::vector<WindowStep> steps{
      window_step(op, masks, channels, upsample, kernel, stride, padding, dilation, ScalarType::Byte)};
  sum_windows(steps);
  return {steps[0].counts, steps[0].valid};
}

// `steps` holds for each of them: how many sources, for each source (mask, channels, upsample), then kernel, stride,
// padding and dilation, two numbers each. Masks are numbered through: those given, then the new one of each step.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> partial_window_chain(std::vector<Tensor> masks, Ints steps) {
  const char* op = "partial_window_chain";
  check_planes(op, masks);
  std::vector<WindowStep> chain;
  size_t at = 0;
  auto next = [&] {
    STD_TORCH_CHECK(at < steps.size(), op, ": steps must be whole, but end within step ", chain.size());
    return steps[at++];
  };
  auto next_pair = [&] { return Ints{next(), next()}; };
  while (at < steps.size()) {
    const int64_t sources = next();
    STD_TORCH_CHECK(sources >= 1, op, ": a step must have at least 1 source, got ", sources);
    std::vector<Tensor> inputs;
    Ints channels, upsample;
    for (int64_t i = 0; i < sources; ++i) {
      const int64_t mask = next(), known = static_cast<int64_t>(masks.size());
      STD_TORCH_CHECK(mask >= 0 && mask < known, op, ": step ", chain.size(), " must name a mask below ", known,
                      ", got ", mask);
      inputs.push_back(masks[mask]);
      channels.push_back(next());
      upsample.push_back(next());
    }
    const Ints kernel = next_pair(), stride = next_pair(), padding = next_pair(), dilation = next_pair();
    chain.push_back(window_step(op, inputs, channels, upsample, kernel, stride, padding, dilation, ScalarType::Byte));
    masks.push_back(chain.back().valid);
  }
  sum_windows(chain);
  std::vector<Tensor> counts, valid;
  for (const WindowStep& step : chain) {
    counts.push_back(step.counts);
    valid.push_back(step.valid);
  }
  return {counts, valid};
}

}  // namespace fused_inpaint::FUSED_INPAINT_DEVICE
