// SPDX-License-Identifier: Apache-2.0
// The passes over the output on the GPU: renormalisation, bias or batch norm, activation and holes in one read and one
// write, and the same backwards. Channels run fastest over the threads; 16 bytes at a time where they divide.
// Reductions run over chunks of pixels fixed by the shape, each chunk in one block, and are merged in their order.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_conv.h"
#include "partial_conv/partial_pixel.h"

namespace fused_inpaint::cuda {
namespace {

// Parameters and statistics come in the accumulator's type; a narrower tensor would be read past its end.
template <typename A>
const A* parameters(const Tensor& t) {
  const ScalarType expected = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.scalar_type() == expected, "partial_conv2d: parameters must be ",
                  torch::headeronly::toString(expected), ", got ", torch::headeronly::toString(t.scalar_type()));
  return data<A>(t);
}

template <typename T, int V, Activation kind>
__global__ void epilogue_kernel(T* y, const T* phases, bool from_y, Phases at, Output out, const acc_t<T>* scale,
                                const acc_t<T>* bias) {
  using A = acc_t<T>;
  const int64_t packs = out.c / V, n = out.pixels() * packs;
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t pixel = i / packs, c = i % packs * V;
    const A ratio = out.template ratio<A>(pixel);
    Pack<T, V> sum{}, extra{};
    if (ratio != 0) {
      if (from_y) sum = load_pack<V>(y + pixel * out.c + c);
      if (phases) extra = load_pack<V>(phases + at.pixel(pixel, out.h, out.w) + c);
    }
    Pack<T, V> result{};
    if (ratio != 0)
      for (int k = 0; k < V; ++k) {
        A v = from_y ? A(load(sum.v[k])) : A(0);
        if (phases) v += load(extra.v[k]);
        store(&result.v[k], activate<kind>(v * ratio * scale[c + k] + bias[c + k], static_cast<A>(out.slope)));
      }
    store_pack<V>(y + pixel * out.c + c, result);
  }
}

// One block sums one chunk of pixels for 32 channels: thread (x, y) takes channel x of every 8th pixel. The partial
// sums of the 8 rows are added in their order.
constexpr int kTile = 32, kRows = 8;

template <typename A>
__device__ A sum_rows(A value, A* scratch) {
  __syncthreads();
  scratch[threadIdx.y * kTile + threadIdx.x] = value;
  __syncthreads();
  A sum = 0;
  for (int r = 0; r < kRows; ++r) sum += scratch[r * kTile + threadIdx.x];
  return sum;
}

struct Chunks {
  int64_t pixels, size, n;
  explicit Chunks(const Output& out)
      : pixels(out.pixels()), size(std::max<int64_t>(64, ceil_div(pixels, 512))), n(ceil_div(pixels, size)) {}
};

dim3 tile_grid(const Chunks& chunks, int64_t channels) {
  return dim3(static_cast<unsigned>(chunks.n), static_cast<unsigned>(ceil_div(channels, kTile)));
}

// Sums of `parts` arrays of partial sums, chunk after chunk, in double.
template <typename A>
__global__ void merge_kernel(const A* partial, int64_t chunks, int64_t parts, int64_t c, double* total) {
  for (int64_t i = global_thread(); i < parts * c; i += all_threads()) {
    double sum = 0;
    for (int64_t b = 0; b < chunks; ++b) sum += partial[b * parts * c + i];
    total[i] = sum;
  }
}

template <typename T, Activation kind>
__global__ void epilogue_backward_kernel(const T* grad, const T* y, Chunks chunks, Output out, const acc_t<T>* scale,
                                         T* grad_conv, T* grad_phases, Phases at, acc_t<T>* partial) {
  using A = acc_t<T>;
  FUSED_INPAINT_SHARED(A, scratch, kTile * kRows);
  const int64_t c = blockIdx.y * kTile + threadIdx.x, begin = blockIdx.x * chunks.size;
  const int64_t end = begin + chunks.size < chunks.pixels ? begin + chunks.size : chunks.pixels;
  A sum = 0;
  if (c < out.c)
    for (int64_t pixel = begin + threadIdx.y; pixel < end; pixel += kRows) {
      const A ratio = out.template ratio<A>(pixel);
      A v = 0;
      if (ratio != 0) {
        v = through<kind>(A(load(grad[pixel * out.c + c])), A(load(y[pixel * out.c + c])), static_cast<A>(out.slope));
        sum += v;
        v = v * ratio * scale[c];
      }
      store(grad_conv + pixel * out.c + c, v);
      if (grad_phases) store(grad_phases + at.pixel(pixel, out.h, out.w) + c, v);
    }
  const A total = sum_rows(sum, scratch);
  if (threadIdx.y == 0 && c < out.c) partial[blockIdx.x * out.c + c] = total;
}

