// SPDX-License-Identifier: Apache-2.0
// The passes over the output on the GPU: renormalisation, bias or batch norm, activation and holes in one read and one
// write, and the same backwards. A thread keeps its channels, 16 bytes of them where they divide, and walks the pixels.
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
template <typename A>
const A* given(const Tensor* t) {
  return t ? parameters<A>(*t) : nullptr;
}

// Output, in 32 bits and in the accumulator's type.
template <typename A>
struct Map {
  unsigned pixels, c, h, w;
  const int32_t* count;
  bool shared;
  A window, slope;
  explicit Map(const Output& out)
      : pixels(index32(out.pixels())),
        c(index32(out.c)),
        h(index32(out.h)),
        w(index32(out.w)),
        count(out.count),
        shared(out.count_n == 1),
        window(static_cast<A>(out.window)),
        slope(static_cast<A>(out.slope)) {
    index32(out.pixels() * out.c);
  }
  __device__ A ratio(unsigned pixel) const {
    const int32_t valid = count[shared ? pixel % (h * w) : pixel];
    return valid > 0 ? window / static_cast<A>(valid) : A(0);
  }
};

// Phases, in 32 bits; they may have more channels than the output.
struct PhaseMap {
  unsigned h, w, c, shift, out_h, out_w;
  PhaseMap(const Output& out, const Tensor* phases, int64_t shift_)
      : h(index32(out.h / 2 + shift_)),
        w(index32(out.w / 2 + shift_)),
        c(index32(phases ? phases->size(1) / 4 : out.c)),
        shift(index32(shift_)),
        out_h(index32(out.h)),
        out_w(index32(out.w)) {
    if (phases) index32(phases->numel());
  }
  // First channel of what the output's pixel reads.
  __device__ unsigned operator()(unsigned pixel) const {
    const unsigned row = pixel / out_w, x = pixel % out_w, n = row / out_h, y = row % out_h, a = y % 2, b = x % 2;
    return (((n * h + y / 2 + a * shift) * w + x / 2 + b * shift) * 4 + a * 2 + b) * c;
  }
};

// A thread does N pixels at a time for its channels, so that their loads are under way together and the parameters,
// more bytes than a pixel's values, are read once for all of them.
constexpr int kForward = 4, kBackward = 2;

// Each thread has N pixels, and more where there are enough to fill any GPU.
template <int N>
dim3 pass_blocks(int64_t pixels, dim3 threads) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(pixels, int64_t{threads.y} * N), 1, 2112)));
}

// N pixels and their ratios; beyond the last pixel the ratio is 0.
template <int N, typename A>
struct Some {
  unsigned pixel[N];
  A ratio[N];
};

// Calls body(Some).
template <int N, typename A, typename F>
__device__ void each_some(const Map<A>& out, F&& body) {
  for (unsigned first = blockIdx.x * blockDim.y * N + threadIdx.y; first < out.pixels;
       first += gridDim.x * blockDim.y * N) {
    Some<N, A> at;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      at.pixel[j] = first + j * blockDim.y;
      at.ratio[j] = at.pixel[j] < out.pixels ? out.ratio(at.pixel[j]) : A(0);
    }
    body(at);
  }
}

