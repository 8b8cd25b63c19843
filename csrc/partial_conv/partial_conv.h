// SPDX-License-Identifier: Apache-2.0
// Partial convolution (Liu et al. 2018, eq. 1 and 2), fused:
//
//   y = act(scale * (W . X~) * window / count + bias)   where count > 0, else exactly 0
//   X~ = X where the mask is 1, else 0 (selected, so that a NaN in a hole reaches nothing)
//   count = number of valid values under the kernel window, window = channels * kh * kw
//
// X is the virtual concatenation of `sources`, each with its own mask and an upsample factor of 1 or 2 (nearest).
// Feature maps are (N, C, H, W) with channels last in memory; masks are contiguous uint8 (N or 1, 1 or C, H, W) with
// 1 = valid; counts are contiguous int32 (N or 1, 1, H', W').
#pragma once

#include <string>
#include <vector>

#include "common/aten.h"
#include "common/simd.h"

namespace fused_inpaint {

enum class Activation { none, relu, leaky_relu };

inline Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "leaky_relu", "partial_conv2d: activation must be none, relu or leaky_relu, got ", name);
  return Activation::leaky_relu;
}

// A nearest x2 upsample followed by an odd k x k convolution with padding k/2 is one convolution at the low resolution
// with (k+1)/2 taps a side and four times the output channels, one set for each phase (row parity, column parity):
// phase a of output row 2i + a is row i + a * shift of that convolution, padded by `padding`.
struct Fold {
  int64_t kernel, taps, padding, shift;
  FUSED_INPAINT_INLINE explicit Fold(int64_t k)
      : kernel(k), taps((k + 1) / 2), padding((k / 2 + 1) / 2), shift((k / 2) % 2) {}
  // Tap of the folded kernel that holds tap u of the kernel, for phase a.
  FUSED_INPAINT_INLINE int64_t tap(int64_t a, int64_t u) const {
    const int64_t offset = a - kernel / 2 + u;                           // of the upsampled row, from 2i
    const int64_t low = offset >= 0 ? offset / 2 : -((1 - offset) / 2);  // floor
    return low + padding - a * shift;
  }
};

// What the pass over the output needs beside the data. Shapes: output (n, c, h, w).
struct Output {
  int64_t n, c, h, w;
  const int32_t* count;  // (count_n, 1, h, w)
  int64_t count_n;
  double window;
  Activation activation;
  double slope;

  FUSED_INPAINT_INLINE int64_t pixels() const { return n * h * w; }
  FUSED_INPAINT_INLINE const int32_t* count_row(int64_t row) const {
    return count + (count_n == 1 ? row % h : row) * w;
  }
  template <typename A>
  FUSED_INPAINT_INLINE A ratio(int64_t pixel) const {
    const int32_t valid = count[count_n == 1 ? pixel % (h * w) : pixel];
    return valid > 0 ? static_cast<A>(window) / static_cast<A>(valid) : A(0);
  }
};

inline Output describe_output(const Tensor& y, const Tensor& count, double window, const std::string& activation,
                              double slope) {
  return {y.size(0),
          y.size(1),
          y.size(2),
          y.size(3),
          static_cast<const int32_t*>(count.const_data_ptr()),
          count.size(0),
          window,
          parse_activation(activation),
          slope};
}

// Side of a convolution's output.
inline int64_t window_output(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// Of masks that belong together: the batch, 1 if all of them are shared, 0 if one is empty.
inline int64_t batch_of(const std::vector<Tensor>& masks) {
  int64_t batch = 1;
  for (const Tensor& m : masks) {
    if (m.size(0) == 0) return 0;
    if (m.size(0) > batch) batch = m.size(0);
  }
  return batch;
}

inline void check_masks(const std::vector<Tensor>& masks, const Ints& channels, const Ints& upsample) {
  STD_TORCH_CHECK(!masks.empty() && masks.size() == channels.size() && masks.size() == upsample.size(),
                  "partial_window: masks, channels and upsample must be of one length");
  for (size_t i = 0; i < masks.size(); ++i)
    STD_TORCH_CHECK(masks[i].dim() == 4 && masks[i].scalar_type() == ScalarType::Byte && masks[i].is_contiguous() &&
                        masks[i].size(1) > 0 && (masks[i].size(0) == 1 || masks[i].size(0) == batch_of(masks)) &&
                        masks[i].size(2) * upsample[i] == masks[0].size(2) * upsample[0] &&
                        masks[i].size(3) * upsample[i] == masks[0].size(3) * upsample[0],
                    "partial_window: masks must be contiguous uint8 of one batch and one size after upsampling");
}

// The passes of each device, which the host functions of partial_conv_host.h put between the vendor's convolutions.
namespace FUSED_INPAINT_DEVICE {

// partial_epilogue. `phases` is the low-resolution convolution of Fold or null; `scale` and `bias` have c
// values. y: in, the sum of the full-resolution convolutions (or anything when !y_holds_sum); out, the layer's output.
void epilogue(Tensor& y, bool y_holds_sum, const Tensor* phases, int64_t shift, const Output& out, const Tensor& scale,
              const Tensor& bias);
void epilogue_backward(const Tensor& grad, const Tensor& y, const Output& out, const Tensor& scale, Tensor& grad_conv,
                       Tensor* grad_phases, int64_t shift, Tensor* grad_bias);
void batch_statistics(Tensor& conv, bool conv_holds_sum, const Tensor* phases, int64_t shift, const Output& out,
                      Tensor& mean, Tensor& var);
void batch_norm(const Tensor& conv, const Output& out, const Tensor& mean, const Tensor& var, const Tensor& weight,
                const Tensor& bias, double eps, Tensor& y);
void batch_norm_backward(const Tensor& grad, const Tensor& conv, const Output& out, const Tensor& mean,
                         const Tensor& var, const Tensor& weight, const Tensor& bias, double eps, Tensor& grad_conv,
                         Tensor* grad_phases, int64_t shift, Tensor& grad_weight, Tensor& grad_bias);

// partial_operands
Tensor select_valid(const Tensor& x, const Tensor& mask);
void zero_holes(Tensor& x, const Tensor& mask);
Tensor concat_sources(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Ints& upsample);
void split_gradient(const Tensor& grad, const Ints& upsample, std::vector<Tensor>& grad_sources);
Tensor slice_weight(const Tensor& weight, int64_t first, int64_t channels);
Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels);
void unfold_gradient(const Tensor& grad_folded, int64_t first, Tensor& grad_weight);
void place_gradient(const Tensor& grad_slice, int64_t first, Tensor& grad_weight);
void accumulate(Tensor& sum, const Tensor& term);

}  // namespace FUSED_INPAINT_DEVICE

}  // namespace fused_inpaint
