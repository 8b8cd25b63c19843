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
  explicit Fold(int64_t k) : kernel(k), taps((k + 1) / 2), padding((k / 2 + 1) / 2), shift((k / 2) % 2) {}
  // Tap of the folded kernel that holds tap u of the kernel, for phase a.
  int64_t tap(int64_t a, int64_t u) const {
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

  int64_t pixels() const { return n * h * w; }
  FUSED_INPAINT_INLINE const int32_t* count_row(int64_t row) const {
    return count + (count_n == 1 ? row % h : row) * w;
  }
  template <typename A>
  FUSED_INPAINT_INLINE A ratio(int64_t pixel) const {
    const int32_t valid = count[count_n == 1 ? pixel % (h * w) : pixel];
    return valid > 0 ? static_cast<A>(window) / static_cast<A>(valid) : A(0);
  }
};

Output describe_output(const Tensor& y, const Tensor& count, double window, const std::string& activation,
                       double slope);

// partial_epilogue_cpu.cpp. `phases` is the low-resolution convolution of Fold or null; `scale` and `bias` have c
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

// partial_operands_cpu.cpp
Tensor select_valid(const Tensor& x, const Tensor& mask);
void zero_holes(Tensor& x, const Tensor& mask);
Tensor concat_sources(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Ints& upsample);
void split_gradient(const Tensor& grad, const Ints& upsample, std::vector<Tensor>& grad_sources);
Tensor slice_weight(const Tensor& weight, int64_t first, int64_t channels);
Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels);
void unfold_gradient(const Tensor& grad_folded, int64_t first, Tensor& grad_weight);
void place_gradient(const Tensor& grad_slice, int64_t first, Tensor& grad_weight);
void accumulate(Tensor& sum, const Tensor& term);

}  // namespace fused_inpaint
