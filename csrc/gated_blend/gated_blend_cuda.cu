// SPDX-License-Identifier: Apache-2.0
// The gated blend on the GPU. A thread keeps what belongs to its channels, 16 bytes of them where they divide, and
// walks pixels of one sample that lie near each other. Reductions run over chunks of pixels (common/reduce.cuh).
#define FUSED_INPAINT_DEVICE cuda
#include "common/reduce.cuh"
#include "gated_blend/gated_blend.h"

namespace fused_inpaint::cuda {
namespace {

Chunks tile_chunks(const Shape& shape) { return tile_chunks(shape.pixels, shape.n); }

// The columns of z for V channels from c on.
template <typename A, int V>
struct Columns {
  Pack<A, V> centre, gain, offset;

  // statistics (N, 3, C)
  __device__ Columns(const A* statistics, unsigned sample, unsigned channels, unsigned c) {
    const A* of_sample = statistics + sample * kStatistics * channels + c;
    centre = load_pack<V>(of_sample + kMean * channels);
    const Pack<A, V> rest = load_pack<V>(of_sample + kRest * channels), std = load_pack<V>(of_sample + kStd * channels);
    for (int i = 0; i < V; ++i) {
      gain.v[i] = gain_of(std.v[i]);
      offset.v[i] = offset_of(rest.v[i], gain.v[i]);
    }
  }
  __device__ Gate<A> gate(A apart, int i) const { return Gate<A>(apart * gain.v[i] + offset.v[i]); }
};

// partial: (chunks, 4, C), the parts of Moments
template <typename T, int V>
__global__ void gate_moments_kernel(const T* gate, unsigned channels, Chunks chunks, acc_t<T>* partial) {
  using A = acc_t<T>;
  using M = Moments<A, V>;
  FUSED_INPAINT_SHARED(M, scratch, kThreads / 2);
  const unsigned c = blockIdx.y * Tile<V>::kChannels + threadIdx.x * V, end = chunks.end(blockIdx.x);
  M m = {};
  if (c < channels)
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += Tile<V>::kRows) {
      const Pack<T, V> v = load_pack<V>(gate + pixel * channels + c);
      for (int i = 0; i < V; ++i) add(m, i, A(load(v.v[i])));
    }
  finish(m);
  join_rows<V>(m, scratch, [](M& mine, const M& other) { join(mine, other); });
  if (threadIdx.y > 0 || c >= channels) return;
  A* to = partial + size_t{blockIdx.x} * 4 * channels + c;
  store_pack<V>(to, m.n);
  store_pack<V>(to + channels, m.base);
  store_pack<V>(to + 2 * channels, m.mean);
  store_pack<V>(to + 3 * channels, m.m2);
}

template <typename A>
__global__ void merge_gate_moments_kernel(const A* partial, Chunks chunks, unsigned columns, unsigned channels,
                                          A* statistics) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x, sample = i / channels, c = i % channels;
  const bool active = i < columns;
  const A* of_sample = partial + size_t{sample} * chunks.per_group * 4 * channels + c;
  const MergedMoments m = merged_moments(chunks.per_group, active, rows, [&](unsigned b, unsigned which) {
    return static_cast<double>(of_sample[(size_t{b} * 4 + which) * channels]);
  });
  if (!active || threadIdx.y > 0) return;
  A* to = statistics + sample * kStatistics * channels + c;
  const A mean = static_cast<A>(m.mean);
  to[kMean * channels] = mean;
  to[kRest * channels] = static_cast<A>(m.mean - static_cast<double>(mean));
  to[kStd * channels] = static_cast<A>(sqrt(m.m2 / (m.n > 1 ? m.n - 1 : 1)));
}

template <typename T, int V>
__global__ void blend_kernel(const T* x, const T* f, const T* gate, const acc_t<T>* statistics, unsigned channels,
                             Chunks chunks, T* y) {
  using A = acc_t<T>;
  const unsigned end = chunks.end(blockIdx.x);
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    const Columns<A, V> columns(statistics, chunks.group(blockIdx.x), channels, c);
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += blockDim.y) {
      const unsigned at = pixel * channels + c;
      const Pack<T, V> a = load_pack<V>(x + at), b = load_pack<V>(f + at), v = load_pack<V>(gate + at);
      Pack<T, V> result;
      for (int i = 0; i < V; ++i) {
        const Gate<A> g = columns.gate(load(v.v[i]) - columns.centre.v[i], i);
        store(&result.v[i], load(a.v[i]) * g.shut + load(b.v[i]) * g.open);
      }
      store_pack<V>(y + at, result);
    }
  }
}

template <typename A, int V>
struct Sums {
  Pack<A, V> sum, dot;
};

