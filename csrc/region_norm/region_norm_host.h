// SPDX-License-Identifier: Apache-2.0
// The operators of region normalization on either device. Included once for each, after FUSED_INPAINT_DEVICE names the
// namespace of its passes.
#pragma once

#include <initializer_list>
#include <optional>

#include "common/dispatch.h"
#include "region_norm/region_norm.h"

namespace fused_inpaint::FUSED_INPAINT_DEVICE {
namespace {

using Maybe = std::optional<Tensor>;

bool has_size(const Tensor& t, std::initializer_list<int64_t> size) {
  if (t.dim() != static_cast<int64_t>(size.size())) return false;
  int64_t d = 0;
  for (int64_t s : size)
    if (t.size(d++) != s) return false;
  return true;
}

Tensor lying_channels_last(const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }
Maybe lying_contiguous(const Maybe& t) { return t ? Maybe(torch::stable::contiguous(*t)) : std::nullopt; }

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(has_size(t, {x.size(0), x.size(1), x.size(2), x.size(3)}) && t.scalar_type() == x.scalar_type(), op,
                  ": ", name, " must have the size and dtype of x");
}

// Memory safety only: what a user can get wrong is said in Python, in better words. The mask must outlive the result.
Regions describe(const Tensor& x, const Tensor& mask, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4, "region_norm: x must be (N, C, H, W)");
  STD_TORCH_CHECK(mask.dim() == 4 && mask.scalar_type() == ScalarType::Byte && mask.size(2) == x.size(2) &&
                      mask.size(3) == x.size(3) && (mask.size(0) == 1 || mask.size(0) == x.size(0)) &&
                      (mask.size(1) == 1 || mask.size(1) == x.size(1)),
                  "region_norm: mask must be uint8 (N or 1, 1 or C, H, W)");
  return {x.size(0),    x.size(1),   x.size(2), x.size(3), groups, static_cast<const uint8_t*>(mask.const_data_ptr()),
          mask.size(0), mask.size(1)};
}

// Tensors in the layout that the passes read, owned as long as these need them.
struct Arguments {
  Tensor x, mask, mean, invstd;
  Maybe weight, bias, scale, shift;
  Regions regions;
  Point point;

  Arguments(const Tensor& x_, const Tensor& mask_, const Tensor& mean_, const Tensor& invstd_, const Maybe& weight_,
            const Maybe& bias_, const Maybe& scale_, const Maybe& shift_, bool shared_bias,
            const std::string& activation, double slope)
      : x(lying_channels_last(x_)),
        mask(lying_channels_last(mask_)),
        mean(torch::stable::contiguous(mean_)),
        invstd(torch::stable::contiguous(invstd_)),
        weight(lying_contiguous(weight_)),
        bias(lying_contiguous(bias_)),
        scale(lying_contiguous(scale_)),
        shift(lying_contiguous(shift_)),
        regions(describe(x, mask, mean.dim() == 3 ? mean.size(0) : 0)),
        point{pointer(weight),
              pointer(bias),
              pointer(scale),
              pointer(shift),
              shared_bias,
              parse_activation(activation),
              slope} {
    const int64_t n = x.size(0), c = x.size(1), groups = regions.groups;
    for (const Tensor* t : {&mean, &invstd})
      STD_TORCH_CHECK(
          has_size(*t, {groups, 2, c}) && t->scalar_type() == ScalarType::Double && (groups == 1 || groups == n),
          "region_norm: mean and invstd must be float64 (1 or N, 2, C)");
    for (const Tensor* t : {point.weight, point.bias})
      STD_TORCH_CHECK(!t || (has_size(*t, {2, c}) && t->scalar_type() == wide_type(x)),
                      "region_norm: weight and bias must be (2, C) in the accumulator's type");
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "region_norm: scale and shift must be given together");
    for (const Tensor* t : {point.scale, point.shift})
      STD_TORCH_CHECK(!t || (has_size(*t, {n, 1, x.size(2), x.size(3)}) && t->scalar_type() == wide_type(x)),
                      "region_norm: scale and shift must be (N, 1, H, W) in the accumulator's type");
  }
  Arguments(const Arguments&) = delete;

 private:
  static const Tensor* pointer(const Maybe& t) { return t ? &*t : nullptr; }
};

// For a pass to fill, or 0 where x is empty and none runs.
Tensor result(const std::vector<int64_t>& size, ScalarType dtype, const Tensor& x) {
  Tensor t = empty(size, dtype, x);
  if (x.numel() == 0) torch::stable::zero_(t);
  return t;
}

Tensor empty_like_map(const Tensor& x) {
  return empty_channels_last({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x);
}

void check_pool(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0, "channel_pool: x must be (N, C, H, W) with at least one channel");
}

}  // namespace

