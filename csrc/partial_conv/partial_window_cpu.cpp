// SPDX-License-Identifier: Apache-2.0
// Masks: checked and packed into planes of bytes, and summed over the kernel's windows.
#define FUSED_INPAINT_DEVICE cpu
#include <algorithm>

#include "partial_conv/partial_window_host.h"

namespace fused_inpaint::cpu {
namespace {

// The first value that is neither 0 nor 1, or nothing.
template <typename T>
std::optional<double> pack(const T* mask, uint8_t* plane, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto v = load(mask[i]);
    plane[i] = v != 0;
    if (v != 0 && v != 1) return static_cast<double>(v);
  }
  return std::nullopt;
}

std::optional<double> pack(const uint8_t* mask, uint8_t* plane, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    plane[i] = mask[i];
    if (mask[i] > 1) return mask[i];
  }
  return std::nullopt;
}

// sum[x] += weight * (number of valid channels of the mask at row y, column x), the mask being upsampled by `up`.
FUSED_INPAINT_CLONES void add_row(const uint8_t* mask, int64_t channels, int64_t h, int64_t w, int64_t y,
                                  int32_t weight, int64_t up, int32_t* __restrict sum) {
  for (int64_t c = 0; c < channels; ++c) {
    const uint8_t* row = mask + (c * h + y / up) * w;
    for (int64_t x = 0; x < w; ++x)
      for (int64_t copy = 0; copy < up; ++copy) sum[x * up + copy] += weight * row[x];
  }
}

// One axis of a box sum: out[i] = sum over taps t of in[i * stride - padding + t * dilation], zero outside.
struct Axis {
  int64_t size, out, taps, stride, padding, dilation;
};

// `sums` is scratch of a.size + 1.
void sum_row(const int32_t* in, int32_t* out, const Axis& a, int32_t* sums) {
  if (a.dilation == 1) {
    sums[0] = 0;
    for (int64_t x = 0; x < a.size; ++x) sums[x + 1] = sums[x] + in[x];
    for (int64_t i = 0; i < a.out; ++i) {
      const int64_t first = i * a.stride - a.padding;
      const int64_t low = std::clamp<int64_t>(first, 0, a.size), high = std::clamp<int64_t>(first + a.taps, 0, a.size);
      out[i] = sums[high] - sums[low];
    }
    return;
  }
  for (int64_t i = 0; i < a.out; ++i) {
    int32_t sum = 0;
    for (int64_t t = 0; t < a.taps; ++t) {
      const int64_t x = i * a.stride - a.padding + t * a.dilation;
      if (x >= 0 && x < a.size) sum += in[x];
    }
    out[i] = sum;
  }
}

// Output row i of the sum down the columns of `in`, which has a.size rows of `width`.
FUSED_INPAINT_CLONES void sum_down(const int32_t* in, int32_t* __restrict out, uint8_t* __restrict valid, Axis a,
                                   int64_t i, int64_t width) {
  std::fill(out, out + width, 0);
  for (int64_t t = 0; t < a.taps; ++t) {
    const int64_t y = i * a.stride - a.padding + t * a.dilation;
    if (y < 0 || y >= a.size) continue;
    for (int64_t x = 0; x < width; ++x) out[x] += in[y * width + x];
  }
  for (int64_t x = 0; x < width; ++x) valid[x] = out[x] > 0;
}

void sum_window(WindowStep& step) {
  const std::vector<Tensor>& masks = step.masks;
  const int64_t batch = batch_of(masks);
  const int64_t h = masks[0].size(2) * step.upsample[0], w = masks[0].size(3) * step.upsample[0];
  auto axis = [&](int d, int64_t size) {
    return Axis{size, step.counts.size(2 + d), step.kernel[d], step.stride[d], step.padding[d], step.dilation[d]};
  };
  const Axis rows = axis(0, h), cols = axis(1, w);
  int32_t* counts = mutable_data<int32_t>(step.counts);
  uint8_t* valid = mutable_data<uint8_t>(step.valid);
  std::vector<int32_t> narrow(batch * h * cols.out);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, w));
  torch::stable::parallel_for(0, batch * h, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sum(w), scratch(w + 1);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / h, y = row % h;
      std::fill(sum.begin(), sum.end(), 0);
      for (size_t i = 0; i < masks.size(); ++i) {
        const int64_t planes = masks[i].size(1), mh = masks[i].size(2), mw = masks[i].size(3);
        const uint8_t* mask = data<uint8_t>(masks[i]) + (masks[i].size(0) == 1 ? 0 : n * planes * mh * mw);
        add_row(mask, planes, mh, mw, y, static_cast<int32_t>(step.channels[i] / planes), step.upsample[i], sum.data());
      }
      sum_row(sum.data(), narrow.data() + row * cols.out, cols, scratch.data());
    }
  });
  torch::stable::parallel_for(0, batch * rows.out, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / rows.out, i = row % rows.out, at = row * cols.out;
      sum_down(narrow.data() + n * h * cols.out, counts + at, valid + at, rows, i, cols.out);
    }
  });
}

void sum_windows(std::vector<WindowStep>& steps) {
  for (WindowStep& step : steps) sum_window(step);
}

}  // namespace

Tensor mask_plane(Tensor mask, std::string name) {
  // float16 to float32 is exact, and saves the kernels a type that the CPU does not compute in.
  const bool half = mask.scalar_type() == ScalarType::Half;
  const Tensor dense = torch::stable::contiguous(half ? torch::stable::to(mask, ScalarType::Float) : mask);
  Tensor plane = empty_of_size(mask, ScalarType::Byte);
  uint8_t* out = mutable_data<uint8_t>(plane);
  std::optional<double> odd;
  switch (dense.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      odd = pack(data<uint8_t>(dense), out, dense.numel());
      break;
    default:
      dispatch_float(name.c_str(), dense.scalar_type(),
                     [&]<typename T>() { odd = pack(data<T>(dense), out, dense.numel()); });
  }
  STD_TORCH_CHECK(!odd, name, " must be 0 or 1 everywhere, got ", *odd);
  return plane;
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("mask_plane", TORCH_BOX(&mask_plane));
  m.impl("partial_window", TORCH_BOX(&partial_window));
  m.impl("partial_window_chain", TORCH_BOX(&partial_window_chain));
}

}  // namespace fused_inpaint::cpu
