// SPDX-License-Identifier: Apache-2.0
// Thin sources of the vendor's convolution as 2 x 2 blocks of pixels on the GPU (PixelBlocks), and the way back.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::cuda {
namespace {

// In 32 bits: map (n, h, w, c), its blocks (n, side[0], side[1], width). The four pixels of a block are width / 4
// apart.
struct Sizes {
  unsigned n, h, w, c, planes, side[2], width;
  int offset[2];
  bool shared;  // the mask is
  Sizes(const Tensor& x, const Tensor* mask, const PixelBlocks& b)
      : n(index32(x.size(0))),
        h(index32(x.size(2))),
        w(index32(x.size(3))),
        c(index32(x.size(1))),
        planes(mask ? index32(mask->size(1)) : 1),
        side{index32(b.side[0]), index32(b.side[1])},
        width(index32(b.width())),
        offset{static_cast<int>(b.offset[0]), static_cast<int>(b.offset[1])},
        shared(mask && mask->size(0) == 1) {
    index32(x.numel()), index32(x.size(0) * b.side[0] * b.side[1] * b.width());
  }
};

// A thread fills the channels of one block.
template <typename T, int W>
__global__ void block_kernel(const T* x, const uint8_t* mask, Sizes s, T* out) {
  constexpr int wide = 16 / sizeof(T);
  const unsigned blocks = s.n * s.side[0] * s.side[1];
  for (unsigned at = global_thread(); at < blocks; at += all_threads()) {
    const unsigned n = at / s.side[1] / s.side[0];
    const int top = 2 * static_cast<int>(at / s.side[1] % s.side[0]) - s.offset[0];
    const int left = 2 * static_cast<int>(at % s.side[1]) - s.offset[1];
    Pack<T, W> block{};
    for (int r = 0; r < 4; ++r) {
      const int row = top + r / 2, column = left + r % 2;
      if (row < 0 || row >= static_cast<int>(s.h) || column < 0 || column >= static_cast<int>(s.w)) continue;
      const unsigned pixel = row * s.w + column;
      for (unsigned c = 0; c < W / 4; ++c) {
        const unsigned plane = (s.shared ? 0 : n) * s.planes + (s.planes > 1 ? c : 0);
        if (c < s.c && (!mask || mask[plane * s.h * s.w + pixel] != 0))
          block.v[r * (W / 4) + c] = x[(n * s.h * s.w + pixel) * s.c + c];
      }
    }
    for (int i = 0; i < W; i += wide) {
      Pack<T, wide> part;
      for (int j = 0; j < wide; ++j) part.v[j] = block.v[i + j];
      store_pack<wide>(out + at * W + i, part);
    }
  }
}

template <typename T>
__global__ void unblock_kernel(const T* blocks, Sizes s, T* x) {
  const unsigned values = s.n * s.h * s.w * s.c;
  for (unsigned i = global_thread(); i < values; i += all_threads()) {
    const unsigned c = i % s.c, column = i / s.c % s.w + s.offset[1], row = i / s.c / s.w % s.h + s.offset[0];
    const unsigned n = i / s.c / s.w / s.h;
    const bool seen = row / 2 < s.side[0] && column / 2 < s.side[1];  // a last row may lie under no window
    const unsigned block = (n * s.side[0] + row / 2) * s.side[1] + column / 2;
    x[i] = seen ? blocks[block * s.width + (row % 2 * 2 + column % 2) * (s.width / 4) + c] : T{};
  }
}

// Weight (outputs, k, k, total) in memory, of which channels [first, first + channels) are taken; in blocks (phases *
// padded, taps, taps, width).
struct Filters {
  PixelBlocks b;
  unsigned outputs, padded, total, first, width;
  // The tap of the kernel, and its channel, that one value in blocks holds for a phase; false if it holds none.
  __device__ bool tap(unsigned phase, unsigned U, unsigned V, unsigned value, int& u, int& v, unsigned& c) const {
    const unsigned part = value / (width / 4);
    c = value % (width / 4);
    u = static_cast<int>(2 * U + part / 2) - static_cast<int>(b.delay(phase / 2));
    v = static_cast<int>(2 * V + part % 2) - static_cast<int>(b.delay(phase % 2));
    return c < b.channels && u >= 0 && u < b.kernel[0] && v >= 0 && v < b.kernel[1];
  }
};

template <typename T>
__global__ void block_weight_kernel(const T* weight, Filters f, T* out, unsigned n) {
  for (unsigned i = global_thread(); i < n; i += all_threads()) {
    const unsigned value = i % f.width, V = i / f.width % f.b.taps[1], U = i / f.width / f.b.taps[1] % f.b.taps[0];
    const unsigned output = i / f.width / f.b.taps[1] / f.b.taps[0], o = output % f.padded;
    int u, v;
    unsigned c;
    const bool taken = f.tap(output / f.padded, U, V, value, u, v, c) && o < f.outputs;
    out[i] = taken ? weight[((o * f.b.kernel[0] + u) * f.b.kernel[1] + v) * f.total + f.first + c] : T{};
  }
}

// A thread sums what the phases have of one weight.
template <typename T>
__global__ void unblock_weight_kernel(const T* grad, Filters f, T* grad_weight, unsigned n) {
  const unsigned phases = f.b.phases ? 4 : 1;
  for (unsigned i = global_thread(); i < n; i += all_threads()) {
    const unsigned c = i % f.b.channels, row = i / f.b.channels, v = row % f.b.kernel[1];
    const unsigned u = row / f.b.kernel[1] % f.b.kernel[0], o = row / f.b.kernel[1] / f.b.kernel[0];
    acc_t<T> sum = 0;
    for (unsigned phase = 0; phase < phases; ++phase) {
      const unsigned a = u + f.b.delay(phase / 2), b = v + f.b.delay(phase % 2);
      const unsigned at = ((phase * f.padded + o) * f.b.taps[0] + a / 2) * f.b.taps[1] + b / 2;
      sum += load(grad[at * f.width + (a % 2 * 2 + b % 2) * (f.width / 4) + c]);
    }
    store(grad_weight + row * f.total + f.first + c, sum);
  }
}

Filters filters_of(const Tensor& weight, int64_t first, int64_t padded, const PixelBlocks& b) {
  index32(weight.numel());
  return {b, index32(weight.size(0)), index32(padded), index32(weight.size(1)), index32(first), index32(b.width())};
}

// Of a type of two bytes.
template <typename F>
void dispatch_half(ScalarType dtype, F&& body) {
  if (dtype == ScalarType::Half) return body.template operator()<__half>();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "partial_conv2d: blocks must be float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  body.template operator()<bf16>();
}

}  // namespace