template <typename T, int V, Activation kind>
__global__ void epilogue_kernel(T* y, const T* phases, bool from_y, PhaseMap at, Map<acc_t<T>> out,
                                const acc_t<T>* scale, const acc_t<T>* bias) {
  using A = acc_t<T>;
  for (unsigned c = threadIdx.x * V; c < out.c; c += blockDim.x * V) {
    Pack<A, V> gain, offset;
    for (int k = 0; k < V; ++k) gain.v[k] = scale ? scale[c + k] : A(1), offset.v[k] = bias ? bias[c + k] : A(0);
    each_some<kForward>(out, [&](const Some<kForward, A>& some) {
      Pack<T, V> sum[kForward] = {}, extra[kForward] = {};
#pragma unroll
      for (int j = 0; j < kForward; ++j)
        if (some.ratio[j] != 0) {
          if (from_y) sum[j] = load_pack<V>(y + some.pixel[j] * out.c + c);
          if (phases) extra[j] = load_pack<V>(phases + at(some.pixel[j]) + c);
        }
#pragma unroll
      for (int j = 0; j < kForward; ++j) {
        Pack<T, V> result{};
        if (some.ratio[j] != 0)
          for (int k = 0; k < V; ++k) {
            A v = from_y ? A(load(sum[j].v[k])) : A(0);
            if (phases) v += load(extra[j].v[k]);
            store(&result.v[k], activate<kind>(v * some.ratio[j] * gain.v[k] + offset.v[k], out.slope));
          }
        if (some.pixel[j] < out.pixels) store_pack<V>(y + some.pixel[j] * out.c + c, result);
      }
    });
  }
}

// One block sums one chunk of pixels for a tile of channels: thread (x, y) takes pack x of every pixel y of kRows.
template <int V>
struct SumTile {
  // Channels that do not divide are most often the three of an image.
  static constexpr int kPacks = V == 1 ? 4 : 8, kRows = kThreads / kPacks, kChannels = kPacks * V;
};

struct Chunks {
  unsigned pixels, size, n;
  explicit Chunks(const Output& out)
      : pixels(index32(out.pixels())),
        size(static_cast<unsigned>(std::max<int64_t>(64, ceil_div(pixels, 512)))),
        n(static_cast<unsigned>(ceil_div(pixels, size))) {}
  __device__ unsigned begin(unsigned chunk) const { return chunk * size; }
  __device__ unsigned end(unsigned chunk) const { return begin(chunk) + size < pixels ? begin(chunk) + size : pixels; }
};

template <int V>
dim3 sum_blocks(const Chunks& chunks, int64_t channels) {
  return dim3(chunks.n, static_cast<unsigned>(ceil_div(channels, SumTile<V>::kChannels)));
}
template <int V>
dim3 sum_threads() {
  return dim3(SumTile<V>::kPacks, SumTile<V>::kRows);
}

// The tile's sums over the rows, in their order, one for each channel. `scratch` has a pack for each thread.
template <int V, typename A>
__device__ const A* sum_rows(const Pack<A, V>& value, Pack<A, V>* scratch) {
  using Tile = SumTile<V>;
  const int thread = threadIdx.y * Tile::kPacks + threadIdx.x;
  __syncthreads();
  scratch[thread] = value;
  __syncthreads();
  A* sums = scratch->v;
  if (thread < Tile::kChannels)
    for (int r = 1; r < Tile::kRows; ++r) sums[thread] += sums[r * Tile::kChannels + thread];
  __syncthreads();
  return sums;
}

// Writes one number for each of the tile's channels.
template <int V, typename A>
__device__ void write_sums(const A* sums, unsigned channels, A* to) {
  const unsigned i = threadIdx.y * SumTile<V>::kPacks + threadIdx.x, c = blockIdx.y * SumTile<V>::kChannels + i;
  if (i < SumTile<V>::kChannels && c < channels) to[c] = sums[i];
}