template <typename A, int V>
__device__ void join(Sums<A, V>& s, const Sums<A, V>& other) {
  for (int i = 0; i < V; ++i) s.sum.v[i] += other.sum.v[i], s.dot.v[i] += other.dot.v[i];
}

// partial: (chunks, 2, C), the sums of p and of p * (gate - centre)
template <typename T, int V>
__global__ void gate_sums_kernel(const T* grad, const T* x, const T* f, const T* gate, const acc_t<T>* statistics,
                                 unsigned channels, Chunks chunks, acc_t<T>* partial) {
  using A = acc_t<T>;
  using S = Sums<A, V>;
  FUSED_INPAINT_SHARED(S, scratch, kThreads / 2);
  const unsigned c = blockIdx.y * Tile<V>::kChannels + threadIdx.x * V, end = chunks.end(blockIdx.x);
  S s = {};
  if (c < channels) {
    const Columns<A, V> columns(statistics, chunks.group(blockIdx.x), channels, c);
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += Tile<V>::kRows) {
      const unsigned at = pixel * channels + c;
      const Pack<T, V> d = load_pack<V>(grad + at), a = load_pack<V>(x + at), b = load_pack<V>(f + at),
                       v = load_pack<V>(gate + at);
      for (int i = 0; i < V; ++i) {
        const A apart = load(v.v[i]) - columns.centre.v[i];
        const Gate<A> g = columns.gate(apart, i);
        const A p = product(A(load(d.v[i]) * (load(b.v[i]) - load(a.v[i]))), g.open * g.shut);
        s.sum.v[i] += p;
        s.dot.v[i] += p * apart;
      }
    }
  }
  join_rows<V>(s, scratch, [](S& mine, const S& other) { join(mine, other); });
  if (threadIdx.y > 0 || c >= channels) return;
  A* to = partial + size_t{blockIdx.x} * 2 * channels + c;
  store_pack<V>(to, s.sum);
  store_pack<V>(to + channels, s.dot);
}

// columns (N, 2, C): pull and slant
template <typename A>
__global__ void merge_gate_sums_kernel(const A* partial, Chunks chunks, unsigned n, unsigned channels,
                                       const A* statistics, A* columns) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x, sample = i / channels, c = i % channels;
  const bool active = i < n;
  const A* of_sample = partial + size_t{sample} * chunks.per_group * 2 * channels + c;
  const auto part = [&](unsigned b, unsigned which) {
    return static_cast<double>(of_sample[(size_t{b} * 2 + which) * channels]);
  };
  const double sum = merged(chunks.per_group, active, rows, [&](unsigned b) { return part(b, 0); });
  const double dot = merged(chunks.per_group, active, rows, [&](unsigned b) { return part(b, 1); });
  if (!active || threadIdx.y > 0) return;
  const A* known = statistics + sample * kStatistics * channels + c;
  const GradientColumns g(sum, dot, known[kRest * channels], known[kStd * channels], chunks.pixels);
  A* to = columns + sample * kGradient * channels + c;
  to[0] = static_cast<A>(g.pull);
  to[channels] = static_cast<A>(g.slant);
}

// Null where a gradient is not needed; gradient_columns with grad_gate.
template <typename T, int V>
__global__ void gate_gradient_kernel(const T* grad, const T* x, const T* f, const T* gate, const acc_t<T>* statistics,
                                     const acc_t<T>* gradient_columns, unsigned channels, Chunks chunks, T* grad_x,
                                     T* grad_f, T* grad_gate) {
  using A = acc_t<T>;
  const unsigned sample = chunks.group(blockIdx.x), end = chunks.end(blockIdx.x);
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    const Columns<A, V> columns(statistics, sample, channels, c);
    Pack<A, V> pull = {}, slant = {};
    if (grad_gate) {
      pull = load_pack<V>(gradient_columns + sample * kGradient * channels + c);
      slant = load_pack<V>(gradient_columns + (sample * kGradient + 1) * channels + c);
    }
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += blockDim.y) {
      const unsigned at = pixel * channels + c;
      const Pack<T, V> d = load_pack<V>(grad + at), v = load_pack<V>(gate + at);
      Pack<A, V> slope;
      Pack<T, V> to_x, to_f;
      for (int i = 0; i < V; ++i) {
        const Gate<A> g = columns.gate(load(v.v[i]) - columns.centre.v[i], i);
        store(&to_x.v[i], load(d.v[i]) * g.shut);
        store(&to_f.v[i], load(d.v[i]) * g.open);
        slope.v[i] = g.open * g.shut;
      }
      if (grad_x) store_pack<V>(grad_x + at, to_x);
      if (grad_f) store_pack<V>(grad_f + at, to_f);
      if (!grad_gate) continue;
      const Pack<T, V> a = load_pack<V>(x + at), b = load_pack<V>(f + at);
      Pack<T, V> to_gate;
      for (int i = 0; i < V; ++i) {
        const A p = product(A(load(d.v[i]) * (load(b.v[i]) - load(a.v[i]))), slope.v[i]);
        const A slanted = (load(v.v[i]) - columns.centre.v[i]) * slant.v[i];
        store(&to_gate.v[i], (p - pull.v[i] - slanted) * columns.gain.v[i]);
      }
      store_pack<V>(grad_gate + at, to_gate);
    }
  }
}

