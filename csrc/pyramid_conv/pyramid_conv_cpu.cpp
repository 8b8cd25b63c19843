// SPDX-License-Identifier: Apache-2.0
// Parallel dilated convolutions on the CPU, one branch after the other, so that what a branch makes is still in the
// caches where it is read. In float32 and float64 most branches go by Winograd's form, which needs no padded copy; the
// others by the vendor's convolution of one.
#define FUSED_INPAINT_DEVICE cpu
#include "pyramid_conv/pyramid_conv.h"

#include <cstring>
#include <tuple>

#include "common/chunks.h"
#include "common/convolution_cpu.h"
#include "pyramid_conv/pyramid_winograd_cpu.h"

namespace fused_inpaint::cpu {
namespace {

template <typename T>
constexpr bool kWinograd = sizeof(T) >= 4;  // a half type would round the transformed values

// Whether Winograd's form is the quicker one.
bool suits_winograd(const Pyramid& p, const Tiles& tiles) {
  // The transforms cost as c + outputs, what is saved is as their product. Packing the filters costs as much as 128
  // tiles.
  return p.c * p.outputs >= 40 * (p.c + p.outputs) && 8 * (tiles.count() + 128) < 3 * p.pixels();
}

// What a branch's convolution reads, (n, c, h, w) with padding unless the convolution pads by itself.
Tensor operand(const Tensor& x, const Pyramid& p, int64_t branch) {
  if (!p.copies()) return x;
  const int64_t d = p.dilations[branch], height = p.h + 2 * d, width = p.w + 2 * d;
  const int64_t bytes = p.c * static_cast<int64_t>(x.element_size());
  Tensor out = empty_channels_last({p.n, p.c, height, width}, x.scalar_type(), x);
  const char* from = data<char>(x);
  char* const to = mutable_data<char>(out);
  parallel_for(0, p.n * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* line = from + (row / height * p.h + padded(row % height - d, p.h, p.mode)) * p.w * bytes;
      char* at = to + row * width * bytes;
      for (int64_t j = 0; j < d; ++j) std::memcpy(at + j * bytes, line + padded(j - d, p.w, p.mode) * bytes, bytes);
      std::memcpy(at + d * bytes, line, p.w * bytes);
      for (int64_t j = d + p.w; j < width; ++j)
        std::memcpy(at + j * bytes, line + padded(j - d, p.w, p.mode) * bytes, bytes);
    }
  });
  return out;
}

// The convolution's output (pixels, n) to y (pixels, stride).
template <typename T, bool relu>
FUSED_INPAINT_CLONES void finish(const T* sum, const acc_t<T>* __restrict bias, T* __restrict y, int64_t stride,
                                 int64_t n, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t c = 0; c < n; ++c) {
      const acc_t<T> v = load(sum[pixel * n + c]) + bias[c];
      store(y + pixel * stride + c, relu && v < 0 ? acc_t<T>(0) : v);  // a NaN stays one
    }
}

// The gradient in front of the activation for the pixels [begin, end): grad, y (pixels, D * n) to out (D, pixels, n),
// and its sums, (D * n).
template <typename T, bool relu>
FUSED_INPAINT_CLONES void mask_chunk(const T* grad, const T* y, T* out, acc_t<T>* __restrict sums, int64_t branches,
                                     int64_t n, int64_t pixels, int64_t begin, int64_t end) {
  std::fill(sums, sums + branches * n, acc_t<T>(0));
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t b = 0; b < branches; ++b) {
      const T *g = grad + (pixel * branches + b) * n, *o = y + (pixel * branches + b) * n;
      T* __restrict to = out + (b * pixels + pixel) * n;
      acc_t<T>* __restrict sum = sums + b * n;
      for (int64_t c = 0; c < n; ++c) {
        const acc_t<T> v = !relu || !(load(o[c]) <= 0) ? load(g[c]) : acc_t<T>(0);
        sum[c] += v;
        store(to + c, v);
      }
    }
}

// (D n, outputs, h, w): the branches' one after the other. Its sums into grad_bias unless that is null.
Tensor masked_gradients(const Tensor& grad_, const Tensor& y_, const Pyramid& p, Tensor* grad_bias) {
  const Tensor grad = channels_last(grad_), y = p.relu ? channels_last(y_) : grad;
  Tensor out = empty_channels_last({p.branches() * p.n, p.outputs, p.h, p.w}, grad.scalar_type(), grad);
  const int64_t channels = p.all_outputs();
  const Chunks chunks(p.pixels(), 1, channels);
  dispatch_float("pyramid_conv2d", grad.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const T *from = data<T>(grad), *o = data<T>(y);
    T* to = mutable_data<T>(out);
    std::vector<double> partial(chunks.n * channels), total(channels);
    parallel_for(0, chunks.n, chunks.grain, [&](int64_t begin, int64_t end) {
      std::vector<A> sums(channels);
      for (int64_t b = begin; b < end; ++b) {
        (p.relu ? mask_chunk<T, true> : mask_chunk<T, false>)(from, o, to, sums.data(), p.branches(), p.outputs,
                                                              chunks.pixels, chunks.begin(b), chunks.end(b));
        std::copy(sums.begin(), sums.end(), partial.begin() + b * channels);
      }
    });
    if (!grad_bias) return;
    merge_sums(partial.data(), chunks.n, channels, total.data());
    std::copy(total.begin(), total.end(), mutable_data<A>(*grad_bias));
  });
  return out;
}

template <typename T>
FUSED_INPAINT_CLONES void add(acc_t<T>* __restrict sum, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += load(x[i]);
}

