// SPDX-License-Identifier: Apache-2.0
// The gated blend of AOT-GAN's block (Zeng et al. 2021), fused:
//
//   y = x * (1 - g) + f * g,  g = sigmoid(z),  z = 10 * (gate - mean) / (std + 1e-9) - 5
//
//   dx = dy * (1 - g),  df = dy * g
//   dgate = gain * (p - mean of p - slant * (gate - mean))
//
//   gain = 10 / (std + 1e-9)
//
//   p = dy * (f - x) * g * (1 - g)
//
//   slant = sum of p * (gate - mean) / ((n - 1) * std * (std + 1e-9)), 0 where std is 0
//
// mean and the unbiased std run over the n pixels of one sample's channel; std of a single pixel is 0. Maps are
// (N, C, H, W) with channels last in memory. Statistics are (N, 3, C) in the accumulator's type: the mean, what
// rounding took from it, and std.
#pragma once

#include <tuple>

#include "common/aten.h"
#include "common/exp.h"

namespace fused_inpaint {
namespace {

struct Shape {
  int64_t n, c, pixels;  // of a sample
  explicit Shape(const Tensor& x) : n(x.size(0)), c(x.size(1)), pixels(x.size(2) * x.size(3)) {}
};

enum Statistic { kMean, kRest, kStd, kStatistics };

// What belongs to a channel, as numbers to be kept while the pixels go by:
//
//   z = (gate - centre) * gain + offset
//   dgate = (p - pull - (gate - centre) * slant) * gain
//
// Centre is the rounded mean; the rest of it is inside offset and pull. So gate - centre is exact where the mean is
// large and the deviations are small, and z keeps its digits.
enum Column { kCentre, kGain, kOffset, kPull, kSlant };
constexpr int kForward = kOffset + 1, kGradient = kSlant - kPull + 1;  // columns of z, and those that dgate adds

template <typename A>
FUSED_INPAINT_INLINE A gain_of(A std) {
  return A(10) / (std + A(1e-9));
}
template <typename A>
FUSED_INPAINT_INLINE A offset_of(A rest, A gain) {
  return A(-5) - rest * gain;
}

// pull and slant, from the sums of p and of p * (gate - centre) over a channel's pixels
struct GradientColumns {
  double pull, slant;

  FUSED_INPAINT_INLINE GradientColumns(double sum, double dot, double rest, double std, int64_t pixels) {
    const double n = static_cast<double>(pixels);
    slant = std > 0 ? (dot - rest * sum) / ((n - 1) * std * (std + 1e-9)) : 0;
    pull = sum / n - rest * slant;
  }
};

// g and 1 - g
template <typename A>
struct Gate {
  A open, shut;

  FUSED_INPAINT_INLINE explicit Gate(A z) {
    // Beyond, what is added is below anything that rounding leaves.
    z = z < A(-80) ? A(-80) : z;
    z = z > A(80) ? A(80) : z;
    const A e = exponential(-z);
    open = A(1) / (A(1) + e);
    shut = e * open;
  }
};

// Memory safety only: what a user can get wrong is said in Python, in better words.
inline void check_map(const char* name, const Tensor& t, const Tensor& x) {
  bool fits = t.dim() == 4 && x.dim() == 4 && t.scalar_type() == x.scalar_type() && t.device() == x.device();
  for (int d = 0; fits && d < 4; ++d) fits = t.size(d) == x.size(d);
  STD_TORCH_CHECK(fits, "gated_blend: ", name, " must be (N, C, H, W), of the size, dtype and device of x");
}

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_like_map(const Tensor& x) {
  return empty_channels_last({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x);
}

}  // namespace

namespace FUSED_INPAINT_DEVICE {
namespace {

// The passes of each device, over channels_last maps that are not empty.
void statistics_of(const Tensor& gate, Tensor& statistics);
void blend(const Tensor& x, const Tensor& f, const Tensor& gate, const Tensor& statistics, Tensor& y);
// Null where a gradient is not needed.
void gradients(const Tensor& grad, const Tensor& x, const Tensor& f, const Tensor& gate, const Tensor& statistics,
               Tensor* grad_x, Tensor* grad_f, Tensor* grad_gate);

}  // namespace

// (y, statistics)
inline std::tuple<Tensor, Tensor> gated_blend(Tensor x, Tensor f, Tensor gate) {
  const DeviceGuard guard(x);
  for (const Tensor* t : {&x, &f, &gate}) check_map("each map", *t, x);
  Tensor y = empty_like_map(x), statistics = empty({x.size(0), kStatistics, x.size(1)}, wide_type(x), x);
  if (x.numel() == 0) {
    torch::stable::zero_(statistics);
  } else {
    gate = channels_last(gate);
    statistics_of(gate, statistics);
    blend(channels_last(x), channels_last(f), gate, statistics, y);
  }
  return {y, statistics};
}

// Gradients of x, f and gate; (0,) for one that is not needed.
inline std::tuple<Tensor, Tensor, Tensor> gated_blend_backward(Tensor grad, Tensor x, Tensor f, Tensor gate,
                                                               Tensor statistics_, bool need_x, bool need_f,
                                                               bool need_gate) {
  const DeviceGuard guard(x);
  for (const Tensor* t : {&grad, &x, &f, &gate}) check_map("each map", *t, x);
  const Tensor statistics = torch::stable::contiguous(statistics_);
  STD_TORCH_CHECK(statistics.dim() == 3 && statistics.size(0) == x.size(0) && statistics.size(1) == kStatistics &&
                      statistics.size(2) == x.size(1) && statistics.scalar_type() == wide_type(x) &&
                      statistics.device() == x.device(),
                  "gated_blend: statistics must be (N, 3, C) in the accumulator's type");
  const auto result = [&](bool needed) { return needed ? empty_like_map(x) : empty({0}, x.scalar_type(), x); };
  Tensor grad_x = result(need_x), grad_f = result(need_f), grad_gate = result(need_gate);
  if (x.numel() != 0)
    gradients(channels_last(grad), channels_last(x), channels_last(f), channels_last(gate), statistics,
              need_x ? &grad_x : nullptr, need_f ? &grad_f : nullptr, need_gate ? &grad_gate : nullptr);
  return {grad_x, grad_f, grad_gate};
}

}  // namespace FUSED_INPAINT_DEVICE

}  // namespace fused_inpaint
