// SPDX-License-Identifier: Apache-2.0
// The operands of the vendor's convolution on the GPU: sources with their holes zeroed, weights cut and folded, and the
// way back. One thread makes one pack of channels or one weight.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::cuda {
namespace {

// Feature map (n, h, w, c) with the mask (mask_n, planes, h, w) of its pixels.
struct Masked {
  const uint8_t* mask;
  int64_t mask_n, planes, n, h, w, c;
  Masked(const Tensor& x, const Tensor& m)
      : mask(data<uint8_t>(m)),
        mask_n(m.size(0)),
        planes(m.size(1)),
        n(x.size(0)),
        h(x.size(2)),
        w(x.size(3)),
        c(x.size(1)) {}
  int64_t elements() const { return n * h * w * c; }
  __device__ bool valid(int64_t pixel, int64_t channel) const {
    const int64_t hw = h * w, batch = mask_n == 1 ? 0 : pixel / hw, plane = planes == 1 ? 0 : channel;
    return mask[(batch * planes + plane) * hw + pixel % hw] != 0;
  }
};

template <typename T, int V>
__global__ void select_kernel(const T* x, Masked m, T* out) {
  const int64_t packs = m.c / V, n = m.n * m.h * m.w * packs;
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t pixel = i / packs, c = i % packs * V;
    Pack<T, V> values{};
    if (m.planes > 1 || m.valid(pixel, 0)) values = load_pack<V>(x + pixel * m.c + c);
    if (m.planes > 1)
      for (int k = 0; k < V; ++k)
        if (!m.valid(pixel, c + k)) values.v[k] = T{};
    store_pack<V>(out + pixel * m.c + c, values);
  }
}

// Channels [at, at + c) of the concatenation, at the output's size.
template <typename T>
__global__ void concat_kernel(const T* x, Masked m, int64_t up, T* out, int64_t at, int64_t channels) {
  const int64_t h = m.h * up, w = m.w * up, n = m.n * h * w * m.c;
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t c = i % m.c, pixel = i / m.c, column = pixel % w, row = pixel / w;
    const int64_t source = ((row / h) * m.h + row % h / up) * m.w + column / up;
    out[pixel * channels + at + c] = m.valid(source, c) ? x[source * m.c + c] : T{};
  }
}

// Its gradient: a slice of the channels, summed over each 2 x 2 block where the source was upsampled.
template <typename T>
__global__ void split_kernel(const T* grad, int64_t channels, int64_t at, int64_t up, T* out, int64_t n, int64_t h,
                             int64_t w, int64_t c) {
  for (int64_t i = global_thread(); i < n * h * w * c; i += all_threads()) {
    const int64_t k = i % c, x = i / c % w, row = i / c / w;
    const T* g = grad + (row * up * w * up + x * up) * channels + at + k;
    if (up == 1) {
      out[i] = *g;
      continue;
    }
    const T* below = g + w * up * channels;
    store(out + i, (load(g[0]) + load(g[channels])) + (load(below[0]) + load(below[channels])));
  }
}

template <typename T>
__global__ void fold_kernel(const T* weight, T* folded, Fold fold, int64_t outputs, int64_t total, int64_t first,
                            int64_t channels) {
  const int64_t k = fold.kernel, taps = fold.taps, n = 4 * outputs * taps * taps * channels;
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t c = i % channels, t = i / channels % taps, s = i / channels / taps % taps;
    const int64_t o = i / channels / taps / taps % outputs, phase = i / channels / taps / taps / outputs;
    acc_t<T> sum = 0;
    for (int64_t u = 0; u < k; ++u)
      for (int64_t v = 0; v < k; ++v)
        if (fold.tap(phase / 2, u) == s && fold.tap(phase % 2, v) == t)
          sum += load(weight[((o * k + u) * k + v) * total + first + c]);
    store(folded + i, sum);
  }
}

template <typename T>
__global__ void unfold_kernel(const T* grad_folded, T* grad_weight, Fold fold, int64_t outputs, int64_t total,
                              int64_t first, int64_t channels) {
  const int64_t k = fold.kernel, taps = fold.taps, n = outputs * k * k * channels;
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t c = i % channels, v = i / channels % k, u = i / channels / k % k, o = i / channels / k / k;
    acc_t<T> sum = 0;
    for (int64_t phase = 0; phase < 4; ++phase) {
      const int64_t tap = fold.tap(phase / 2, u) * taps + fold.tap(phase % 2, v);
      sum += load(grad_folded[((phase * outputs + o) * taps * taps + tap) * channels + c]);
    }
    store(grad_weight + ((o * k + u) * k + v) * total + first + c, sum);
  }
}