// Adds the gradient of an operand to that of x, (n, c, h, w).
template <typename T>
void fold(const Tensor& grad, const Pyramid& p, acc_t<T>* to) {
  constexpr int64_t kChannels = 32;  // that a thread takes, so that each value is summed in one order
  const int64_t height = grad.size(2), width = grad.size(3), blocks = ceil_div(p.c, kChannels);
  const int64_t rows = (height - p.h) / 2, columns = (width - p.w) / 2;  // of padding
  const T* from = data<T>(grad);
  parallel_for(0, p.n * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / blocks, c = item % blocks * kChannels, count = std::min(kChannels, p.c - c);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t pixel = (n * p.h + padded(i - rows, p.h, p.mode)) * p.w + padded(j - columns, p.w, p.mode);
          add(to + pixel * p.c + c, from + ((n * height + i) * width + j) * p.c + c, count);
        }
    }
  });
}

Tensor empty_or_none(const std::vector<int64_t>& size, const Tensor& like, bool wanted) {
  return wanted ? empty_channels_last(size, like.scalar_type(), like) : empty({0}, like.scalar_type(), like);
}

}  // namespace

Tensor pyramid_conv2d(Tensor x_, Tensor weight_, std::optional<Tensor> bias, Ints dilations, std::string padding_mode,
                      std::string activation) {
  const Pyramid p = describe_pyramid(x_, weight_, dilations, padding_mode, activation);
  check_bias(bias, p, x_);
  Tensor y = empty_channels_last({p.n, p.all_outputs(), p.h, p.w}, x_.scalar_type(), x_);
  if (p.n == 0) return y;
  const Tensor x = channels_last(x_), weight = channels_last(weight_);
  Workspace space;
  dispatch_float("pyramid_conv2d", x.scalar_type(), [&]<typename T>() {
    const std::vector<acc_t<T>> none(p.outputs, acc_t<T>(0));
    for (int64_t b = 0; b < p.branches(); ++b) {
      const Tensor filters = rows_of(weight, p, b);
      const acc_t<T>* const offset = bias ? data<acc_t<T>>(*bias) + b * p.outputs : none.data();
      T* const to = mutable_data<T>(y) + b * p.outputs;
      if constexpr (kWinograd<T>)
        if (const Tiles tiles(p, p.dilations[b]); suits_winograd(p, tiles)) {
          winograd(tiles, x, filters, offset, p.relu, to, p.all_outputs(), space);
          continue;
        }
      const Tensor sums = aten_convolution(operand(x, p, b), filters, p.convolution(b));
      const T* from = data<T>(sums);
      parallel_for(0, p.pixels(), ceil_div(kGrain, p.outputs), [&](int64_t begin, int64_t end) {
        (p.relu ? finish<T, true> : finish<T, false>)(from, offset, to, p.all_outputs(), p.outputs, begin, end);
      });
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pyramid_conv2d_backward(Tensor grad, Tensor y, Tensor x_, Tensor weight_,
                                                           Ints dilations, std::string padding_mode,
                                                           std::string activation, bool need_x, bool need_weight,
                                                           bool need_bias) {
  const Pyramid p = describe_pyramid(x_, weight_, dilations, padding_mode, activation);
  check_outputs("grad", grad, p, x_);
  check_outputs("y", y, p, x_);
  const ScalarType dtype = x_.scalar_type();
  Tensor grad_x = empty_or_none(sizes(x_), x_, need_x), grad_weight = empty_or_none(sizes(weight_), x_, need_weight);
  Tensor grad_bias = empty({need_bias ? p.all_outputs() : 0}, wide(dtype), x_);
  if (p.n == 0) {
    for (Tensor* t : {&grad_x, &grad_weight, &grad_bias}) torch::stable::zero_(*t);
    return {grad_x, grad_weight, grad_bias};
  }
  Tensor masked = masked_gradients(grad, y, p, need_bias ? &grad_bias : nullptr);
  if (!need_x && !need_weight) return {grad_x, grad_weight, grad_bias};
  const Tensor x = channels_last(x_), weight = channels_last(weight_);
  Tensor sum = empty_channels_last(need_x ? sizes(x) : std::vector<int64_t>{0, 0, 0, 0}, wide(dtype), x);
  torch::stable::zero_(sum);
  Workspace space;
  dispatch_float("pyramid_conv2d", dtype, [&]<typename T>() {
    for (int64_t b = 0; b < p.branches(); ++b) {
      const Tensor filters = rows_of(weight, p, b), of_branch = torch::stable::narrow(masked, 0, b * p.n, p.n);
      bool direct = need_x;
      if constexpr (kWinograd<T>)
        if (const Tiles tiles(p, p.dilations[b]); need_x && suits_winograd(p, tiles)) {
          winograd_backward(tiles, of_branch, filters, mutable_data<T>(sum), space);
          direct = false;
        }
      if (!direct && !need_weight) continue;
      const auto [to_operand, to_filters] =
          convolution_backward(of_branch, operand(x, p, b), filters, p.convolution(b), direct, need_weight);
      if (direct) fold<T>(*to_operand, p, mutable_data<acc_t<T>>(sum));
      if (need_weight) {
        Tensor rows = rows_of(grad_weight, p, b);
        torch::stable::copy_(rows, *to_filters);
      }
    }
  });
  if (need_x) grad_x = wide(dtype) == dtype ? sum : cast(sum, dtype);
  return {grad_x, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("pyramid_conv2d", TORCH_BOX(&pyramid_conv2d));
  m.impl("pyramid_conv2d_backward", TORCH_BOX(&pyramid_conv2d_backward));
}

}  // namespace fused_inpaint::cpu