// Adds the phases to the convolution where there are any, and leaves for each chunk and channel the mean, the sum of
// the deviations from it (what rounding took from the mean) and the sum of their squares.
template <typename T>
__global__ void moments_kernel(T* conv, bool from_conv, const T* phases, Phases at, Chunks chunks, Output out,
                               acc_t<T>* partial) {
  using A = acc_t<T>;
  FUSED_INPAINT_SHARED(A, scratch, kTile * kRows);
  const int64_t c = blockIdx.y * kTile + threadIdx.x, begin = blockIdx.x * chunks.size;
  const int64_t end = begin + chunks.size < chunks.pixels ? begin + chunks.size : chunks.pixels;
  A sum = 0;
  if (c < out.c)
    for (int64_t pixel = begin + threadIdx.y; pixel < end; pixel += kRows) {
      T* at_pixel = conv + pixel * out.c + c;
      if (phases) {
        A v = from_conv ? A(load(*at_pixel)) : A(0);
        store(at_pixel, v + load(phases[at.pixel(pixel, out.h, out.w) + c]));
      }
      const A ratio = out.template ratio<A>(pixel);
      if (ratio != 0) sum += load(*at_pixel) * ratio;
    }
  const A mean = sum_rows(sum, scratch) / static_cast<A>(end - begin);
  A rest = 0, squares = 0;
  if (c < out.c)
    for (int64_t pixel = begin + threadIdx.y; pixel < end; pixel += kRows) {
      const A ratio = out.template ratio<A>(pixel);
      const A d = (ratio != 0 ? load(conv[pixel * out.c + c]) * ratio : A(0)) - mean;
      rest += d;
      squares += d * d;
    }
  rest = sum_rows(rest, scratch);
  squares = sum_rows(squares, scratch);
  if (threadIdx.y == 0 && c < out.c) {
    A* p = partial + blockIdx.x * 3 * out.c + c;
    p[0] = mean;
    p[out.c] = rest;
    p[2 * out.c] = squares;
  }
}

// Chan's rule, chunk after chunk.
template <typename A>
__global__ void merge_moments_kernel(const A* partial, Chunks chunks, int64_t c, A* mean, A* var) {
  for (int64_t i = global_thread(); i < c; i += all_threads()) {
    double total = 0, squares = 0, seen = 0;
    for (int64_t b = 0; b < chunks.n; ++b) {
      const int64_t end = (b + 1) * chunks.size < chunks.pixels ? (b + 1) * chunks.size : chunks.pixels;
      const double size = static_cast<double>(end - b * chunks.size), both = seen + size;
      const A* p = partial + b * 3 * c + i;
      const double missed = p[c] / size, delta = p[0] + missed - total;
      total += delta * size / both;
      squares += p[2 * c] - missed * p[c] + delta * delta * seen * size / both;
      seen = both;
    }
    mean[i] = static_cast<A>(total);
    var[i] = static_cast<A>(squares > 0 ? squares / seen : 0);
  }
}

template <typename T, int V, Activation kind>
__global__ void batch_norm_kernel(const T* conv, Output out, const acc_t<T>* mean, const acc_t<T>* var,
                                  const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps, T* y) {
  using A = acc_t<T>;
  const int64_t packs = out.c / V, n = out.pixels() * packs;
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t pixel = i / packs, c = i % packs * V;
    const A ratio = out.template ratio<A>(pixel);
    Pack<T, V> result{};
    if (ratio != 0) {
      const Pack<T, V> v = load_pack<V>(conv + pixel * out.c + c);
      for (int k = 0; k < V; ++k) {
        const A gain = weight[c + k] / std::sqrt(var[c + k] + eps);
        const A a = (load(v.v[k]) * ratio - mean[c + k]) * gain + bias[c + k];
        store(&result.v[k], activate<kind>(a, static_cast<A>(out.slope)));
      }
    }
    store_pack<V>(y + pixel * out.c + c, result);
  }
}

