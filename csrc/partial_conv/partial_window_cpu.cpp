// SPDX-License-Identifier: Apache-2.0
// Masks: checked and packed into planes of bytes, and summed over the kernel's windows.
#define FUSED_INPAINT_DEVICE cpu
#include <algorithm>

#include "partial_conv/partial_window_host.h"

namespace fused_inpaint::cpu {
namespace {

// Whether there is a value that is neither 0 nor 1, which a loop that stopped at it would not be vectorised for.
template <typename T>
FUSED_INPAINT_CLONES bool pack_all(const T* mask, uint8_t* __restrict plane, int64_t n) {
  uint8_t odd = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto v = load(mask[i]);
    plane[i] = v != 0;
    odd |= (v != 0) & (v != 1);
  }
  return odd != 0;
}

// The first such value, or nothing.
template <typename T>
std::optional<double> pack(const T* mask, uint8_t* plane, int64_t n) {
  if (!pack_all(mask, plane, n)) return std::nullopt;
  for (int64_t i = 0;; ++i)
    if (const auto v = load(mask[i]); v != 0 && v != 1) return static_cast<double>(v);
}

// sum[x] += weight * (number of valid channels in column x), for one row of w columns in planes of `plane` pixels.
FUSED_INPAINT_CLONES void add_row(const uint8_t* row, int64_t channels, int64_t plane, int64_t w, int32_t weight,
                                  int32_t* __restrict sum) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t x = 0; x < w; ++x) sum[x] += weight * row[c * plane + x];
}

FUSED_INPAINT_CLONES void add_doubled(const int32_t* row, int64_t w, int32_t* __restrict sum) {
  for (int64_t x = 0; x < w; ++x) {
    sum[2 * x] += row[x];
    sum[2 * x + 1] += row[x];
  }
}

// One axis of a box sum: out[i] = sum over taps t of in[i * stride - padding + t * dilation], zero outside.
struct Axis {
  int64_t size, out, taps, stride, padding, dilation;
  int64_t reach() const { return (taps - 1) * dilation; }
};

// `in` begins with the padding. A stride of 1 or 2 is a constant, which makes vectors of the loop; 0: any stride.
template <int64_t constant>
FUSED_INPAINT_CLONES void sum_across(const int32_t* in, int32_t* __restrict out, Axis a) {
  const int64_t stride = constant ? constant : a.stride;
  std::fill(out, out + a.out, 0);
  for (int64_t t = 0; t < a.taps; ++t)
    for (int64_t i = 0; i < a.out; ++i) out[i] += in[i * stride + t * a.dilation];
}

// Output row i of the sum down the columns of `in`, which holds the rows from `first` on, of `width`. U: bits of a
// mask's element, `one` those of a 1.
template <typename U>
FUSED_INPAINT_CLONES void sum_down(const int32_t* in, int64_t first, int32_t* __restrict out, U* __restrict valid,
                                   U one, Axis a, int64_t i, int64_t width) {
  std::fill(out, out + width, 0);
  for (int64_t t = 0; t < a.taps; ++t) {
    const int64_t y = i * a.stride - a.padding + t * a.dilation;
    if (y < 0 || y >= a.size) continue;
    for (int64_t x = 0; x < width; ++x) out[x] += in[(y - first) * width + x];
  }
  for (int64_t x = 0; x < width; ++x) valid[x] = out[x] > 0 ? one : U{0};
}

// Rows of a step's masks: their valid values, added up over sources and channels, then across each window.
class RowSums {
 public:
  RowSums(const WindowStep& step, const Axis& across)
      : step_(step), across_(across), row_(across.size + 2 * across.padding), low_(across.size) {}

  void operator()(int64_t n, int64_t y, int32_t* out) {
    int32_t* const sum = row_.data() + across_.padding;
    std::fill(sum, sum + across_.size, 0);
    for (size_t i = 0; i < step_.masks.size(); ++i) {
      const Tensor& mask = step_.masks[i];
      const int64_t planes = mask.size(1), h = mask.size(2), w = mask.size(3), up = step_.upsample[i];
      const uint8_t* row = data<uint8_t>(mask) + (mask.size(0) == 1 ? 0 : n * planes * h * w) + y / up * w;
      const auto weight = static_cast<int32_t>(step_.channels[i] / planes);
      if (up == 1) {
        add_row(row, planes, h * w, w, weight, sum);
        continue;
      }
      std::fill(low_.begin(), low_.end(), 0);
      add_row(row, planes, h * w, w, weight, low_.data());
      add_doubled(low_.data(), w, sum);
    }
    (across_.stride == 1   ? sum_across<1>
     : across_.stride == 2 ? sum_across<2>
                           : sum_across<0>)(row_.data(), out, across_);
  }

