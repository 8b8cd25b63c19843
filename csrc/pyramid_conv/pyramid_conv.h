// SPDX-License-Identifier: Apache-2.0
// Parallel dilated 3x3 convolutions of one input, their outputs one after the other in the channels (the blocks of
// AOT-GAN, Zeng et al. 2021, and DeepGIN, Li et al. 2020):
//
//   y[:, b] = act(W_b * x + bias_b)      for branch b: dilation d_b, padding d_b by zeros, reflection or replication
//
// Feature maps are (N, C, H, W) with channels last in memory. The weight is (O, C, 3, 3): O / D rows for each of the D
// branches, one branch after the other.
#pragma once

#include <optional>
#include <string>

#include "common/aten.h"
#include "common/padding.h"
#include "common/simd.h"

namespace fused_inpaint {

struct Pyramid {
  int64_t n, c, h, w;
  int64_t outputs;  // of one branch
  Ints dilations;
  Padding mode;
  bool relu;

  int64_t branches() const { return static_cast<int64_t>(dilations.size()); }
  int64_t all_outputs() const { return outputs * branches(); }
  int64_t pixels() const { return n * h * w; }
  // What the vendor's convolution gets: a padded copy, unless it pads by itself.
  bool copies() const { return mode != Padding::zeros; }
  ConvGeometry convolution(int64_t branch) const {
    const int64_t d = dilations[branch], padding = copies() ? 0 : d;
    return {{1, 1}, {padding, padding}, {d, d}, 1};
  }
};

// Memory safety only: what a user can get wrong is said in Python, in better words.
inline Pyramid describe_pyramid(const Tensor& x, const Tensor& weight, const Ints& dilations,
                                const std::string& padding_mode, const std::string& activation) {
  const int64_t branches = static_cast<int64_t>(dilations.size());
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                  "pyramid_conv2d: x must be (N, C, H, W) of at least one pixel");
  STD_TORCH_CHECK(weight.dim() == 4 && branches > 0 && weight.size(0) > 0 && weight.size(0) % branches == 0 &&
                      weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
                  "pyramid_conv2d: weight must be (O, C, 3, 3) in x's dtype, O divisible by the number of dilations");
  STD_TORCH_CHECK(activation == "none" || activation == "relu", "pyramid_conv2d: activation must be none or relu, got ",
                  activation);
  Pyramid p{x.size(0),
            x.size(1),
            x.size(2),
            x.size(3),
            weight.size(0) / branches,
            dilations,
            parse_padding("pyramid_conv2d", padding_mode),
            activation == "relu"};
  for (const int64_t d : dilations)
    STD_TORCH_CHECK(d > 0 && (p.mode != Padding::reflect || d < std::min(p.h, p.w)),
                    "pyramid_conv2d: dilations must be positive, and smaller than the map to reflect");
  return p;
}

// A branch's rows of a channels_last weight, or of its gradient.
inline Tensor rows_of(const Tensor& weight, const Pyramid& p, int64_t branch) {
  Tensor view = weight;
  return torch::stable::narrow(view, 0, branch * p.outputs, p.outputs);
}

inline void check_outputs(const char* name, const Tensor& t, const Pyramid& p, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == p.n && t.size(1) == p.all_outputs() && t.size(2) == p.h &&
                      t.size(3) == p.w && t.scalar_type() == x.scalar_type() && t.device() == x.device(),
                  "pyramid_conv2d: ", name, " must be of y's size and x's dtype and device");
}

inline void check_bias(const std::optional<Tensor>& bias, const Pyramid& p, const Tensor& x) {
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == p.all_outputs() &&
                            bias->scalar_type() == wide(x.scalar_type()) && bias->device() == x.device()),
                  "pyramid_conv2d: bias must be contiguous (O,) in the accumulator's type");
}

}  // namespace fused_inpaint
