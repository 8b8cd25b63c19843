// SPDX-License-Identifier: Apache-2.0
// A convolution and its backward pass on a CPU: the vendor's, but over few pixels, where the vendor's kernels spend
// their time on bringing weights and their gradients into and out of their own layout.
#pragma once

#include <cstring>

#include "common/implicit_gemm_cpu.h"

namespace fused_inpaint::cpu {
namespace {

// Pixels of an output up to which our own is the quicker, measured from 1 to 512: the implicit GEMM than the vendor's
// convolution as it is, and than one whose weight is in the vendor's layout already; products than its gradients.
constexpr int64_t kFewPixels = 64, kFewPixelsPacked = 16, kFewForSource = 128, kFewForWeight = 512;
// Smaller weights, in values, and in values of a tap, are laid out in no time.
constexpr int64_t kLargeWeight = int64_t{1} << 19, kLargeTap = int64_t{1} << 14;

// None where the vendor has to refuse the geometry, or to split it into groups.
inline std::optional<Taps> taps_of(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  auto within = [](const Ints& pair, int64_t least) {
    auto fits = [&](int64_t i) { return i >= least && i < int64_t{1} << 30; };
    return pair.size() == 2 && fits(pair[0]) && fits(pair[1]);
  };
  if (g.groups != 1 || !within(g.stride, 1) || !within(g.padding, 0) || !within(g.dilation, 1)) return std::nullopt;
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t size = x.size(2 + d), kernel = weight.size(2 + d);
    if (size + 2 * g.padding[d] <= g.dilation[d] * (kernel - 1)) return std::nullopt;
    out[d] = window_output(size, kernel, g.stride[d], g.padding[d], g.dilation[d]);
  }
  return Taps{x, weight, g, out[0], out[1]};
}

// The taps of a convolution that should be an implicit_gemm, if it is one, of at most so many pixels.
inline std::optional<Taps> few_pixels(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t pixels) {
  if (!has_implicit_gemm() || x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float ||
      x.size(1) % kLanes || weight.size(0) % kFilters || weight.numel() < kLargeWeight || !is_channels_last(x) ||
      !is_channels_last(weight))
    return std::nullopt;
  const auto taps = taps_of(x, weight, g);
  return taps && taps->rows <= pixels ? taps : std::nullopt;
}

// As aten_convolution.
inline Tensor convolution(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  const auto taps = few_pixels(x, weight, g, kFewPixels);
  return taps ? implicit_gemm(x, weight, *taps) : aten_convolution(x, weight, g);
}

// Whether that is quicker than the vendor's with a packed weight.
inline bool suits_plain_weight(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  return few_pixels(x, weight, g, kFewPixelsPacked).has_value();
}

// (O, C, kh, kw), channels last: for each tap the product of grad (pixels, O), transposed, and of what the tap reads,
// (pixels, C). A tap is one thread's.
template <typename T>
Tensor weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight, const Taps& taps) {
  const int64_t outputs = weight.size(0), channels = weight.size(1), n = weight.size(2) * weight.size(3);
  Tensor out = empty_channels_last(sizes(weight), weight.scalar_type(), weight);
  const Tensor left = matrix(data<T>(grad), outputs, taps.rows, 1, outputs, grad);
  const T* from = data<T>(x);
  T* to = mutable_data<T>(out);
  share(n, [&](auto&& take) {
    Tensor read = empty({taps.rows, channels}, x.scalar_type(), x);
    for (int64_t tap; (tap = take()) >= 0;) {
      T* row = mutable_data<T>(read);
      for (int64_t p = 0; p < taps.rows; ++p, row += channels)
        if (const int64_t pixel = taps.source(tap, p); pixel >= 0)
          std::memcpy(row, from + pixel * channels, channels * sizeof(T));
        else
          std::memset(row, 0, channels * sizeof(T));
      multiply(left, read, matrix(to + tap * channels, outputs, channels, n * channels, 1, out));
    }
  });
  return out;
}

template <typename T>
FUSED_INPAINT_CLONES void add_values(const T* from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// (N, C, H, W), channels last: for each tap the product of grad (pixels, O) and of the tap's weights (O, C), on one
// thread, whose rows are then added, tap after tap, to the pixels that were read.
template <typename T>
Tensor source_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight, const Taps& taps) {
  const int64_t outputs = weight.size(0), channels = weight.size(1), n = weight.size(2) * weight.size(3);
  Tensor products = empty({n, taps.rows, channels}, x.scalar_type(), x);
  const Tensor left = matrix(data<T>(grad), taps.rows, outputs, outputs, 1, grad);
  const T* filters = data<T>(weight);
  T* const found = mutable_data<T>(products);
  share(n, [&](auto&& take) {
    for (int64_t tap; (tap = take()) >= 0;)
      multiply(left, matrix(filters + tap * channels, outputs, channels, n * channels, 1, weight),
               matrix(found + tap * taps.rows * channels, taps.rows, channels, channels, 1, products));
  });
  Tensor out = zeros_like_size(sizes(x), x);
  T* const to = mutable_data<T>(out);
  constexpr int64_t kSlice = 64;
  parallel_for(0, ceil_div(channels, kSlice), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kSlice, width = std::min(end * kSlice, channels) - first;
    for (int64_t i = 0; i < n * taps.rows; ++i)
      if (const int64_t pixel = taps.source(i / taps.rows, i % taps.rows); pixel >= 0)
        add_values(found + i * channels + first, to + pixel * channels + first, width);
  });
  return out;
}

// As aten_convolution_backward. Over few pixels a gradient is products of matrices.
inline std::tuple<std::optional<Tensor>, std::optional<Tensor>> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool need_x, bool need_weight) {
  const auto taps = taps_of(x, weight, g);
  const bool suits = taps && taps->h == grad.size(2) && taps->w == grad.size(3) &&
                     x.scalar_type() == wide(x.scalar_type()) && weight.size(0) * weight.size(1) >= kLargeTap;
  const bool x_here = suits && need_x && taps->rows <= kFewForSource && is_channels_last(weight);
  const bool weight_here = suits && need_weight && taps->rows <= kFewForWeight;
  if (!x_here && !weight_here) return aten_convolution_backward(grad, x, weight, g, need_x, need_weight);
  std::tuple<std::optional<Tensor>, std::optional<Tensor>> out;
  if (need_x > x_here || need_weight > weight_here)
    out = aten_convolution_backward(grad, x, weight, g, need_x > x_here, need_weight > weight_here);
  const Tensor dy = channels_last(grad), read = channels_last(x);
  auto products = [&]<typename T>() {
    if (x_here) std::get<0>(out) = source_gradient<T>(dy, read, weight, *taps);
    if (weight_here) std::get<1>(out) = weight_gradient<T>(dy, read, weight, *taps);
  };
  if (x.scalar_type() == ScalarType::Double)
    products.template operator()<double>();
  else
    products.template operator()<float>();
  return out;
}

}  // namespace
}  // namespace fused_inpaint::cpu