template <typename T, int V, Activation kind>
__global__ void epilogue_backward_kernel(const T* grad, const T* y, Chunks chunks, Map<acc_t<T>> out,
                                         const acc_t<T>* scale, T* grad_conv, T* grad_phases, PhaseMap at,
                                         acc_t<T>* partial) {
  using A = acc_t<T>;
  using Sums = Pack<A, V>;
  FUSED_INPAINT_SHARED(Sums, scratch, kThreads);
  const unsigned c = blockIdx.y * SumTile<V>::kChannels + threadIdx.x * V, end = chunks.end(blockIdx.x);
  Sums sum{};
  if (c < out.c) {
    Sums gain;
    for (int k = 0; k < V; ++k) gain.v[k] = scale ? scale[c + k] : A(1);
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += SumTile<V>::kRows) {
      const A ratio = out.ratio(pixel);
      Pack<T, V> result{};
      if (ratio != 0) {
        const Pack<T, V> g = load_pack<V>(grad + pixel * out.c + c), o = load_pack<V>(y + pixel * out.c + c);
        for (int k = 0; k < V; ++k) {
          const A v = through<kind>(A(load(g.v[k])), A(load(o.v[k])), out.slope);
          sum.v[k] += v;
          store(&result.v[k], v * ratio * gain.v[k]);
        }
      }
      store_pack<V>(grad_conv + pixel * out.c + c, result);
      if (grad_phases) store_pack<V>(grad_phases + at(pixel) + c, result);
    }
  }
  write_sums<V>(sum_rows<V>(sum, scratch), out.c, partial + blockIdx.x * out.c);
}

// Adds the phases to the convolution where there are any, and leaves for each chunk and channel the mean, the sum of
// the deviations from it (what rounding took from the mean) and the sum of their squares.
template <typename T, int V>
__global__ void moments_kernel(T* conv, bool from_conv, const T* phases, PhaseMap at, Chunks chunks, Map<acc_t<T>> out,
                               acc_t<T>* partial) {
  using A = acc_t<T>;
  using Sums = Pack<A, V>;
  FUSED_INPAINT_SHARED(Sums, scratch, kThreads);
  const unsigned c = blockIdx.y * SumTile<V>::kChannels + threadIdx.x * V;
  const unsigned begin = chunks.begin(blockIdx.x), end = chunks.end(blockIdx.x);
  A* of_chunk = partial + blockIdx.x * 3 * out.c;
  Sums sum{};
  if (c < out.c)
    for (unsigned pixel = begin + threadIdx.y; pixel < end; pixel += SumTile<V>::kRows) {
      T* at_pixel = conv + pixel * out.c + c;
      Pack<T, V> values{};
      if (from_conv) values = load_pack<V>(at_pixel);
      if (phases) {
        const Pack<T, V> extra = load_pack<V>(phases + at(pixel) + c);
        for (int k = 0; k < V; ++k) store(&values.v[k], load(values.v[k]) + load(extra.v[k]));
        store_pack<V>(at_pixel, values);
      }
      const A ratio = out.ratio(pixel);
      if (ratio != 0)
        for (int k = 0; k < V; ++k) sum.v[k] += product(A(load(values.v[k])), ratio);
    }
  const A* sums = sum_rows<V>(sum, scratch);
  Sums mean;
  for (int k = 0; k < V; ++k) mean.v[k] = sums[threadIdx.x * V + k] / static_cast<A>(end - begin);
  if (threadIdx.y == 0 && c < out.c)
    for (int k = 0; k < V; ++k) of_chunk[c + k] = mean.v[k];
  Sums rest{}, squares{};
  if (c < out.c)
    for (unsigned pixel = begin + threadIdx.y; pixel < end; pixel += SumTile<V>::kRows) {
      const A ratio = out.ratio(pixel);
      Pack<T, V> values{};
      if (ratio != 0) values = load_pack<V>(conv + pixel * out.c + c);
      for (int k = 0; k < V; ++k) {
        const A d = (ratio != 0 ? product(A(load(values.v[k])), ratio) : A(0)) - mean.v[k];
        rest.v[k] += d;
        squares.v[k] += d * d;
      }
    }
  write_sums<V>(sum_rows<V>(rest, scratch), out.c, of_chunk + out.c);
  write_sums<V>(sum_rows<V>(squares, scratch), out.c, of_chunk + 2 * out.c);
}

// A block merges the chunks of 32 columns: each of its rows a range of them in their order, then the rows in theirs.
constexpr unsigned kMergeColumns = 32, kMergeRows = 16;

dim3 merge_blocks(unsigned columns) { return dim3((columns + kMergeColumns - 1) / kMergeColumns); }
dim3 merge_threads() { return dim3(kMergeColumns, kMergeRows); }

