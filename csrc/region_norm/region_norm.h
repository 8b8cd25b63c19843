// SPDX-License-Identifier: Apache-2.0
// Region normalization (Yu et al. 2020, eq. 1 to 4), fused:
//
//   y = act(weight_r * x_hat + bias_r),  x_hat = (x - mean_r) * invstd_r       for x in region r
//   y = act(scale(pixel) * x_hat + shift(pixel))                                with maps in place of weight and bias
//
//   dx = invstd_r * w * (g * s - means[0, r] - x_hat * means[1, r])             g: gradient in front of act
//   sums[0, r] = sum of g * s, sums[1, r] = sum of g * s * x_hat                s: scale(pixel) or 1, w: weight_r or 1
//
// Region 1 is where the mask is 1, region 0 where it is 0. A value of one is selected away from what concerns the
// other, never multiplied by zero. Feature maps are (N, C, H, W) with channels last in memory, and so are masks: uint8
// (N or 1, 1 or C, H, W). Statistics are float64, (G, 2, C) with region 0 first, of G = 1 batch or N samples. The
// gradients' activation input is computed anew, by the expression of the forward.
#pragma once

#include <string>

#include "common/aten.h"
#include "common/simd.h"
#include "partial_conv/partial_pixel.h"

namespace fused_inpaint {
namespace {

struct Regions {
  int64_t n, c, h, w, groups;
  const uint8_t* mask;  // (mask_n, h, w, mask_c)
  int64_t mask_n, mask_c;

  FUSED_INPAINT_INLINE int64_t plane() const { return h * w; }
  FUSED_INPAINT_INLINE int64_t pixels() const { return n * h * w; }
  FUSED_INPAINT_INLINE bool mask_is_shared() const { return mask_n < n; }
  FUSED_INPAINT_INLINE const uint8_t* mask_of(int64_t pixel) const {
    return mask + (mask_is_shared() ? pixel % plane() : pixel) * mask_c;
  }
};

// What is applied to x_hat. Tensors may be null: weight and bias (2, C), or scale and shift (N, 1, H, W).
struct Point {
  const Tensor *weight, *bias, *scale, *shift;
  bool shared_bias;
  Activation activation;
  double slope;
};

// All that belongs to a group, region and channel, as numbers to be kept while the pixels go by:
//
//   u = (x - centre) * gain + offset                                   x_hat with maps, else the activation's input
//   dx = (g * s - pull - (x - centre) * slant) * gain
//
// The mean is the sum of two floats, centre and `rest`; the second is inside offset and pull. So x - centre is exact
// where the mean is large and the deviations are small, and u keeps its digits.
enum Column { kCentre, kGain, kOffset, kPull, kSlant };
constexpr int kForward = kOffset + 1, kBackward = kSlant + 1;  // columns that either direction needs

template <typename A>
struct Statistics {
  const double *mean, *invstd;  // (G, 2, C)
  const double* means;          // (G, 2, 2, C) or null
  const A *weight, *bias;       // (2, C) or null
  bool shared_bias;
  int64_t groups, c;

  int64_t columns() const { return means ? kBackward : kForward; }
  int64_t numel() const { return groups * 2 * c; }

  FUSED_INPAINT_INLINE static double rest(double mean) { return mean - static_cast<double>(static_cast<A>(mean)); }

  // Writes those of the i-th (group, region, channel) to table (G, columns, 2, C).
  FUSED_INPAINT_INLINE void tabulate(int64_t i, A* table) const {
    const int64_t both = 2 * c, group = i / both, at = i % both, channel = at % c;
    double offset = 0;
    if (bias) offset = shared_bias ? double(bias[channel]) + double(bias[c + channel]) : double(bias[at]);
    const double gain = weight ? invstd[i] * double(weight[at]) : invstd[i];
    A* to = table + group * (means ? kBackward : kForward) * both + at;
    to[kCentre * both] = static_cast<A>(mean[i]);
    to[kGain * both] = static_cast<A>(gain);
    to[kOffset * both] = static_cast<A>(offset - rest(mean[i]) * gain);
    if (!means) return;
    const double* of_group = means + group * 2 * both + at;
    const double slant = invstd[i] * of_group[both];
    to[kPull * both] = static_cast<A>(of_group[0] - rest(mean[i]) * slant);
    to[kSlant * both] = static_cast<A>(slant);
  }

  // sum of g * s * x_hat, from the sums of g * s and of g * s * (x - centre)
  FUSED_INPAINT_INLINE double dot(int64_t i, double sum, double dot) const {
    return invstd[i] * (dot - rest(mean[i]) * sum);
  }
};

// Parameters come in the type that arithmetic runs in; a narrower tensor would be read past its end.
template <typename A>
Statistics<A> statistics(const Tensor& mean, const Tensor& invstd, const Tensor* means, const Point& point) {
  const auto parameter = [](const Tensor* t) -> const A* {
    const ScalarType expected = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(!t || t->scalar_type() == expected, "region_norm: weight and bias must be ",
                    torch::headeronly::toString(expected));
    return t ? static_cast<const A*>(t->const_data_ptr()) : nullptr;
  };
  return {static_cast<const double*>(mean.const_data_ptr()),
          static_cast<const double*>(invstd.const_data_ptr()),
          means ? static_cast<const double*>(means->const_data_ptr()) : nullptr,
          parameter(point.weight),
          parameter(point.bias),
          point.shared_bias,
          mean.size(0),
          mean.size(2)};
}

// NaN is more than any number, as in torch.
template <typename A>
FUSED_INPAINT_INLINE A larger(A most, A v) {
  const bool more = v > most, nan = v != v;
  return more | nan ? v : most;
}

}  // namespace

// The passes of each device, called by the host functions of region_norm_host.h with what these have checked.
namespace FUSED_INPAINT_DEVICE {
namespace {

void moments(const Tensor& x, const Regions& regions, Tensor& count, Tensor& mean, Tensor& m2);
void normalize(const Tensor& x, const Regions& regions, const Tensor& mean, const Tensor& invstd, const Point& point,
               Tensor& y);
// grad_scale and grad_shift: (N, 1, H, W) if the point has maps
void gradient_sums(const Tensor& grad, const Tensor& x, const Regions& regions, const Tensor& mean,
                   const Tensor& invstd, const Point& point, Tensor& sums, Tensor& grad_scale, Tensor& grad_shift);
void gradient(const Tensor& grad, const Tensor& x, const Regions& regions, const Tensor& mean, const Tensor& invstd,
              const Tensor& means, const Point& point, Tensor& grad_x);
// pooled: (N, 2, H, W), contiguous, the mean first
void pool(const Tensor& x, Tensor& pooled);
void pool_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, Tensor& grad_x);

}  // namespace
}  // namespace FUSED_INPAINT_DEVICE

}  // namespace fused_inpaint