Tensor block_source(const Tensor& x, const Tensor* mask, const PixelBlocks& b) {
  const Tensor rows = channels_last(x);
  const Sizes s(x, mask, b);
  Tensor out = empty_channels_last({x.size(0), b.width(), b.side[0], b.side[1]}, x.scalar_type(), x);
  dispatch_half(x.scalar_type(), [&]<typename T>() {
    auto launch = [&]<int W>() {
      FUSED_INPAINT_LAUNCH((block_kernel<T, W>), blocks_for(out.numel() / W), dim3(kThreads), 0, current_stream(x),
                           data<T>(rows), mask ? data<uint8_t>(*mask) : nullptr, s, mutable_data<T>(out));
    };
    if (b.width() == 8)
      launch.template operator()<8>();
    else
      launch.template operator()<16>();
  });
  return out;
}

Tensor unblock_gradient(const Tensor& grad, const Tensor& x, const PixelBlocks& b) {
  Tensor out = empty_channels_last({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x);
  dispatch_half(x.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(unblock_kernel<T>, blocks_for(out.numel()), dim3(kThreads), 0, current_stream(x),
                         data<T>(grad), Sizes(x, nullptr, b), mutable_data<T>(out));
  });
  return out;
}

Tensor block_weight(const Tensor& weight, int64_t first, int64_t outputs, const PixelBlocks& b) {
  const Tensor rows = channels_last(weight);
  Tensor out = empty_channels_last({(b.phases ? 4 : 1) * outputs, b.width(), b.taps[0], b.taps[1]},
                                   weight.scalar_type(), weight);
  dispatch_half(weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(block_weight_kernel<T>, blocks_for(out.numel()), dim3(kThreads), 0, current_stream(weight),
                         data<T>(rows), filters_of(weight, first, outputs, b), mutable_data<T>(out),
                         index32(out.numel()));
  });
  return out;
}

void unblock_weight_gradient(const Tensor& grad, int64_t first, const PixelBlocks& b, Tensor& grad_weight) {
  const int64_t values = grad_weight.size(0) * b.kernel[0] * b.kernel[1] * b.channels;
  dispatch_half(grad_weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(unblock_weight_kernel<T>, blocks_for(values), dim3(kThreads), 0, current_stream(grad_weight),
                         data<T>(grad), filters_of(grad_weight, first, grad.size(0) / (b.phases ? 4 : 1), b),
                         mutable_data<T>(grad_weight), index32(values));
  });
}

}  // namespace fused_inpaint::cuda
