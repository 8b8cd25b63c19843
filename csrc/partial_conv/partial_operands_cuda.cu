// SPDX-License-Identifier: Apache-2.0
// The operands of the vendor's convolution on the GPU: sources with their holes zeroed, weights cut and folded, and the
// way back. One thread makes one pack of channels or one weight.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::cuda {
namespace {

// Feature map (n, h, w, c) with the mask (n or 1, planes, h, w) of its pixels.
struct Masked {
  const uint8_t* mask;
  bool shared;
  unsigned planes, pixels, h, w, c;
  Masked(const Tensor& x, const Tensor& m)
      : mask(data<uint8_t>(m)),
        shared(m.size(0) == 1),
        planes(index32(m.size(1))),
        pixels(index32(x.size(0) * x.size(2) * x.size(3))),
        h(index32(x.size(2))),
        w(index32(x.size(3))),
        c(index32(x.size(1))) {
    index32(x.numel());
  }
  __device__ bool valid(unsigned pixel, unsigned channel) const {
    if (planes == 1 && !shared) return mask[pixel] != 0;
    const unsigned area = h * w, n = shared ? 0 : pixel / area, plane = planes == 1 ? 0 : channel;
    return mask[(n * planes + plane) * area + pixel % area] != 0;
  }
};

template <int V, typename T>
__device__ Pack<T, V> load_valid(const T* x, const Masked& m, unsigned pixel, unsigned c) {
  Pack<T, V> values{};
  if (m.planes > 1 || m.valid(pixel, 0)) values = load_pack<V>(x + pixel * m.c + c);
  if (m.planes > 1)
    for (int k = 0; k < V; ++k)
      if (!m.valid(pixel, c + k)) values.v[k] = T{};
  return values;
}

template <typename T, int V>
__global__ void select_kernel(const T* x, Masked m, T* out) {
  for (unsigned c = threadIdx.x * V; c < m.c; c += blockDim.x * V)
    for (unsigned pixel = first_pixel(); pixel < m.pixels; pixel += all_pixels())
      store_pack<V>(out + pixel * m.c + c, load_valid<V>(x, m, pixel, c));
}

// Channels [at, at + c) of the concatenation, at the output's size; `shift` is 1 where that is twice the source's. Rows
// of all samples lie one after the other, so the source's row is half the output's.
template <typename T, int V>
__global__ void concat_kernel(const T* x, Masked m, unsigned shift, T* out, unsigned at, unsigned channels) {
  const unsigned w = m.w << shift, pixels = m.pixels << 2 * shift;
  for (unsigned c = threadIdx.x * V; c < m.c; c += blockDim.x * V)
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      const unsigned source = (pixel / w >> shift) * m.w + (pixel % w >> shift);
      store_pack<V>(out + pixel * channels + at + c, load_valid<V>(x, m, source, c));
    }
}

// Its gradient: a slice of the channels, summed over each 2 x 2 block where the source was upsampled.
template <typename T, int V>
__global__ void split_kernel(const T* grad, unsigned channels, unsigned at, unsigned shift, T* out, unsigned pixels,
                             unsigned w, unsigned size) {
  for (unsigned c = threadIdx.x * V; c < size; c += blockDim.x * V)
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      const unsigned row = pixel / w << shift, column = pixel % w << shift;
      const T* g = grad + (row * (w << shift) + column) * channels + at + c;
      Pack<T, V> sum = load_pack<V>(g);
      if (shift) {
        const T* below = g + (w << shift) * channels;
        const Pack<T, V> right = load_pack<V>(g + channels), left_below = load_pack<V>(below),
                         right_below = load_pack<V>(below + channels);
        for (int k = 0; k < V; ++k)
          store(&sum.v[k], (load(sum.v[k]) + load(right.v[k])) + (load(left_below.v[k]) + load(right_below.v[k])));
      }
      store_pack<V>(out + pixel * size + c, sum);
    }
}

// First tap u of the kernel with fold.tap(a, u) == s; the next one is the only other.
__device__ int first_tap(const Fold& fold, int a, int s) {
  return static_cast<int>(2 * (s - fold.padding + a * fold.shift) - a + fold.kernel / 2);
}