 private:
  const WindowStep& step_;
  const Axis across_;
  std::vector<int32_t> row_, low_;
};

// Bands of output rows, each of which sums the rows of the masks that it needs, so that they stay in the caches.
template <typename U>
void sum_window(WindowStep& step, U one) {
  const std::vector<Tensor>& masks = step.masks;
  auto axis = [&](int d) {
    return Axis{masks[0].size(2 + d) * step.upsample[0],
                step.counts.size(2 + d),
                step.kernel[d],
                step.stride[d],
                step.padding[d],
                step.dilation[d]};
  };
  const Axis down = axis(0), across = axis(1);
  int32_t* const counts = mutable_data<int32_t>(step.counts);
  U* const valid = mutable_data<U>(step.valid);
  const int64_t height = std::max<int64_t>(32, ceil_div(down.reach(), down.stride));
  const int64_t bands = ceil_div(down.out, height);
  const int64_t grain = ceil_div(16384, std::max<int64_t>(1, height * down.stride * across.size));
  torch::stable::parallel_for(0, batch_of(masks) * bands, grain, [&](int64_t begin, int64_t end) {
    RowSums sums(step, across);
    std::vector<int32_t> rows;
    for (int64_t band = begin; band < end; ++band) {
      const int64_t n = band / bands, top = band % bands * height, bottom = std::min(top + height, down.out);
      const int64_t first = std::clamp<int64_t>(top * down.stride - down.padding, 0, down.size);
      const int64_t last =
          std::clamp<int64_t>((bottom - 1) * down.stride - down.padding + down.reach() + 1, first, down.size);
      rows.resize((last - first) * across.out);
      for (int64_t y = first; y < last; ++y) sums(n, y, rows.data() + (y - first) * across.out);
      for (int64_t i = top; i < bottom; ++i) {
        const int64_t at = (n * down.out + i) * across.out;
        sum_down(rows.data(), first, counts + at, valid + at, one, down, i, across.out);
      }
    }
  });
}

void sum_windows(std::vector<WindowStep>& steps) {
  for (WindowStep& step : steps) {
    const auto [bytes, one] = mask_type("partial_window", step.valid.scalar_type());
    switch (bytes) {
      case 1:
        sum_window(step, static_cast<uint8_t>(one));
        break;
      case 2:
        sum_window(step, static_cast<uint16_t>(one));
        break;
      case 4:
        sum_window(step, static_cast<uint32_t>(one));
        break;
      default:
        sum_window(step, one);
    }
  }
}

}  // namespace

Tensor mask_plane(Tensor mask, std::string name) {
  // float16 to float32 is exact, and saves the kernels a type that the CPU does not compute in.
  const bool half = mask.scalar_type() == ScalarType::Half;
  const Tensor given = dense(half ? torch::stable::to(mask, ScalarType::Float) : mask);
  Tensor plane = empty_of_size(mask, ScalarType::Byte);
  uint8_t* out = mutable_data<uint8_t>(plane);
  std::optional<double> odd;
  switch (given.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      odd = pack(data<uint8_t>(given), out, given.numel());
      break;
    default:
      dispatch_float(name.c_str(), given.scalar_type(),
                     [&]<typename T>() { odd = pack(data<T>(given), out, given.numel()); });
  }
  STD_TORCH_CHECK(!odd, name, " must be 0 or 1 everywhere, got ", *odd);
  return plane;
}

MaskWindow window_of_masks(const char* op, const std::vector<Tensor>& masks, const Ints& channels, const Ints& upsample,
                           const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation) {
  std::vector<Tensor> planes;
  for (const Tensor& mask : masks) planes.push_back(mask_plane(mask, std::string(op) + ": mask"));
  std::vector<WindowStep> steps{
      window_step(op, planes, channels, upsample, kernel, stride, padding, dilation, masks[0].scalar_type())};
  sum_windows(steps);
  return {planes, steps[0].counts, steps[0].valid};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("mask_plane", TORCH_BOX(&mask_plane));
  m.impl("partial_window", TORCH_BOX(&partial_window));
  m.impl("partial_window_chain", TORCH_BOX(&partial_window_chain));
}

}  // namespace fused_inpaint::cpu