// Calls merge(chunk) for those of the thread's row.
template <typename F>
__device__ void each_chunk(unsigned chunks, F merge) {
  const unsigned share = (chunks + kMergeRows - 1) / kMergeRows, begin = threadIdx.y * share;
  for (unsigned b = begin; b < begin + share && b < chunks; ++b) merge(b);
}

// partial: (chunks, columns); sums in double.
template <typename A>
__global__ void merge_kernel(const A* partial, unsigned chunks, unsigned columns, double* total) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x;
  double sum = 0;
  if (i < columns) each_chunk(chunks, [&](unsigned b) { sum += partial[b * columns + i]; });
  rows[threadIdx.y * kMergeColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= columns) return;
  for (unsigned r = 1; r < kMergeRows; ++r) sum += rows[r * kMergeColumns + threadIdx.x];
  total[i] = sum;
}

// Chan's rule.
struct Moments {
  double values, mean, squares;
  __device__ void add(const Moments& m) {
    const double both = values + m.values, delta = m.mean - mean;
    mean += delta * m.values / both;
    squares += m.squares + delta * delta * values * m.values / both;
    values = both;
  }
};

// partial: (chunks, 3, c)
template <typename A>
__global__ void merge_moments_kernel(const A* partial, Chunks chunks, unsigned c, A* mean, A* var) {
  FUSED_INPAINT_SHARED(Moments, rows, kMergeColumns * kMergeRows);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x;
  Moments sum{};
  if (i < c)
    each_chunk(chunks.n, [&](unsigned b) {
      const double size = chunks.end(b) - chunks.begin(b);
      const A* p = partial + b * 3 * c + i;
      const double missed = p[c] / size;
      sum.add({size, p[0] + missed, p[2 * c] - missed * p[c]});
    });
  rows[threadIdx.y * kMergeColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= c) return;
  for (unsigned r = 1; r < kMergeRows; ++r) sum.add(rows[r * kMergeColumns + threadIdx.x]);
  mean[i] = static_cast<A>(sum.mean);
  var[i] = static_cast<A>(sum.squares > 0 ? sum.squares / sum.values : 0);
}

template <typename T, int V, Activation kind>
__global__ void batch_norm_kernel(const T* conv, Map<acc_t<T>> out, const acc_t<T>* mean, const acc_t<T>* var,
                                  const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps, T* y) {
  using A = acc_t<T>;
  for (unsigned c = threadIdx.x * V; c < out.c; c += blockDim.x * V) {
    Pack<A, V> centre, gain, offset;
    for (int k = 0; k < V; ++k) {
      centre.v[k] = mean[c + k];
      gain.v[k] = weight[c + k] / std::sqrt(var[c + k] + eps);
      offset.v[k] = bias[c + k];
    }
    each_some<kForward>(out, [&](const Some<kForward, A>& some) {
      Pack<T, V> v[kForward] = {};
#pragma unroll
      for (int j = 0; j < kForward; ++j)
        if (some.ratio[j] != 0) v[j] = load_pack<V>(conv + some.pixel[j] * out.c + c);
#pragma unroll
      for (int j = 0; j < kForward; ++j) {
        Pack<T, V> result{};
        if (some.ratio[j] != 0)
          for (int k = 0; k < V; ++k) {
            const A a = (product(A(load(v[j].v[k])), some.ratio[j]) - centre.v[k]) * gain.v[k] + offset.v[k];
            store(&result.v[k], activate<kind>(a, out.slope));
          }
        if (some.pixel[j] < out.pixels) store_pack<V>(y + some.pixel[j] * out.c + c, result);
      }
    });
  }
}