// `padded` outputs in each phase, of which the weight has the first.
template <typename T, int V>
__global__ void fold_kernel(const T* weight, T* folded, Fold fold, unsigned outputs, unsigned padded, unsigned total,
                            unsigned first, unsigned channels) {
  const unsigned taps = fold.taps, packs = channels / V, n = 4 * padded * taps * taps * packs;
  const int k = fold.kernel;
  for (unsigned i = global_thread(); i < n; i += all_threads()) {
    const unsigned c = i % packs * V, row = i / packs, t = row % taps, s = row / taps % taps;
    const unsigned o = row / (taps * taps) % padded, phase = row / (taps * taps) / padded;
    const int u0 = first_tap(fold, phase / 2, s), v0 = first_tap(fold, phase % 2, t);
    Pack<acc_t<T>, V> sum{};
    if (o < outputs)
      for (int u = u0; u < u0 + 2; ++u)
        for (int v = v0; v < v0 + 2; ++v)
          if (u >= 0 && u < k && v >= 0 && v < k) {
            const Pack<T, V> term = load_pack<V>(weight + ((o * k + u) * k + v) * total + first + c);
            for (int j = 0; j < V; ++j) sum.v[j] += load(term.v[j]);
          }
    Pack<T, V> result;
    for (int j = 0; j < V; ++j) store(&result.v[j], sum.v[j]);
    store_pack<V>(folded + row * channels + c, result);
  }
}

// Channels [first, first + channels) of rows of `total`.
template <typename T, int V>
__global__ void slice_kernel(const T* weight, T* out, unsigned rows, unsigned total, unsigned first,
                             unsigned channels) {
  const unsigned packs = channels / V;
  for (unsigned i = global_thread(); i < rows * packs; i += all_threads()) {
    const unsigned c = i % packs * V, row = i / packs;
    store_pack<V>(out + row * channels + c, load_pack<V>(weight + row * total + first + c));
  }
}

template <typename T>
__global__ void unfold_kernel(const T* grad_folded, T* grad_weight, Fold fold, unsigned outputs, unsigned padded,
                              unsigned total, unsigned first, unsigned channels) {
  const unsigned k = fold.kernel, taps = fold.taps, n = outputs * k * k * channels;
  for (unsigned i = global_thread(); i < n; i += all_threads()) {
    const unsigned c = i % channels, row = i / channels, v = row % k, u = row / k % k, o = row / (k * k);
    acc_t<T> sum = 0;
    for (unsigned phase = 0; phase < 4; ++phase) {
      const unsigned tap = fold.tap(phase / 2, u) * taps + fold.tap(phase % 2, v);
      sum += load(grad_folded[((phase * padded + o) * taps * taps + tap) * channels + c]);
    }
    store(grad_weight + row * total + first + c, sum);
  }
}

template <typename T>
__global__ void place_kernel(const T* grad_slice, T* grad_weight, unsigned rows, unsigned total, unsigned first,
                             unsigned channels) {
  for (unsigned i = global_thread(); i < rows * channels; i += all_threads())
    grad_weight[i / channels * total + first + i % channels] = grad_slice[i];
}

template <typename T, int V>
__global__ void accumulate_kernel(T* sum, const T* term, unsigned n) {
  for (unsigned i = global_thread() * V; i < n; i += all_threads() * V) {
    Pack<T, V> values = load_pack<V>(sum + i);
    const Pack<T, V> more = load_pack<V>(term + i);
    for (int k = 0; k < V; ++k) store(&values.v[k], load(values.v[k]) + load(more.v[k]));
    store_pack<V>(sum + i, values);
  }
}

void select_into(const Tensor& x, const Tensor& mask, Tensor& out) {
  const Masked m(x, mask);
  dispatch_cuda(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(m.c, {&x, &out}, [&]<int V>() {
      const dim3 threads = pixel_threads(m.c / V);
      FUSED_INPAINT_LAUNCH((select_kernel<T, V>), pixel_blocks(m.pixels, threads), threads, 0, current_stream(x),
                           data<T>(x), m, mutable_data<T>(out));
    });
  });
}

}  // namespace

void zero_holes(Tensor& x, const Tensor& mask) { select_into(x, mask, x); }

Tensor select_valid(const Tensor& x, const Tensor& mask) {
  const Tensor rows = channels_last(x);
  Tensor out = empty_channels_last({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x);
  select_into(rows, mask, out);
  return out;
}

Tensor concat_sources(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Ints& upsample) {
  const Tensor& first = sources[0];
  int64_t channels = 0;
  for (const Tensor& s : sources) channels += s.size(1);
  Tensor out = empty_channels_last({first.size(0), channels, first.size(2) * upsample[0], first.size(3) * upsample[0]},
                                   first.scalar_type(), first);
  index32(out.numel());
  const unsigned total = index32(channels);
  unsigned at = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor x = channels_last(sources[i]);
    const Masked m(x, masks[i]);
    const unsigned shift = upsample[i] == 2;
    dispatch_cuda(x.scalar_type(), [&]<typename T>() {
      with_pack<T>(m.c | at | total, {&x, &out}, [&]<int V>() {
        const dim3 threads = pixel_threads(m.c / V);
        FUSED_INPAINT_LAUNCH((concat_kernel<T, V>), pixel_blocks(int64_t{m.pixels} << 2 * shift, threads), threads, 0,
                             current_stream(x), data<T>(x), m, shift, mutable_data<T>(out), at, total);
      });
    });
    at += m.c;
  }
  return out;
}

