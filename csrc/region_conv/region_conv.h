// SPDX-License-Identifier: Apache-2.0
// Region-wise convolution (Ma et al. 2022), a filter for each region of a mask:
//
//   output:  y = act(W_r . x + b_r)                                  for an output location in region r      (eq. 1)
//   input:   y = act(W . concat(E where m = 1, X where m = 0) + b)   a filter for each input region (published code)
//
// "input" may upsample by nearest x2 before padding. Feature maps are (N, C, H, W) with channels last in memory; masks
// are contiguous uint8 (N or 1, 1, H, W), 1 = valid and 0 = hole, of the output's size ("output") or the input's
// ("input"). A value under the wrong region is never read.
#pragma once

#include <optional>
#include <string>

#include "common/aten.h"
#include "common/fold.h"
#include "common/padding.h"
#include "common/simd.h"

namespace fused_inpaint {

// The convolution along one axis. Folded: 3 taps, padding 1 after a nearest x2, run at the low resolution
// (common/fold.h) by 2 taps over size + 1 positions; the output's coordinate 2i + a is phase a of position i + a.
struct Side {
  int64_t size, kernel, stride, padding, dilation, upsample, out;
  Padding mode;
  bool folded;

  FUSED_INPAINT_INLINE int64_t taps() const { return folded ? 2 : kernel; }
  FUSED_INPAINT_INLINE int64_t phases() const { return folded ? 2 : 1; }
  FUSED_INPAINT_INLINE int64_t positions() const { return folded ? size + 1 : out; }
  // The input's coordinate under tap `tap` of position `position`; -1 in zero padding. Either padding after the
  // upsample replicates before it.
  FUSED_INPAINT_INLINE int64_t source(int64_t position, int64_t tap) const {
    if (folded) return padded(position - 1 + tap, size, mode == Padding::zeros ? Padding::zeros : Padding::replicate);
    const int64_t i = padded(position * stride - padding + tap * dilation, size * upsample, mode);
    return i < 0 ? i : i / upsample;
  }
  // The output's coordinate that phase `phase` of `position` holds; outside [0, out) it holds none.
  FUSED_INPAINT_INLINE int64_t target(int64_t position, int64_t phase) const {
    return folded ? 2 * position - phase : position;
  }
};

struct Geometry {
  Side side[2];  // rows, columns
  Ints stride, padding, dilation;
  bool elu;

  bool folded() const { return side[0].folded; }
  int64_t phases() const { return side[0].phases() * side[1].phases(); }
};

// Memory safety only, here and below: what a user can get wrong is said in Python, in better words.
inline Geometry describe(const Tensor& x, const Tensor& weight, int64_t upsample, const Ints& stride,
                         const Ints& padding, const Ints& dilation, const std::string& padding_mode,
                         const std::string& activation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "region_conv2d: stride, padding and dilation must have two values");
  STD_TORCH_CHECK(activation == "none" || activation == "elu", "region_conv2d: activation must be none or elu, got ",
                  activation);
  STD_TORCH_CHECK(upsample == 1 || upsample == 2, "region_conv2d: upsample must be 1 or 2, got ", upsample);
  const Padding mode = parse_padding("region_conv2d", padding_mode);
  Geometry g{{}, stride, padding, dilation, activation == "elu"};
  bool folded = upsample == 2;
  for (int d = 0; d < 2; ++d) {
    const int64_t kernel = weight.size(weight.dim() - 2 + d), size = x.size(2 + d), up = size * upsample;
    STD_TORCH_CHECK(kernel > 0 && stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0 && size >= 0,
                    "region_conv2d: kernel, stride and dilation must be positive, padding not negative");
    STD_TORCH_CHECK(mode == Padding::zeros || size > 0, "region_conv2d: x has no pixel to pad with");
    STD_TORCH_CHECK(mode != Padding::reflect || padding[d] < up, "region_conv2d: padding must be smaller than the map");
    const int64_t out = (up + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) / stride[d] + 1;
    STD_TORCH_CHECK(up + 2 * padding[d] > dilation[d] * (kernel - 1), "region_conv2d: x is smaller than the kernel");
    folded = folded && kernel == 3 && padding[d] == 1 && dilation[d] == 1 && stride[d] == 1;
    g.side[d] = {size, kernel, stride[d], padding[d], dilation[d], upsample, out, mode, false};
  }
  for (Side& side : g.side) side.folded = folded;
  return g;
}

inline void check_map(const char* name, const Tensor& map, const std::vector<int64_t>& size, ScalarType dtype) {
  bool fits = map.dim() == 4 && map.scalar_type() == dtype;
  for (int d = 0; fits && d < 4; ++d) fits = map.size(d) == size[d];
  STD_TORCH_CHECK(fits, "region_conv2d: ", name, " must be of the size and dtype that the other arguments give it");
}

inline void check_mask(const Tensor& mask, int64_t n, int64_t h, int64_t w) {
  STD_TORCH_CHECK(mask.dim() == 4 && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      (mask.size(0) == 1 || mask.size(0) == n) && mask.size(1) == 1 && mask.size(2) == h &&
                      mask.size(3) == w,
                  "region_conv2d: mask must be contiguous uint8 (", n, " or 1, 1, ", h, ", ", w, ")");
}

// Parameters come in the maps' dtype or wider.
inline void check_bias(const std::optional<Tensor>& bias, int64_t values) {
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == values),
                  "region_conv2d: bias must be contiguous with ", values, " values");
}

inline Geometry describe_output(const Tensor& x, const Tensor& mask, const Tensor& weight, const Ints& stride,
                                const Ints& padding, const Ints& dilation, const std::string& padding_mode,
                                const std::string& activation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 5 && weight.size(0) == 2 && weight.size(2) == x.size(1) &&
                      x.size(1) > 0 && weight.scalar_type() == x.scalar_type(),
                  "region_conv2d: x must be (N, C, H, W), and weight (2, O, C, kh, kw) of its dtype");
  const Geometry g = describe(x, weight, 1, stride, padding, dilation, padding_mode, activation);
  check_mask(mask, x.size(0), g.side[0].out, g.side[1].out);
  return g;
}

inline Geometry describe_input(const Tensor& existing, const Tensor& missing, const Tensor& mask, const Tensor& weight,
                               int64_t upsample, const Ints& stride, const Ints& padding, const Ints& dilation,
                               const std::string& padding_mode, const std::string& activation) {
  STD_TORCH_CHECK(existing.dim() == 4 && missing.dim() == 4 && weight.dim() == 4 && existing.size(1) > 0 &&
                      missing.size(1) > 0 && weight.size(1) == existing.size(1) + missing.size(1) &&
                      weight.scalar_type() == existing.scalar_type(),
                  "region_conv2d: weight must be (O, Ce + Cx, kh, kw) of the maps' dtype");
  check_map("missing", missing, {existing.size(0), missing.size(1), existing.size(2), existing.size(3)},
            existing.scalar_type());
  STD_TORCH_CHECK(upsample == 1 || (stride.size() == 2 && stride[0] == 1 && stride[1] == 1),
                  "region_conv2d: stride must be 1 after an upsample");
  const Geometry g = describe(existing, weight, upsample, stride, padding, dilation, padding_mode, activation);
  check_mask(mask, existing.size(0), existing.size(2), existing.size(3));
  return g;
}

// (N, O, H', W')
inline std::vector<int64_t> output_sizes(const Tensor& x, int64_t outputs, const Geometry& g) {
  return {x.size(0), outputs, g.side[0].out, g.side[1].out};
}

}  // namespace fused_inpaint
