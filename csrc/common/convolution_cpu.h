// SPDX-License-Identifier: Apache-2.0
// The backward pass of a convolution on a CPU: the vendor's, but for the weight's gradient over few pixels.
#pragma once

#include <cstring>

#include "common/products.h"

namespace fused_inpaint::cpu {
namespace {

// Over few pixels the vendor's kernel spends its time on bringing the weight's gradient into and out of its own layout:
// a product of matrices for each tap, written to its place, takes a third of the time (measured from 4 x 4 to 17 x 17;
// at 32 x 32 the vendor's is the quicker).
inline bool suits_products(const Tensor& grad, const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  return g.groups == 1 && x.scalar_type() == wide(x.scalar_type()) &&
         grad.size(0) * grad.size(2) * grad.size(3) <= 512 && weight.size(0) * weight.size(1) >= int64_t{1} << 14;
}

// (O, C, kh, kw), channels last: for tap (u, v) the product of grad (pixels, O), transposed, and of what the tap reads,
// (pixels, C). A tap is one thread's.
template <typename T>
Tensor weight_gradient(const Tensor& grad_, const Tensor& x_, const Tensor& weight, const ConvGeometry& g) {
  const Tensor grad = channels_last(grad_), x = channels_last(x_);
  const int64_t outputs = weight.size(0), channels = weight.size(1), height = weight.size(2), width = weight.size(3);
  const int64_t rows = grad.size(2), columns = grad.size(3), pixels = grad.size(0) * rows * columns;
  const int64_t taps = height * width, h = x.size(2), w = x.size(3);
  Tensor out = empty_channels_last(sizes(weight), weight.scalar_type(), weight);
  const Tensor left = matrix(data<T>(grad), outputs, pixels, 1, outputs, grad);
  const T* from = data<T>(x);
  T* to = mutable_data<T>(out);
  share(taps, [&](auto&& take) {
    Tensor read = empty({pixels, channels}, x.scalar_type(), x);
    for (int64_t tap; (tap = take()) >= 0;) {
      T* row = mutable_data<T>(read);
      for (int64_t p = 0; p < pixels; ++p, row += channels) {
        const int64_t i = p / columns % rows * g.stride[0] - g.padding[0] + tap / width * g.dilation[0];
        const int64_t j = p % columns * g.stride[1] - g.padding[1] + tap % width * g.dilation[1];
        if (i >= 0 && i < h && j >= 0 && j < w)
          std::memcpy(row, from + ((p / columns / rows * h + i) * w + j) * channels, channels * sizeof(T));
        else
          std::memset(row, 0, channels * sizeof(T));
      }
      multiply(left, read, matrix(to + tap * channels, outputs, channels, taps * channels, 1, out));
    }
  });
  return out;
}

// As aten_convolution_backward.
inline std::tuple<std::optional<Tensor>, std::optional<Tensor>> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool need_x, bool need_weight) {
  if (!need_weight || !suits_products(grad, x, weight, g))
    return aten_convolution_backward(grad, x, weight, g, need_x, need_weight);
  std::tuple<std::optional<Tensor>, std::optional<Tensor>> out;
  if (need_x) out = aten_convolution_backward(grad, x, weight, g, true, false);
  std::get<1>(out) = x.scalar_type() == ScalarType::Double ? weight_gradient<double>(grad, x, weight, g)
                                                           : weight_gradient<float>(grad, x, weight, g);
  return out;
}

}  // namespace
}  // namespace fused_inpaint::cpu
