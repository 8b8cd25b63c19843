// SPDX-License-Identifier: Apache-2.0
// Parallel dilated convolutions on the GPU: for each branch a padded copy and the vendor's convolution, then one pass
// over all outputs; back, one pass that masks the gradient and one that sums what the branches return. A thread keeps
// its channels, 16 bytes of them where they divide, and walks the pixels.
#define FUSED_INPAINT_DEVICE cuda
#include <tuple>
#include <vector>

#include "common/frame.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "pyramid_conv/pyramid_conv.h"

namespace fused_inpaint::cuda {
namespace {

template <typename F>
void dispatch(ScalarType dtype, F&& body) {
  if (dtype == ScalarType::Half) return body.template operator()<__half>();
  dispatch_float("pyramid_conv2d", dtype, body);
}

template <typename F>
void with_flag(bool flag, F&& body) {
  flag ? body.template operator()<true>() : body.template operator()<false>();
}

// What one launch reads: a map of each branch. Kernels take it as a grid constant, for indexing it would copy it.
constexpr int kBranches = 16;
template <typename T>
struct Maps {
  const T* of[kBranches];
  explicit Maps(const std::vector<Tensor>& maps) : of{} {
    for (size_t b = 0; b < maps.size(); ++b) of[b] = data<T>(maps[b]);
  }
};

// (n, padded_h, padded_w, channels)
template <typename T, int V>
__global__ void pad_kernel(const T* x, unsigned channels, Frame frame, T* out) {
  const unsigned pixels = frame.n * frame.padded_h * frame.padded_w;
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V)
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels())
      store_pack<V>(out + pixel * channels + c, load_pack<V>(x + frame.source(pixel) * channels + c));
}

// The convolutions' outputs (pixels, n) to y (pixels, channels).
template <typename T, int V, bool relu>
__global__ void finish_kernel(const __grid_constant__ Maps<T> sums, unsigned n, const acc_t<T>* bias, T* y,
                              unsigned channels, unsigned pixels) {
  using A = acc_t<T>;
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    const T* const from = sums.of[c / n] + c % n;
    Pack<A, V> offset{};
    if (bias)
      for (int k = 0; k < V; ++k) offset.v[k] = bias[c + k];
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      const Pack<T, V> sum = load_pack<V>(from + pixel * n);
      Pack<T, V> result;
      for (int k = 0; k < V; ++k) {
        const A v = A(load(sum.v[k])) + offset.v[k];
        store(&result.v[k], relu && v < 0 ? A(0) : v);  // a NaN stays one
      }
      store_pack<V>(y + pixel * channels + c, result);
    }
  }
}

// The gradient in front of the activation, (D, pixels, n), and for each chunk of pixels its sums, (chunks, channels).
template <typename T, int V, bool relu>
__global__ void mask_kernel(const T* grad, const T* y, unsigned n, unsigned channels, Chunks chunks, T* out,
                            acc_t<T>* partial) {
  using Sums = Pack<acc_t<T>, V>;
  FUSED_INPAINT_SHARED(Sums, scratch, kThreads / 2);
  const unsigned c = blockIdx.y * Tile<V>::kChannels + threadIdx.x * V;
  Sums sums{};
  if (c < channels) {
    T* const to = out + c / n * chunks.pixels * n + c % n;
    const unsigned end = chunks.end(blockIdx.x);
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += Tile<V>::kRows) {
      const Pack<T, V> g = load_pack<V>(grad + pixel * channels + c), o = load_pack<V>(y + pixel * channels + c);
      Pack<T, V> result{};
      for (int k = 0; k < V; ++k)
        if (!relu || !(load(o.v[k]) <= 0)) {
          result.v[k] = g.v[k];
          sums.v[k] += load(g.v[k]);
        }
      store_pack<V>(to + pixel * n, result);
    }
  }
  join_rows<V>(sums, scratch, [](Sums& one, const Sums& other) {
    for (int k = 0; k < V; ++k) one.v[k] += other.v[k];
  });
  if (threadIdx.y == 0 && c < channels)
    for (int k = 0; k < V; ++k) partial[blockIdx.x * channels + c + k] = sums.v[k];
}

template <typename A>
__global__ void merge_kernel(const A* partial, unsigned chunks, unsigned channels, A* total) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned c = blockIdx.x * kMergeColumns + threadIdx.x;
  const double sum =
      merged(chunks, c < channels, rows, [&](unsigned b) -> double { return partial[b * channels + c]; });
  if (threadIdx.y == 0 && c < channels) total[c] = static_cast<A>(sum);
}