void split_gradient(const Tensor& grad, const Ints& upsample, std::vector<Tensor>& grad_sources) {
  const unsigned channels = index32(grad.size(1));
  unsigned at = 0;
  for (size_t i = 0; i < grad_sources.size(); ++i) {
    Tensor& out = grad_sources[i];
    const unsigned shift = upsample[i] == 2, size = index32(out.size(1)), pixels = index32(out.numel()) / size;
    dispatch_cuda(grad.scalar_type(), [&]<typename T>() {
      with_pack<T>(size | at | channels, {&grad, &out}, [&]<int V>() {
        const dim3 threads = pixel_threads(size / V);
        FUSED_INPAINT_LAUNCH((split_kernel<T, V>), pixel_blocks(pixels, threads), threads, 0, current_stream(grad),
                             data<T>(grad), channels, at, shift, mutable_data<T>(out), pixels, index32(out.size(3)),
                             size);
      });
    });
    at += size;
  }
}

Tensor slice_weight(const Tensor& weight, int64_t first, int64_t channels) {
  if (channels == weight.size(1)) return channels_last(weight);
  const Tensor whole = channels_last(weight);
  Tensor out =
      empty_channels_last({weight.size(0), channels, weight.size(2), weight.size(3)}, weight.scalar_type(), weight);
  const int64_t total = weight.size(1), rows = weight.size(0) * weight.size(2) * weight.size(3);
  index32(weight.numel());
  dispatch_cuda(weight.scalar_type(), [&]<typename T>() {
    with_pack<T>(channels | first | total, {&whole, &out}, [&]<int V>() {
      FUSED_INPAINT_LAUNCH((slice_kernel<T, V>), blocks_for(rows * channels / V), dim3(kThreads), 0,
                           current_stream(weight), data<T>(whole), mutable_data<T>(out), index32(rows), index32(total),
                           index32(first), index32(channels));
    });
  });
  return out;
}

Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels, int64_t outputs) {
  const Fold fold(weight.size(2));
  const int64_t total = weight.size(1);
  Tensor out = empty_channels_last({4 * outputs, channels, fold.taps, fold.taps}, weight.scalar_type(), weight);
  const Tensor rows = channels_last(weight);
  index32(out.numel()), index32(weight.numel());
  dispatch_cuda(weight.scalar_type(), [&]<typename T>() {
    with_pack<T>(channels | first | total, {&rows, &out}, [&]<int V>() {
      FUSED_INPAINT_LAUNCH((fold_kernel<T, V>), blocks_for(out.numel() / V), dim3(kThreads), 0, current_stream(weight),
                           data<T>(rows), mutable_data<T>(out), fold, index32(weight.size(0)), index32(outputs),
                           index32(total), index32(first), index32(channels));
    });
  });
  return out;
}

Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels) {
  return fold_weight(weight, first, channels, weight.size(0));
}

void unfold_gradient(const Tensor& grad_folded, int64_t first, Tensor& grad_weight) {
  const Fold fold(grad_weight.size(2));
  const int64_t outputs = grad_weight.size(0), channels = grad_folded.size(1);
  index32(grad_folded.numel()), index32(grad_weight.numel());
  dispatch_cuda(grad_weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(unfold_kernel<T>, blocks_for(outputs * fold.kernel * fold.kernel * channels), dim3(kThreads),
                         0, current_stream(grad_weight), data<T>(grad_folded), mutable_data<T>(grad_weight), fold,
                         index32(outputs), index32(grad_folded.size(0) / 4), index32(grad_weight.size(1)),
                         index32(first), index32(channels));
  });
}

void place_gradient(const Tensor& grad_slice, int64_t first, Tensor& grad_weight) {
  const int64_t channels = grad_slice.size(1), rows = grad_slice.numel() / channels;
  index32(grad_weight.numel());
  dispatch_cuda(grad_weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(place_kernel<T>, blocks_for(grad_slice.numel()), dim3(kThreads), 0,
                         current_stream(grad_weight), data<T>(grad_slice), mutable_data<T>(grad_weight), index32(rows),
                         index32(grad_weight.size(1)), index32(first), index32(channels));
  });
}

void accumulate(Tensor& sum, const Tensor& term) {
  const unsigned n = index32(sum.numel());
  dispatch_cuda(sum.scalar_type(), [&]<typename T>() {
    with_pack<T>(n, {&sum, &term}, [&]<int V>() {
      FUSED_INPAINT_LAUNCH((accumulate_kernel<T, V>), blocks_for(n / V), dim3(kThreads), 0, current_stream(sum),
                           mutable_data<T>(sum), data<T>(term), n);
    });
  });
}

}  // namespace fused_inpaint::cuda