// What the backward of the norm needs of a pack of channels.
template <typename A, int V>
struct Norm {
  Pack<A, V> mean, inverse, weight, bias;
  __device__ Norm(const A* mean_, const A* var, const A* weight_, const A* bias_, A eps, unsigned c) {
    for (int k = 0; k < V; ++k) {
      mean.v[k] = mean_[c + k];
      inverse.v[k] = A(1) / std::sqrt(var[c + k] + eps);
      weight.v[k] = weight_[c + k];
      bias.v[k] = bias_[c + k];
    }
  }
  __device__ A x_hat(A v, int k) const { return (v - mean.v[k]) * inverse.v[k]; }
  // The gradient g in front of the activation.
  template <Activation kind>
  __device__ A before(A g, A x_hat, int k, A slope) const {
    return through<kind>(g, x_hat * weight.v[k] + bias.v[k], slope);
  }
};

template <typename T, int V, Activation kind>
__global__ void norm_sums_kernel(const T* grad, const T* conv, Chunks chunks, Map<acc_t<T>> out, const acc_t<T>* mean,
                                 const acc_t<T>* var, const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps,
                                 acc_t<T>* partial) {
  using A = acc_t<T>;
  using Sums = Pack<A, V>;
  FUSED_INPAINT_SHARED(Sums, scratch, kThreads);
  const unsigned c = blockIdx.y * SumTile<V>::kChannels + threadIdx.x * V, end = chunks.end(blockIdx.x);
  A* of_chunk = partial + blockIdx.x * 2 * out.c;
  Sums sum{}, dot{};
  if (c < out.c) {
    const Norm<A, V> norm(mean, var, weight, bias, eps, c);
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += SumTile<V>::kRows) {
      const A ratio = out.ratio(pixel);
      if (ratio == 0) continue;
      const Pack<T, V> v = load_pack<V>(conv + pixel * out.c + c), d = load_pack<V>(grad + pixel * out.c + c);
      for (int k = 0; k < V; ++k) {
        const A x_hat = norm.x_hat(product(A(load(v.v[k])), ratio), k);
        const A g = norm.template before<kind>(load(d.v[k]), x_hat, k, out.slope);
        sum.v[k] += g;
        dot.v[k] += g * x_hat;
      }
    }
  }
  write_sums<V>(sum_rows<V>(sum, scratch), out.c, of_chunk);
  write_sums<V>(sum_rows<V>(dot, scratch), out.c, of_chunk + out.c);
}

template <typename T, int V, Activation kind>
__global__ void norm_gradient_kernel(const T* grad, const T* conv, Map<acc_t<T>> out, const acc_t<T>* mean,
                                     const acc_t<T>* var, const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps,
                                     const double* sums, T* grad_conv, T* grad_phases, PhaseMap at) {
  using A = acc_t<T>;
  for (unsigned c = threadIdx.x * V; c < out.c; c += blockDim.x * V) {
    const Norm<A, V> norm(mean, var, weight, bias, eps, c);
    Pack<A, V> mean_grad, mean_dot;
    for (int k = 0; k < V; ++k) {
      mean_grad.v[k] = static_cast<A>(sums[c + k] / out.pixels);
      mean_dot.v[k] = static_cast<A>(sums[out.c + c + k] / out.pixels);
    }
    each_some<kBackward>(out, [&](const Some<kBackward, A>& some) {
      Pack<T, V> v[kBackward] = {}, d[kBackward] = {};
#pragma unroll
      for (int j = 0; j < kBackward; ++j)
        if (some.ratio[j] != 0) {
          v[j] = load_pack<V>(conv + some.pixel[j] * out.c + c);
          d[j] = load_pack<V>(grad + some.pixel[j] * out.c + c);
        }
#pragma unroll
      for (int j = 0; j < kBackward; ++j) {
        const A ratio = some.ratio[j];
        Pack<T, V> result{};
        if (ratio != 0)
          for (int k = 0; k < V; ++k) {
            const A x_hat = norm.x_hat(product(A(load(v[j].v[k])), ratio), k);
            const A g = norm.template before<kind>(load(d[j].v[k]), x_hat, k, out.slope);
            store(&result.v[k],
                  (g - mean_grad.v[k] - x_hat * mean_dot.v[k]) * norm.inverse.v[k] * norm.weight.v[k] * ratio);
          }
        if (some.pixel[j] >= out.pixels) continue;
        store_pack<V>(grad_conv + some.pixel[j] * out.c + c, result);
        if (grad_phases) store_pack<V>(grad_phases + at(some.pixel[j]) + c, result);
      }
    });
  }
}