// The frames of the branches are of one x, and differ in their padding.
struct Paddings {
  Frame frame;
  unsigned branches, of[kBranches];
  Paddings(const Tensor& x, const Pyramid& p) : frame(x, 1, 0, 0, p.mode), branches(index32(p.branches())), of{} {
    if (p.copies())
      for (unsigned b = 0; b < branches; ++b) of[b] = index32(p.dilations[b]);
  }
};

// The gradients of the padded copies to that of x, branch by branch and copy by copy in their order.
template <typename T, int V>
__global__ void fold_kernel(const __grid_constant__ Maps<T> grads, const __grid_constant__ Paddings paddings,
                            unsigned channels, T* out) {
  const unsigned pixels = paddings.frame.n * paddings.frame.h * paddings.frame.w;
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V)
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      Pack<acc_t<T>, V> sum{};
      for (unsigned b = 0; b < paddings.branches; ++b)
        paddings.frame.padded_by(paddings.of[b]).copies(pixel, [&](unsigned copy) {
          const Pack<T, V> g = load_pack<V>(grads.of[b] + copy * channels + c);
          for (int k = 0; k < V; ++k) sum.v[k] += load(g.v[k]);
        });
      Pack<T, V> result;
      for (int k = 0; k < V; ++k) store(&result.v[k], sum.v[k]);
      store_pack<V>(out + pixel * channels + c, result);
    }
}

void check_branches(const Pyramid& p) {
  STD_TORCH_CHECK(p.branches() <= kBranches, "pyramid_conv2d: dilations must be at most ", kBranches, " on a GPU, got ",
                  p.branches());
}

std::vector<const Tensor*> pointers(const std::vector<Tensor>& maps, const Tensor& out) {
  std::vector<const Tensor*> all{&out};
  for (const Tensor& map : maps) all.push_back(&map);
  return all;
}

// What a branch's convolution reads.
Tensor operand(const Tensor& x, const Pyramid& p, int64_t branch) {
  if (!p.copies()) return x;
  const int64_t d = p.dilations[branch];
  const Frame frame(x, 1, d, d, p.mode);
  Tensor out = empty_channels_last({p.n, p.c, p.h + 2 * d, p.w + 2 * d}, x.scalar_type(), x);
  index32(out.numel());
  dispatch(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(p.c, {&x, &out}, [&]<int V>() {
      const dim3 threads = pixel_threads(p.c / V);
      FUSED_INPAINT_LAUNCH((pad_kernel<T, V>), pixel_blocks(out.numel() / p.c, threads), threads, 0,
                           current_stream(out), data<T>(x), index32(p.c), frame, mutable_data<T>(out));
    });
  });
  return out;
}

// (D n, outputs, h, w): the branches' one after the other. Its sums into grad_bias unless that is null.
Tensor masked_gradients(const Tensor& grad_, const Tensor& y_, const Pyramid& p, Tensor* grad_bias) {
  const Tensor grad = channels_last(grad_), y = p.relu ? channels_last(y_) : grad;
  Tensor out = empty_channels_last({p.branches() * p.n, p.outputs, p.h, p.w}, grad.scalar_type(), grad);
  const unsigned channels = index32(p.all_outputs());
  index32(out.numel());
  const Chunks chunks = tile_chunks(p.pixels(), 1);
  Tensor partial = empty({chunks.n, channels}, wide(grad.scalar_type()), grad);
  dispatch(grad.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    with_flag(p.relu, [&]<bool relu>() {
      with_pack<T>(p.outputs, {&grad, &y, &out}, [&]<int V>() {
        FUSED_INPAINT_LAUNCH((mask_kernel<T, V, relu>), dim3(chunks.n, tiles<V>(channels)), tile_threads<V>(), 0,
                             current_stream(grad), data<T>(grad), data<T>(y), index32(p.outputs), channels, chunks,
                             mutable_data<T>(out), mutable_data<A>(partial));
      });
    });
    if (grad_bias)
      FUSED_INPAINT_LAUNCH(merge_kernel<A>, merge_blocks(channels), merge_threads(), 0, current_stream(grad),
                           data<A>(partial), chunks.n, channels, mutable_data<A>(*grad_bias));
  });
  return out;
}