template <typename T>
__global__ void place_kernel(const T* grad_slice, T* grad_weight, int64_t rows, int64_t total, int64_t first,
                             int64_t channels) {
  for (int64_t i = global_thread(); i < rows * channels; i += all_threads())
    grad_weight[i / channels * total + first + i % channels] = grad_slice[i];
}

template <typename T>
__global__ void accumulate_kernel(T* sum, const T* term, int64_t n) {
  for (int64_t i = global_thread(); i < n; i += all_threads()) store(sum + i, load(sum[i]) + load(term[i]));
}

void select_into(const Tensor& x, const Tensor& mask, Tensor& out) {
  const Masked m(x, mask);
  dispatch_cuda(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(m.c, {&x, &out}, [&]<int V>() {
      FUSED_INPAINT_LAUNCH((select_kernel<T, V>), blocks_for(m.elements() / V), dim3(kThreads), 0, current_stream(x),
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
  int64_t at = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor x = channels_last(sources[i]);
    const Masked m(x, masks[i]);
    const int64_t up = upsample[i];
    dispatch_cuda(x.scalar_type(), [&]<typename T>() {
      FUSED_INPAINT_LAUNCH(concat_kernel<T>, blocks_for(m.elements() * up * up), dim3(kThreads), 0, current_stream(x),
                           data<T>(x), m, up, mutable_data<T>(out), at, channels);
    });
    at += m.c;
  }
  return out;
}

void split_gradient(const Tensor& grad, const Ints& upsample, std::vector<Tensor>& grad_sources) {
  const int64_t channels = grad.size(1);
  int64_t at = 0;
  for (size_t i = 0; i < grad_sources.size(); ++i) {
    Tensor& out = grad_sources[i];
    const int64_t up = upsample[i];
    dispatch_cuda(grad.scalar_type(), [&]<typename T>() {
      FUSED_INPAINT_LAUNCH(split_kernel<T>, blocks_for(out.numel()), dim3(kThreads), 0, current_stream(grad),
                           data<T>(grad), channels, at, up, mutable_data<T>(out), out.size(0), out.size(2), out.size(3),
                           out.size(1));
    });
    at += out.size(1);
  }
}

Tensor slice_weight(const Tensor& weight, int64_t first, int64_t channels) {
  if (channels == weight.size(1)) return channels_last(weight);
  Tensor view = weight;
  return clone_channels_last(torch::stable::narrow(view, 1, first, channels));
}

Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels) {
  const Fold fold(weight.size(2));
  const int64_t outputs = weight.size(0), total = weight.size(1);
  Tensor out = empty_channels_last({4 * outputs, channels, fold.taps, fold.taps}, weight.scalar_type(), weight);
  const Tensor rows = channels_last(weight);
  dispatch_cuda(weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(fold_kernel<T>, blocks_for(out.numel()), dim3(kThreads), 0, current_stream(weight),
                         data<T>(rows), mutable_data<T>(out), fold, outputs, total, first, channels);
  });
  return out;
}

void unfold_gradient(const Tensor& grad_folded, int64_t first, Tensor& grad_weight) {
  const Fold fold(grad_weight.size(2));
  const int64_t outputs = grad_weight.size(0), total = grad_weight.size(1), channels = grad_folded.size(1);
  dispatch_cuda(grad_weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(unfold_kernel<T>, blocks_for(outputs * fold.kernel * fold.kernel * channels), dim3(kThreads),
                         0, current_stream(grad_weight), data<T>(grad_folded), mutable_data<T>(grad_weight), fold,
                         outputs, total, first, channels);
  });
}

void place_gradient(const Tensor& grad_slice, int64_t first, Tensor& grad_weight) {
  const int64_t channels = grad_slice.size(1), total = grad_weight.size(1), rows = grad_slice.numel() / channels;
  dispatch_cuda(grad_weight.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(place_kernel<T>, blocks_for(grad_slice.numel()), dim3(kThreads), 0,
                         current_stream(grad_weight), data<T>(grad_slice), mutable_data<T>(grad_weight), rows, total,
                         first, channels);
  });
}

void accumulate(Tensor& sum, const Tensor& term) {
  dispatch_cuda(sum.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(accumulate_kernel<T>, blocks_for(sum.numel()), dim3(kThreads), 0, current_stream(sum),
                         mutable_data<T>(sum), data<T>(term), sum.numel());
  });
}

}  // namespace fused_inpaint::cuda