template <typename A>
__global__ void narrow_kernel(const double* sums, A* out, unsigned c) {
  for (unsigned i = global_thread(); i < c; i += all_threads()) store(out + i, static_cast<acc_t<A>>(sums[i]));
}

void narrow(const Tensor& sums, int64_t first, Tensor& out) {
  dispatch_cuda(out.scalar_type(), [&]<typename T>() {
    FUSED_INPAINT_LAUNCH(narrow_kernel<T>, blocks_for(out.numel()), dim3(kThreads), 0, current_stream(out),
                         data<double>(sums) + first, mutable_data<T>(out), index32(out.numel()));
  });
}

// Of partial sums (chunks, columns).
template <typename A>
Tensor merged(const Tensor& partial) {
  const unsigned columns = index32(partial.size(1));
  Tensor sums = empty({partial.size(1)}, ScalarType::Double, partial);
  FUSED_INPAINT_LAUNCH(merge_kernel<A>, merge_blocks(columns), merge_threads(), 0, current_stream(partial),
                       data<A>(partial), index32(partial.size(0)), columns, mutable_data<double>(sums));
  return sums;
}

// Where the phases are shifted, a border row and column of each belongs to no output pixel; channels that fill up to
// none either.
void clear_border(Tensor* phases, int64_t shift, const Output& out) {
  if (phases && (shift || phases->size(1) > 4 * out.c)) torch::stable::zero_(*phases);
}

}  // namespace

void epilogue(Tensor& y, bool y_holds_sum, const Tensor* phases, int64_t shift, const Output& out, const Tensor* scale,
              const Tensor* bias) {
  dispatch_cuda(y.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      with_pack<T>(out.c, {&y, phases}, [&]<int V>() {
        using A = acc_t<T>;
        const dim3 threads = pixel_threads(out.c / V);
        FUSED_INPAINT_LAUNCH((epilogue_kernel<T, V, kind>), pass_blocks<kForward>(out.pixels(), threads), threads, 0,
                             current_stream(y), mutable_data<T>(y), phases ? data<T>(*phases) : nullptr, y_holds_sum,
                             PhaseMap(out, phases, shift), Map<A>(out), given<A>(scale), given<A>(bias));
      });
    });
  });
}

void epilogue_backward(const Tensor& grad, const Tensor& y, const Output& out, const Tensor* scale, Tensor& grad_conv,
                       Tensor* grad_phases, int64_t shift, Tensor* grad_bias) {
  const Chunks chunks(out);
  clear_border(grad_phases, shift, out);
  Tensor partial = empty({chunks.n, out.c}, wide(grad.scalar_type()), grad);
  dispatch_cuda(grad.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    with_activation(out.activation, [&]<Activation kind>() {
      with_pack<T>(out.c, {&grad, &y, &grad_conv, grad_phases}, [&]<int V>() {
        FUSED_INPAINT_LAUNCH((epilogue_backward_kernel<T, V, kind>), sum_blocks<V>(chunks, out.c), sum_threads<V>(), 0,
                             current_stream(grad), data<T>(grad), data<T>(y), chunks, Map<A>(out), given<A>(scale),
                             mutable_data<T>(grad_conv), grad_phases ? mutable_data<T>(*grad_phases) : nullptr,
                             PhaseMap(out, grad_phases, shift), mutable_data<A>(partial));
      });
    });
    if (grad_bias) narrow(merged<A>(partial), 0, *grad_bias);
  });
}