Tensor empty_or_none(const Tensor& like, bool wanted) {
  return wanted ? empty_channels_last(sizes(like), like.scalar_type(), like) : empty({0}, like.scalar_type(), like);
}

}  // namespace

Tensor pyramid_conv2d(Tensor x_, Tensor weight_, std::optional<Tensor> bias, Ints dilations, std::string padding_mode,
                      std::string activation) {
  const Pyramid p = describe_pyramid(x_, weight_, dilations, padding_mode, activation);
  const DeviceGuard guard(x_);
  check_branches(p);
  check_bias(bias, p, x_);
  Tensor y = empty_channels_last({p.n, p.all_outputs(), p.h, p.w}, x_.scalar_type(), x_);
  if (p.n == 0) return y;
  const Tensor x = channels_last(x_), weight = channels_last(weight_);
  std::vector<Tensor> sums;
  for (int64_t b = 0; b < p.branches(); ++b) {
    sums.push_back(aten_convolution(operand(x, p, b), rows_of(weight, p, b), p.convolution(b)));
    STD_TORCH_CHECK(sums.back().numel() == p.pixels() * p.outputs,
                    "pyramid_conv2d: the convolution must keep the map's size");
  }
  const unsigned channels = index32(p.all_outputs()), pixels = index32(p.pixels());
  index32(y.numel());
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    with_flag(p.relu, [&]<bool relu>() {
      with_pack<T>(p.outputs, pointers(sums, y), [&]<int V>() {
        const dim3 threads = pixel_threads(channels / V);
        FUSED_INPAINT_LAUNCH((finish_kernel<T, V, relu>), pixel_blocks(pixels, threads), threads, 0, current_stream(y),
                             Maps<T>(sums), index32(p.outputs), bias ? data<A>(*bias) : nullptr, mutable_data<T>(y),
                             channels, pixels);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pyramid_conv2d_backward(Tensor grad, Tensor y, Tensor x_, Tensor weight_,
                                                           Ints dilations, std::string padding_mode,
                                                           std::string activation, bool need_x, bool need_weight,
                                                           bool need_bias) {
  const Pyramid p = describe_pyramid(x_, weight_, dilations, padding_mode, activation);
  const DeviceGuard guard(x_);
  check_branches(p);
  check_outputs("grad", grad, p, x_);
  check_outputs("y", y, p, x_);
  Tensor grad_x = empty_or_none(x_, need_x), grad_weight = empty_or_none(weight_, need_weight);
  Tensor grad_bias = empty({need_bias ? p.all_outputs() : 0}, wide(x_.scalar_type()), x_);
  if (p.n == 0) {
    for (Tensor* t : {&grad_x, &grad_weight, &grad_bias}) torch::stable::zero_(*t);
    return {grad_x, grad_weight, grad_bias};
  }
  Tensor masked = masked_gradients(grad, y, p, need_bias ? &grad_bias : nullptr);
  if (!need_x && !need_weight) return {grad_x, grad_weight, grad_bias};
  const Tensor x = channels_last(x_), weight = channels_last(weight_);
  std::vector<Tensor> grads;
  for (int64_t b = 0; b < p.branches(); ++b) {
    const Tensor of_branch = torch::stable::narrow(masked, 0, b * p.n, p.n);
    const auto [to_operand, to_filters] = aten_convolution_backward(of_branch, operand(x, p, b), rows_of(weight, p, b),
                                                                    p.convolution(b), need_x, need_weight);
    if (need_x) grads.push_back(*to_operand);
    if (need_weight) {
      Tensor rows = rows_of(grad_weight, p, b);
      torch::stable::copy_(rows, *to_filters);
    }
  }
  if (!need_x) return {grad_x, grad_weight, grad_bias};
  for (const Tensor& g : grads) index32(g.numel());
  dispatch(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(p.c, pointers(grads, grad_x), [&]<int V>() {
      const dim3 threads = pixel_threads(p.c / V);
      FUSED_INPAINT_LAUNCH((fold_kernel<T, V>), pixel_blocks(p.pixels(), threads), threads, 0, current_stream(grad_x),
                           Maps<T>(grads), Paddings(x, p), index32(p.c), mutable_data<T>(grad_x));
    });
  });
  return {grad_x, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("pyramid_conv2d", TORCH_BOX(&pyramid_conv2d));
  m.impl("pyramid_conv2d_backward", TORCH_BOX(&pyramid_conv2d_backward));
}

}  // namespace fused_inpaint::cuda
