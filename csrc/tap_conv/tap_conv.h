// SPDX-License-Identifier: Apache-2.0
// A convolution of odd kernel k, stride 1 and padding k/2, after an upsampling by 2 if asked for, at the resolution of
// its input:
//
//   y = act(W * pad(up(x)) + b)  =  act(b + sum over taps t of shift_t(pad(up(W_t x))))
//
// Upsampling and padding act on pixels, a tap's matrix W_t on channels, so that they may change places: the products
// are those of a 1x1 convolution of x to k * k * O channels, a quarter of what the upsampled map would take, and no
// upsampled, padded or concatenated map is made. Without an upsampling it saves where O is a few channels, which a
// vendor's convolution pads to the width of a vector.
//
// Maps are (N, C, H, W) with channels last in memory; several stand for their concatenation. The weight is (O, C, k,
// k).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/aten.h"
#include "common/padding.h"

namespace fused_inpaint {

enum class Upsampling { none, nearest, bilinear };  // bilinear: with aligned corners
enum class TapActivation { none, relu, leaky_relu, elu };

struct TapConv {
  int64_t n, channels, h, w, outputs, kernel;
  Upsampling upsampling;
  Padding mode;
  TapActivation activation;
  double slope;

  int64_t factor() const { return upsampling == Upsampling::none ? 1 : 2; }
};

// Memory safety only: what a user can get wrong is said in Python, in better words.
inline TapConv describe_taps(const std::vector<Tensor>& maps, const Tensor& weight, const std::string& upsampling,
                             const std::string& padding_mode, const std::string& activation, double slope) {
  STD_TORCH_CHECK(!maps.empty() && maps[0].dim() == 4, "tap_conv2d: maps must be one or more of (N, C, H, W)");
  TapConv c{maps[0].size(0),     0,
            maps[0].size(2),     maps[0].size(3),
            weight.size(0),      weight.size(-1),
            Upsampling::none,    parse_padding("tap_conv2d", padding_mode),
            TapActivation::none, slope};
  for (const Tensor& x : maps) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == c.n && x.size(1) > 0 && x.size(2) == c.h && x.size(3) == c.w &&
                        c.h > 0 && c.w > 0 && x.scalar_type() == weight.scalar_type(),
                    "tap_conv2d: maps must be of one size of at least one pixel, in weight's dtype");
    c.channels += x.size(1);
  }
  STD_TORCH_CHECK(upsampling == "none" || upsampling == "nearest" || upsampling == "bilinear",
                  "tap_conv2d: upsampling must be none, nearest or bilinear, got ", upsampling);
  c.upsampling = upsampling == "none"      ? Upsampling::none
                 : upsampling == "nearest" ? Upsampling::nearest
                                           : Upsampling::bilinear;
  STD_TORCH_CHECK(activation == "none" || activation == "relu" || activation == "leaky_relu" || activation == "elu",
                  "tap_conv2d: activation must be none, relu, leaky_relu or elu, got ", activation);
  c.activation = activation == "none"   ? TapActivation::none
                 : activation == "relu" ? TapActivation::relu
                 : activation == "elu"  ? TapActivation::elu
                                        : TapActivation::leaky_relu;
  STD_TORCH_CHECK(weight.dim() == 4 && c.outputs > 0 && weight.size(1) == c.channels && weight.size(2) == c.kernel &&
                      c.kernel % 2 == 1,
                  "tap_conv2d: weight must be (O, C, k, k) with odd k, C the channels of all maps");
  STD_TORCH_CHECK(c.mode != Padding::reflect || c.kernel / 2 < c.factor() * std::min(c.h, c.w),
                  "tap_conv2d: the map is too small to reflect");
  return c;
}

}  // namespace fused_inpaint
