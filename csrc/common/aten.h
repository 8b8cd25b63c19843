// SPDX-License-Identifier: Apache-2.0
// Tensors and the vendor's convolution through torch's stable C ABI: nothing here depends on a particular torch build.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace fused_inpaint {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// True where the bytes lie as (N, H, W, C) and the strides say so even for an extent of one: torch chooses a
// convolution's path by them, and equal values must take equal paths.
inline bool is_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const std::array<int64_t, 4> expected{h * w * c, 1, w * c, c};
  for (int d = 0; d < 4; ++d)
    if (t.stride(d) != expected[d]) return false;
  return true;
}

inline std::vector<int64_t> sizes(const Tensor& t) {
  std::vector<int64_t> out;
  for (int64_t d = 0; d < t.dim(); ++d) out.push_back(t.size(d));
  return out;
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

// Gradients of parameters are summed in these.
inline ScalarType wide(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Through the C function itself: torch::stable::empty asks the dispatcher by name, at three times the price. Not for a
// CPU's tensors, whose memory it would give out as it is: tests see what was not written by torch's filling it
// (torch.utils.deterministic.fill_uninitialized_memory).
inline Tensor empty_strided(const Ints& size, const Ints& strides, ScalarType dtype, const Tensor& like) {
  using torch::stable::detail::from, torch::stable::detail::to;
  int32_t device, index;
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), strides.data(),
                                                  to<int32_t>(from(dtype)), device, index, &out));
  return Tensor(out);
}

inline Tensor empty_channels_last(const Ints& size, ScalarType dtype, const Tensor& like) {
  if (like.is_cpu())
    return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
  const int64_t c = size[1], h = size[2], w = size[3];
  return empty_strided(size, {h * w * c, 1, w * c, c}, dtype, like);
}

inline Tensor empty(const Ints& size, ScalarType dtype, const Tensor& like) {
  if (like.is_cpu()) return torch::stable::empty(size, dtype, std::nullopt, like.device());
  Ints strides(size.size(), 1);
  for (size_t d = size.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(size[d], 1);
  return empty_strided(size, strides, dtype, like);
}

// Contiguous, of any rank.
inline Tensor empty_of_size(const Tensor& like, ScalarType dtype) {
  std::vector<int64_t> size;
  for (int64_t d = 0; d < like.dim(); ++d) size.push_back(like.size(d));
  return empty(size, dtype, like);
}

// Contiguous, copied only if it is not.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  Tensor out = empty_channels_last({t.size(0), t.size(1), t.size(2), t.size(3)}, dtype, t);
  torch::stable::copy_(out, t);
  return out;
}

inline Tensor clone_channels_last(const Tensor& t) { return cast(t, t.scalar_type()); }

inline Tensor channels_last(const Tensor& t) { return is_channels_last(t) ? t : clone_channels_last(t); }

inline Tensor zeros_like_size(const std::vector<int64_t>& size, const Tensor& like) {
  Tensor out = empty_channels_last(size, like.scalar_type(), like);
  torch::stable::zero_(out);
  return out;
}

struct ConvGeometry {
  Ints stride, padding, dilation;
  int64_t groups;
};

// Side of a convolution's output.
inline int64_t window_output(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// The CPU's float16 convolution accumulates in float16, which no GPU's does: emulation goes around it.
inline bool emulates_half(const Tensor& t) {
#ifdef FUSED_INPAINT_EMULATE
  return t.scalar_type() == ScalarType::Half;
#else
  (void)t;
  return false;
#endif
}

inline Tensor aten_convolution(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (emulates_half(x))
    return cast(aten_convolution(cast(x, ScalarType::Float), cast(weight, ScalarType::Float), g), ScalarType::Half);
  using torch::stable::detail::from;
  const std::optional<Tensor> no_bias;
  std::array<StableIValue, 9> stack{from(x),          from(weight), from(no_bias),    from(g.stride), from(g.padding),
                                    from(g.dilation), from(false),  from(Ints{0, 0}), from(g.groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return channels_last(torch::stable::detail::to<Tensor>(stack[0]));
}

// (grad_x, grad_weight); the one not asked for is left undefined.
inline std::tuple<std::optional<Tensor>, std::optional<Tensor>> aten_convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool need_x, bool need_weight) {
  if (emulates_half(x)) {
    auto wide = aten_convolution_backward(cast(grad, ScalarType::Float), cast(x, ScalarType::Float),
                                          cast(weight, ScalarType::Float), g, need_x, need_weight);
    if (need_x) std::get<0>(wide) = cast(*std::get<0>(wide), ScalarType::Half);
    if (need_weight) std::get<1>(wide) = cast(*std::get<1>(wide), ScalarType::Half);
    return wide;
  }
  using torch::stable::detail::from;
  const std::optional<Ints> no_bias_sizes;
  const bool wanted[3] = {need_x, need_weight, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(no_bias_sizes),
                                     from(g.stride),
                                     from(g.padding),
                                     from(g.dilation),
                                     from(false),
                                     from(Ints{0, 0}),
                                     from(g.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  // The handles of outputs that were not computed wrap undefined tensors: take ownership, then drop them.
  Tensor grad_x = torch::stable::detail::to<Tensor>(stack[0]);
  Tensor grad_weight = torch::stable::detail::to<Tensor>(stack[1]);
  Tensor grad_bias = torch::stable::detail::to<Tensor>(stack[2]);
  std::tuple<std::optional<Tensor>, std::optional<Tensor>> out;
  if (need_x) std::get<0>(out) = channels_last(grad_x);
  if (need_weight) std::get<1>(out) = channels_last(grad_weight);
  return out;
}

}  // namespace fused_inpaint