void batch_statistics(Tensor& conv, bool conv_holds_sum, const Tensor* phases, int64_t shift, const Output& out,
                      Tensor& mean, Tensor& var) {
  const Chunks chunks(out);
  Tensor partial = empty({chunks.n, 3 * out.c}, mean.scalar_type(), conv);
  dispatch_cuda(conv.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    with_pack<T>(out.c, {&conv, phases}, [&]<int V>() {
      FUSED_INPAINT_LAUNCH((moments_kernel<T, V>), sum_blocks<V>(chunks, out.c), sum_threads<V>(), 0,
                           current_stream(conv), mutable_data<T>(conv), conv_holds_sum,
                           phases ? data<T>(*phases) : nullptr, PhaseMap(out, phases, shift), chunks, Map<A>(out),
                           mutable_data<A>(partial));
    });
    const unsigned c = index32(out.c);
    FUSED_INPAINT_LAUNCH(merge_moments_kernel<A>, merge_blocks(c), merge_threads(), 0, current_stream(conv),
                         data<A>(partial), chunks, c, mutable_data<A>(mean), mutable_data<A>(var));
  });
}

void batch_norm(const Tensor& conv, const Output& out, const Tensor& mean, const Tensor& var, const Tensor& weight,
                const Tensor& bias, double eps, Tensor& y) {
  dispatch_cuda(conv.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      with_pack<T>(out.c, {&conv, &y}, [&]<int V>() {
        using A = acc_t<T>;
        const dim3 threads = pixel_threads(out.c / V);
        FUSED_INPAINT_LAUNCH((batch_norm_kernel<T, V, kind>), pass_blocks<kForward>(out.pixels(), threads), threads, 0,
                             current_stream(y), data<T>(conv), Map<A>(out), parameters<A>(mean), parameters<A>(var),
                             parameters<A>(weight), parameters<A>(bias), static_cast<A>(eps), mutable_data<T>(y));
      });
    });
  });
}

void batch_norm_backward(const Tensor& grad, const Tensor& conv, const Output& out, const Tensor& mean,
                         const Tensor& var, const Tensor& weight, const Tensor& bias, double eps, Tensor& grad_conv,
                         Tensor* grad_phases, int64_t shift, Tensor& grad_weight, Tensor& grad_bias) {
  const Chunks chunks(out);
  clear_border(grad_phases, shift, out);
  Tensor partial = empty({chunks.n, 2 * out.c}, mean.scalar_type(), grad);
  std::optional<Tensor> sums;
  dispatch_cuda(conv.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      with_pack<T>(out.c, {&grad, &conv, &grad_conv, grad_phases}, [&]<int V>() {
        using A = acc_t<T>;
        FUSED_INPAINT_LAUNCH((norm_sums_kernel<T, V, kind>), sum_blocks<V>(chunks, out.c), sum_threads<V>(), 0,
                             current_stream(grad), data<T>(grad), data<T>(conv), chunks, Map<A>(out),
                             parameters<A>(mean), parameters<A>(var), parameters<A>(weight), parameters<A>(bias),
                             static_cast<A>(eps), mutable_data<A>(partial));
        sums = merged<A>(partial);
        const dim3 threads = pixel_threads(out.c / V);
        FUSED_INPAINT_LAUNCH((norm_gradient_kernel<T, V, kind>), pass_blocks<kBackward>(out.pixels(), threads), threads,
                             0, current_stream(grad), data<T>(grad), data<T>(conv), Map<A>(out), parameters<A>(mean),
                             parameters<A>(var), parameters<A>(weight), parameters<A>(bias), static_cast<A>(eps),
                             data<double>(*sums), mutable_data<T>(grad_conv),
                             grad_phases ? mutable_data<T>(*grad_phases) : nullptr, PhaseMap(out, grad_phases, shift));
      });
    });
  });
  narrow(*sums, 0, grad_bias);
  narrow(*sums, out.c, grad_weight);
}

}  // namespace fused_inpaint::cuda