template <typename T, Activation kind>
__global__ void norm_sums_kernel(const T* grad, const T* conv, Chunks chunks, Output out, const acc_t<T>* mean,
                                 const acc_t<T>* var, const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps,
                                 acc_t<T>* partial) {
  using A = acc_t<T>;
  FUSED_INPAINT_SHARED(A, scratch, kTile * kRows);
  const int64_t c = blockIdx.y * kTile + threadIdx.x, begin = blockIdx.x * chunks.size;
  const int64_t end = begin + chunks.size < chunks.pixels ? begin + chunks.size : chunks.pixels;
  A sum = 0, dot = 0;
  if (c < out.c) {
    const A inverse = A(1) / std::sqrt(var[c] + eps);
    for (int64_t pixel = begin + threadIdx.y; pixel < end; pixel += kRows) {
      const A ratio = out.template ratio<A>(pixel);
      if (ratio == 0) continue;
      const A x_hat = (load(conv[pixel * out.c + c]) * ratio - mean[c]) * inverse;
      const A g =
          through<kind>(A(load(grad[pixel * out.c + c])), x_hat * weight[c] + bias[c], static_cast<A>(out.slope));
      sum += g;
      dot += g * x_hat;
    }
  }
  sum = sum_rows(sum, scratch);
  dot = sum_rows(dot, scratch);
  if (threadIdx.y == 0 && c < out.c) {
    partial[blockIdx.x * 2 * out.c + c] = sum;
    partial[(blockIdx.x * 2 + 1) * out.c + c] = dot;
  }
}

template <typename T, int V, Activation kind>
__global__ void norm_gradient_kernel(const T* grad, const T* conv, Output out, const acc_t<T>* mean,
                                     const acc_t<T>* var, const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps,
                                     const double* sums, T* grad_conv, T* grad_phases, Phases at) {
  using A = acc_t<T>;
  const int64_t packs = out.c / V, n = out.pixels() * packs;
  const double values = static_cast<double>(out.pixels());
  for (int64_t i = global_thread(); i < n; i += all_threads()) {
    const int64_t pixel = i / packs, c = i % packs * V;
    const A ratio = out.template ratio<A>(pixel);
    Pack<T, V> result{};
    if (ratio != 0) {
      const Pack<T, V> v = load_pack<V>(conv + pixel * out.c + c), d = load_pack<V>(grad + pixel * out.c + c);
      for (int k = 0; k < V; ++k) {
        const A inverse = A(1) / std::sqrt(var[c + k] + eps);
        const A x_hat = (load(v.v[k]) * ratio - mean[c + k]) * inverse;
        const A a = x_hat * weight[c + k] + bias[c + k];
        const A g = through<kind>(A(load(d.v[k])), a, static_cast<A>(out.slope));
        const A centred =
            g - static_cast<A>(sums[c + k] / values) - x_hat * static_cast<A>(sums[out.c + c + k] / values);
        store(&result.v[k], centred * inverse * weight[c + k] * ratio);
      }
    }
    store_pack<V>(grad_conv + pixel * out.c + c, result);
    if (grad_phases) store_pack<V>(grad_phases + at.pixel(pixel, out.h, out.w) + c, result);
  }
}

template <typename A>
__global__ void narrow_kernel(const double* sums, A* out, int64_t c) {
  for (int64_t i = global_thread(); i < c; i += all_threads()) store(out + i, static_cast<acc_t<A>>(sums[i]));
}

void narrow(const Tensor& sums, int64_t first, Tensor& out) {
  dispatch_cuda(out.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(narrow_kernel<T>, blocks_for(out.numel()), dim3(kThreads), 0, current_stream(out),
                         data<double>(sums) + first, mutable_data<T>(out), out.numel());
  });
}

// Where the phases are shifted, a border row and column of each belongs to no output pixel.
void clear_border(Tensor* phases, int64_t shift) {
  if (phases && shift) torch::stable::zero_(*phases);
}

}  // namespace

void epilogue(Tensor& y, bool y_holds_sum, const Tensor* phases, int64_t shift, const Output& out, const Tensor& scale,
              const Tensor& bias) {
  dispatch_cuda(y.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      with_pack<T>(out.c, {&y, phases}, [&]<int V>() {
        FUSED_INPAINT_LAUNCH((epilogue_kernel<T, V, kind>), blocks_for(out.pixels() * out.c / V), dim3(kThreads), 0,
                             current_stream(y), mutable_data<T>(y), phases ? data<T>(*phases) : nullptr, y_holds_sum,
                             phases_of(out, shift), out, parameters<acc_t<T>>(scale), parameters<acc_t<T>>(bias));
      });
    });
  });
}