// (count (G, 2, P), mean (G, 2, C), m2 (G, 2, C)), all 0 for an empty region
std::tuple<Tensor, Tensor, Tensor> region_moments(Tensor x_, Tensor mask_, bool instance) {
  const DeviceGuard guard(x_);
  const Tensor x = lying_channels_last(x_), mask = lying_channels_last(mask_);
  const Regions regions = describe(x, mask, instance ? x.size(0) : 1);
  Tensor count = result({regions.groups, 2, regions.mask_c}, ScalarType::Double, x);
  Tensor mean = result({regions.groups, 2, regions.c}, ScalarType::Double, x);
  Tensor m2 = result({regions.groups, 2, regions.c}, ScalarType::Double, x);
  if (x.numel() != 0) moments(x, regions, count, mean, m2);
  return {count, mean, m2};
}

Tensor region_norm(Tensor x, Tensor mask, Tensor mean, Tensor invstd, Tensor /* count */, Maybe weight, Maybe bias,
                   Maybe scale, Maybe shift, bool shared_bias, std::string activation, double slope, double /* eps */,
                   bool /* instance */, std::string /* group */) {
  const DeviceGuard guard(x);
  const Arguments a(x, mask, mean, invstd, weight, bias, scale, shift, shared_bias, activation, slope);
  Tensor y = empty_like_map(x);
  if (x.numel() != 0) normalize(a.x, a.regions, a.mean, a.invstd, a.point, y);
  return y;
}

// (sums (G, 2, 2, C), grad_scale, grad_shift), the last two (N, 1, H, W), or (0,) without maps
std::tuple<Tensor, Tensor, Tensor> region_norm_sums(Tensor grad, Tensor x, Tensor mask, Tensor mean, Tensor invstd,
                                                    Maybe weight, Maybe bias, Maybe scale, Maybe shift,
                                                    bool shared_bias, std::string activation, double slope) {
  const DeviceGuard guard(x);
  const Arguments a(x, mask, mean, invstd, weight, bias, scale, shift, shared_bias, activation, slope);
  check_like("region_norm", "grad", grad, x);
  Tensor sums = result({a.regions.groups, 2, 2, a.regions.c}, ScalarType::Double, x);
  std::vector<int64_t> size{0};
  if (scale) size = {x.size(0), 1, x.size(2), x.size(3)};
  Tensor grad_scale = result(size, wide_type(x), x), grad_shift = result(size, wide_type(x), x);
  if (x.numel() != 0)
    gradient_sums(lying_channels_last(grad), a.x, a.regions, a.mean, a.invstd, a.point, sums, grad_scale, grad_shift);
  return {sums, grad_scale, grad_shift};
}

Tensor region_norm_gradient(Tensor grad, Tensor x, Tensor mask, Tensor mean, Tensor invstd, Tensor means_, Maybe weight,
                            Maybe bias, Maybe scale, Maybe shift, bool shared_bias, std::string activation,
                            double slope) {
  const DeviceGuard guard(x);
  const Arguments a(x, mask, mean, invstd, weight, bias, scale, shift, shared_bias, activation, slope);
  check_like("region_norm", "grad", grad, x);
  const Tensor means = torch::stable::contiguous(means_);
  STD_TORCH_CHECK(has_size(means, {a.regions.groups, 2, 2, a.regions.c}) && means.scalar_type() == ScalarType::Double,
                  "region_norm: means must be float64 (1 or N, 2, 2, C)");
  Tensor grad_x = empty_like_map(x);
  if (x.numel() != 0) gradient(lying_channels_last(grad), a.x, a.regions, a.mean, a.invstd, means, a.point, grad_x);
  return grad_x;
}

Tensor channel_pool(Tensor x) {
  const DeviceGuard guard(x);
  check_pool(x);
  Tensor pooled = empty({x.size(0), 2, x.size(2), x.size(3)}, x.scalar_type(), x);
  if (x.numel() != 0) pool(lying_channels_last(x), pooled);
  return pooled;
}

Tensor channel_pool_backward(Tensor grad, Tensor x, Tensor pooled) {
  const DeviceGuard guard(x);
  check_pool(x);
  for (const Tensor* t : {&grad, &pooled})
    STD_TORCH_CHECK(has_size(*t, {x.size(0), 2, x.size(2), x.size(3)}) && t->scalar_type() == x.scalar_type(),
                    "channel_pool: grad and pooled must be (N, 2, H, W) in x's dtype");
  Tensor grad_x = empty_like_map(x);
  if (x.numel() != 0)
    pool_backward(torch::stable::contiguous(grad), lying_channels_last(x), torch::stable::contiguous(pooled), grad_x);
  return grad_x;
}

}  // namespace fused_inpaint::FUSED_INPAINT_DEVICE
