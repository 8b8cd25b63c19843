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
#include <tuple>
#include <vector>

#include "common/aten.h"
#include "common/fold.h"
#include "common/simd.h"

namespace fused_inpaint {

enum class Activation { none, relu, leaky_relu };

inline Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "leaky_relu", "partial_conv2d: activation must be none, relu or leaky_relu, got ", name);
  return Activation::leaky_relu;
}

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

// A source of at most 4 channels as 2 x 2 blocks of its pixels: a quarter of the pixels, with the block's 4 C values as
// channels, each pixel filled up with zeros to 2 or 4. What is a convolution of too few channels for a GPU's matrix
// units becomes an unpadded one of stride 1 and (k + 1) / 2 taps a side. Either the convolution itself has stride 2, or
// it has stride 1 and gives the four phases of Fold, beside an upsampled source.
struct PixelBlocks {
  int64_t channels, kernel[2], taps[2], offset[2], side[2];  // side of the map of blocks
  bool phases;
  int64_t width() const { return channels > 2 ? 16 : 8; }
  // What a tap u of the kernel is further on than the block's row 2 U + r: u = 2 U + r - delay, for phase a.
  FUSED_INPAINT_INLINE int64_t delay(int64_t a) const {
    if (!phases) return 0;
    const int64_t pad = kernel[0] / 2;
    return offset[0] - pad - a * (2 * (pad % 2) - 1);
  }
};

// An element of a mask as bits.
struct MaskType {
  int bytes;
  uint64_t one;
};

inline MaskType mask_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return {1, 1};
    case ScalarType::Half:
      return {2, 0x3c00};
    case ScalarType::BFloat16:
      return {2, 0x3f80};
    case ScalarType::Float:
      return {4, 0x3f800000};
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Double, op, ": masks must be uint8, bool or float, got ",
                      torch::headeronly::toString(dtype));
      return {8, 0x3ff0000000000000};
  }
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

// The passes of each device, which the host functions of partial_conv_host.h put between the vendor's convolutions.
namespace FUSED_INPAINT_DEVICE {

// partial_epilogue. `phases` is the low-resolution convolution of Fold or null; `scale` and `bias` have c values, or
// are null for 1 and 0. y: in, the sum of the full-resolution convolutions (or anything when !y_holds_sum); out, the
// layer's output.
void epilogue(Tensor& y, bool y_holds_sum, const Tensor* phases, int64_t shift, const Output& out, const Tensor* scale,
              const Tensor* bias);
void epilogue_backward(const Tensor& grad, const Tensor& y, const Output& out, const Tensor* scale, Tensor& grad_conv,
                       Tensor* grad_phases, int64_t shift, Tensor* grad_bias);
void batch_statistics(Tensor& conv, bool conv_holds_sum, const Tensor* phases, int64_t shift, const Output& out,
                      Tensor& mean, Tensor& var);
void batch_norm(const Tensor& conv, const Output& out, const Tensor& mean, const Tensor& var, const Tensor& weight,
                const Tensor& bias, double eps, Tensor& y);
void batch_norm_backward(const Tensor& grad, const Tensor& conv, const Output& out, const Tensor& mean,
                         const Tensor& var, const Tensor& weight, const Tensor& bias, double eps, Tensor& grad_conv,
                         Tensor* grad_phases, int64_t shift, Tensor& grad_weight, Tensor& grad_bias);

// partial_norm
std::tuple<Tensor, Tensor> norm_constants(Tensor weight, Tensor bias, Tensor mean, Tensor var, double eps);

// partial_window
struct MaskWindow {
  std::vector<Tensor> planes;  // the masks as bytes
  Tensor counts, valid;        // valid: in the type of the first mask
};
MaskWindow window_of_masks(const char* op, const std::vector<Tensor>& masks, const Ints& channels, const Ints& upsample,
                           const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation);

// partial_operands
Tensor select_valid(const Tensor& x, const Tensor& mask);
void zero_holes(Tensor& x, const Tensor& mask);
Tensor concat_sources(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Ints& upsample);
void split_gradient(const Tensor& grad, const Ints& upsample, std::vector<Tensor>& grad_sources);
Tensor slice_weight(const Tensor& weight, int64_t first, int64_t channels);
void place_gradient(const Tensor& grad_slice, int64_t first, Tensor& grad_weight);
void accumulate(Tensor& sum, const Tensor& term);

// partial_blocks, on a GPU alone. mask: null where the holes hold 0 already. outputs: of each phase, with those that
// are there to fill up.
Tensor block_source(const Tensor& x, const Tensor* mask, const PixelBlocks& blocks);
Tensor block_weight(const Tensor& weight, int64_t first, int64_t outputs, const PixelBlocks& blocks);
Tensor unblock_gradient(const Tensor& grad, const Tensor& x, const PixelBlocks& blocks);
void unblock_weight_gradient(const Tensor& grad, int64_t first, const PixelBlocks& blocks, Tensor& grad_weight);
// (O, C, k, k) -> fold_weight with `outputs` of them in each phase, the last ones zero.
Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels, int64_t outputs);

}  // namespace FUSED_INPAINT_DEVICE

}  // namespace fused_inpaint