// Calls body.template operator()<T, V>().
template <typename F>
void dispatch(std::initializer_list<const Tensor*> maps, F&& body) {
  const Tensor& x = **maps.begin();
  dispatch_cuda(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(x.size(1), maps, [&]<int V>() { body.template operator()<T, V>(); });
  });
}

void statistics_of(const Tensor& gate, Tensor& statistics) {
  const Shape shape(gate);
  const unsigned channels = index32(shape.c), columns = index32(shape.n * shape.c);
  index32(gate.numel());
  const Chunks chunks = tile_chunks(shape);
  Tensor partial = empty({chunks.n, 4, shape.c}, wide_type(gate), gate);
  dispatch({&gate}, [&]<typename T, int V>() {
    using A = acc_t<T>;
    FUSED_INPAINT_LAUNCH((gate_moments_kernel<T, V>), dim3(chunks.n, tiles<V>(channels)), tile_threads<V>(), 0,
                         current_stream(gate), data<T>(gate), channels, chunks, mutable_data<A>(partial));
    FUSED_INPAINT_LAUNCH(merge_gate_moments_kernel<A>, merge_blocks(columns), merge_threads(), 0, current_stream(gate),
                         data<A>(partial), chunks, columns, channels, mutable_data<A>(statistics));
  });
}

void blend(const Tensor& x, const Tensor& f, const Tensor& gate, const Tensor& statistics, Tensor& y) {
  const Shape shape(x);
  const unsigned channels = index32(shape.c);
  dispatch({&x, &f, &gate, &y}, [&]<typename T, int V>() {
    using A = acc_t<T>;
    const dim3 threads = pixel_threads(channels / V);
    const Chunks chunks = pass_chunks(shape.pixels, shape.n, threads);
    FUSED_INPAINT_LAUNCH((blend_kernel<T, V>), dim3(chunks.n), threads, 0, current_stream(x), data<T>(x), data<T>(f),
                         data<T>(gate), data<A>(statistics), channels, chunks, mutable_data<T>(y));
  });
}

void gradients(const Tensor& grad, const Tensor& x, const Tensor& f, const Tensor& gate, const Tensor& statistics,
               Tensor* grad_x, Tensor* grad_f, Tensor* grad_gate) {
  const Shape shape(x);
  const unsigned channels = index32(shape.c), n = index32(shape.n * shape.c);
  index32(x.numel());
  const Chunks of_sums = tile_chunks(shape);
  Tensor partial = empty({grad_gate ? of_sums.n : 0, 2, shape.c}, wide_type(x), x);
  Tensor columns = empty({grad_gate ? shape.n : 0, kGradient, shape.c}, wide_type(x), x);
  dispatch({&grad, &x, &f, &gate, grad_x, grad_f, grad_gate}, [&]<typename T, int V>() {
    using A = acc_t<T>;
    const auto pointer = [](Tensor* t) { return t ? mutable_data<T>(*t) : nullptr; };
    if (grad_gate) {
      FUSED_INPAINT_LAUNCH((gate_sums_kernel<T, V>), dim3(of_sums.n, tiles<V>(channels)), tile_threads<V>(), 0,
                           current_stream(x), data<T>(grad), data<T>(x), data<T>(f), data<T>(gate), data<A>(statistics),
                           channels, of_sums, mutable_data<A>(partial));
      FUSED_INPAINT_LAUNCH(merge_gate_sums_kernel<A>, merge_blocks(n), merge_threads(), 0, current_stream(x),
                           data<A>(partial), of_sums, n, channels, data<A>(statistics), mutable_data<A>(columns));
    }
    const dim3 threads = pixel_threads(channels / V);
    const Chunks chunks = pass_chunks(shape.pixels, shape.n, threads);
    FUSED_INPAINT_LAUNCH((gate_gradient_kernel<T, V>), dim3(chunks.n), threads, 0, current_stream(x), data<T>(grad),
                         data<T>(x), data<T>(f), data<T>(gate), data<A>(statistics), data<A>(columns), channels, chunks,
                         pointer(grad_x), pointer(grad_f), pointer(grad_gate));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("gated_blend", TORCH_BOX(&gated_blend));
  m.impl("gated_blend_backward", TORCH_BOX(&gated_blend_backward));
}

}  // namespace fused_inpaint::cuda