void epilogue_backward(const Tensor& grad, const Tensor& y, const Output& out, const Tensor& scale, Tensor& grad_conv,
                       Tensor* grad_phases, int64_t shift, Tensor* grad_bias) {
  const Chunks chunks(out);
  clear_border(grad_phases, shift);
  Tensor sums = empty({out.c}, ScalarType::Double, grad);
  dispatch_cuda(grad.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      using A = acc_t<T>;
      Tensor partial = empty({chunks.n, out.c}, scale.scalar_type(), grad);
      FUSED_INPAINT_LAUNCH((epilogue_backward_kernel<T, kind>), tile_grid(chunks, out.c), dim3(kTile, kRows), 0,
                           current_stream(grad), data<T>(grad), data<T>(y), chunks, out, parameters<A>(scale),
                           mutable_data<T>(grad_conv), grad_phases ? mutable_data<T>(*grad_phases) : nullptr,
                           phases_of(out, shift), mutable_data<A>(partial));
      FUSED_INPAINT_LAUNCH(merge_kernel<A>, blocks_for(out.c), dim3(kThreads), 0, current_stream(grad),
                           data<A>(partial), chunks.n, int64_t{1}, out.c, mutable_data<double>(sums));
    });
  });
  if (grad_bias) narrow(sums, 0, *grad_bias);
}

void batch_statistics(Tensor& conv, bool conv_holds_sum, const Tensor* phases, int64_t shift, const Output& out,
                      Tensor& mean, Tensor& var) {
  const Chunks chunks(out);
  dispatch_cuda(conv.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    Tensor partial = empty({chunks.n, 3, out.c}, mean.scalar_type(), conv);
    FUSED_INPAINT_LAUNCH(moments_kernel<T>, tile_grid(chunks, out.c), dim3(kTile, kRows), 0, current_stream(conv),
                         mutable_data<T>(conv), conv_holds_sum, phases ? data<T>(*phases) : nullptr,
                         phases_of(out, shift), chunks, out, mutable_data<A>(partial));
    FUSED_INPAINT_LAUNCH(merge_moments_kernel<A>, blocks_for(out.c), dim3(kThreads), 0, current_stream(conv),
                         data<A>(partial), chunks, out.c, mutable_data<A>(mean), mutable_data<A>(var));
  });
}

void batch_norm(const Tensor& conv, const Output& out, const Tensor& mean, const Tensor& var, const Tensor& weight,
                const Tensor& bias, double eps, Tensor& y) {
  dispatch_cuda(conv.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      with_pack<T>(out.c, {&conv, &y}, [&]<int V>() {
        using A = acc_t<T>;
        FUSED_INPAINT_LAUNCH((batch_norm_kernel<T, V, kind>), blocks_for(out.pixels() * out.c / V), dim3(kThreads), 0,
                             current_stream(y), data<T>(conv), out, parameters<A>(mean), parameters<A>(var),
                             parameters<A>(weight), parameters<A>(bias), static_cast<A>(eps), mutable_data<T>(y));
      });
    });
  });
}

void batch_norm_backward(const Tensor& grad, const Tensor& conv, const Output& out, const Tensor& mean,
                         const Tensor& var, const Tensor& weight, const Tensor& bias, double eps, Tensor& grad_conv,
                         Tensor* grad_phases, int64_t shift, Tensor& grad_weight, Tensor& grad_bias) {
  const Chunks chunks(out);
  clear_border(grad_phases, shift);
  Tensor sums = empty({2, out.c}, ScalarType::Double, grad);
  dispatch_cuda(conv.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      using A = acc_t<T>;
      Tensor partial = empty({chunks.n, 2, out.c}, mean.scalar_type(), grad);
      FUSED_INPAINT_LAUNCH((norm_sums_kernel<T, kind>), tile_grid(chunks, out.c), dim3(kTile, kRows), 0,
                           current_stream(grad), data<T>(grad), data<T>(conv), chunks, out, parameters<A>(mean),
                           parameters<A>(var), parameters<A>(weight), parameters<A>(bias), static_cast<A>(eps),
                           mutable_data<A>(partial));
      FUSED_INPAINT_LAUNCH(merge_kernel<A>, blocks_for(2 * out.c), dim3(kThreads), 0, current_stream(grad),
                           data<A>(partial), chunks.n, int64_t{2}, out.c, mutable_data<double>(sums));
      with_pack<T>(out.c, {&grad, &conv, &grad_conv, grad_phases}, [&]<int V>() {
        FUSED_INPAINT_LAUNCH((norm_gradient_kernel<T, V, kind>), blocks_for(out.pixels() * out.c / V), dim3(kThreads),
                             0, current_stream(grad), data<T>(grad), data<T>(conv), out, parameters<A>(mean),
                             parameters<A>(var), parameters<A>(weight), parameters<A>(bias), static_cast<A>(eps),
                             data<double>(sums), mutable_data<T>(grad_conv),
                             grad_phases ? mutable_data<T>(*grad_phases) : nullptr, phases_of(out, shift));
      });
    });
  });
  narrow(sums, 0, grad_bias);
  narrow(sums, out.c, grad_weight);
}

}  // namespace fused_inpaint::cuda
