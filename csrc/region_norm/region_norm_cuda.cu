// SPDX-License-Identifier: Apache-2.0
// Region normalization on the GPU. A thread keeps its channels, 16 bytes of them where they divide, and walks pixels
// that lie near each other, so that what belongs to their region is loaded again only where the region changes.
// Reductions run over chunks of pixels fixed by the shape, each in one block, and are merged in their order.
#define FUSED_INPAINT_DEVICE cuda
#include <cmath>

#include "common/reduce.cuh"
#include "region_norm/region_norm_host.h"

namespace fused_inpaint::cuda {
namespace {

// Regions and Point, in 32 bits and in the accumulator's type.
template <typename A>
struct Map {
  unsigned pixels, c, plane;
  const uint8_t* mask;
  bool shared;
  Activation activation;
  A slope;
  const A *scales, *shifts;  // of each pixel, or null

  explicit Map(const Regions& r)
      : pixels(index32(r.pixels())),
        c(index32(r.c)),
        plane(index32(r.plane())),
        mask(r.mask),
        shared(r.mask_is_shared()),
        activation(Activation::none),
        slope(0),
        scales(nullptr),
        shifts(nullptr) {
    index32(r.pixels() * r.c);
  }
  Map(const Regions& r, const Point& point) : Map(r) {
    activation = point.activation;
    slope = static_cast<A>(point.slope);
    if (point.scale) scales = data<A>(*point.scale), shifts = data<A>(*point.shift);
  }
  __device__ unsigned mask_pixel(unsigned pixel) const { return shared ? pixel % plane : pixel; }
  __device__ A scale(unsigned pixel) const { return scales ? scales[pixel] : A(1); }
  __device__ A shift(unsigned pixel) const { return shifts ? shifts[pixel] : A(0); }
  __device__ A activated(A v) const {
    if (activation == Activation::relu) return activate<Activation::relu>(v, slope);
    if (activation == Activation::leaky_relu) return activate<Activation::leaky_relu>(v, slope);
    return v;
  }
  __device__ A before(A g, A v) const {
    if (activation == Activation::relu) return through<Activation::relu>(g, v, slope);
    if (activation == Activation::leaky_relu) return through<Activation::leaky_relu>(g, v, slope);
    return g;
  }
};

// What a pixel's region (or with a mask for each channel, each channel's) says of V channels in the first K columns of
// the group's table.
template <int K, int V, bool per_channel, typename A>
struct Seen {
  Pack<A, V> columns[K] = {};
  Pack<uint8_t, V> valid{};  // with a mask for each channel
  int region = -1;

  template <typename M>
  __device__ void look(const M& map, const A* table, unsigned c, unsigned pixel) {
    const unsigned at = map.mask_pixel(pixel);
    if constexpr (per_channel) {
      valid = load_pack<V>(map.mask + at * map.c + c);
      for (int k = 0; k < K; ++k) {
        const A* column = table + k * 2 * map.c + c;
        const Pack<A, V> both[2] = {load_pack<V>(column), load_pack<V>(column + map.c)};
        for (int i = 0; i < V; ++i) columns[k].v[i] = valid.v[i] ? both[1].v[i] : both[0].v[i];
      }
    } else {
      const int here = map.mask[at] != 0;
      if (here == region) return;
      region = here;
      for (int k = 0; k < K; ++k) columns[k] = load_pack<V>(table + (k * 2 + region) * map.c + c);
    }
  }
  __device__ bool in(int r, int i) const { return per_channel ? (valid.v[i] != 0) == (r != 0) : region == r; }
  __device__ A apart(A x, int i) const { return x - columns[kCentre].v[i]; }
  // u of region_norm.h
  __device__ A normalized(A apart, int i) const { return apart * columns[kGain].v[i] + columns[kOffset].v[i]; }
};

template <typename A>
__global__ void tabulate_kernel(Statistics<A> statistics, unsigned n, A* table) {
  for (unsigned i = global_thread(); i < n; i += all_threads()) statistics.tabulate(i, table);
}

template <typename A>
Tensor tabulated(const Tensor& mean, const Tensor& invstd, const Tensor* means, const Point& point) {
  const Statistics<A> s = statistics<A>(mean, invstd, means, point);
  Tensor table = empty({s.numel() * s.columns()}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float, mean);
  FUSED_INPAINT_LAUNCH(tabulate_kernel<A>, blocks_for(s.numel()), dim3(kThreads), 0, current_stream(mean), s,
                       index32(s.numel()), mutable_data<A>(table));
  return table;
}

Chunks pass_chunks(const Regions& r, dim3 threads) { return pass_chunks(r.pixels() / r.groups, r.groups, threads); }
Chunks tile_chunks(const Regions& r) { return tile_chunks(r.pixels() / r.groups, r.groups); }

template <typename T, int V, bool per_channel>
__global__ void normalize_kernel(const T* x, Map<acc_t<T>> map, Chunks chunks, const acc_t<T>* table, T* y) {
  using A = acc_t<T>;
  const A* of_group = table + chunks.group(blockIdx.x) * kForward * 2 * map.c;
  const unsigned end = chunks.end(blockIdx.x);
  for (unsigned c = threadIdx.x * V; c < map.c; c += blockDim.x * V) {
    Seen<kForward, V, per_channel, A> seen;
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += blockDim.y) {
      seen.look(map, of_group, c, pixel);
      const A scale = map.scale(pixel), shift = map.shift(pixel);
      const Pack<T, V> v = load_pack<V>(x + pixel * map.c + c);
      Pack<T, V> result;
      for (int i = 0; i < V; ++i) {
        const A u = seen.normalized(seen.apart(load(v.v[i]), i), i);
        store(&result.v[i], map.activated(u * scale + shift));
      }
      store_pack<V>(y + pixel * map.c + c, result);
    }
  }
}

template <typename T, int V, bool per_channel>
__global__ void gradient_kernel(const T* grad, const T* x, Map<acc_t<T>> map, Chunks chunks, const acc_t<T>* table,
                                T* grad_x) {
  using A = acc_t<T>;
  const A* of_group = table + chunks.group(blockIdx.x) * kBackward * 2 * map.c;
  const unsigned end = chunks.end(blockIdx.x);
  for (unsigned c = threadIdx.x * V; c < map.c; c += blockDim.x * V) {
    Seen<kBackward, V, per_channel, A> seen;
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += blockDim.y) {
      seen.look(map, of_group, c, pixel);
      const A scale = map.scale(pixel), shift = map.shift(pixel);
      const Pack<T, V> d = load_pack<V>(grad + pixel * map.c + c), v = load_pack<V>(x + pixel * map.c + c);
      Pack<T, V> result;
      for (int i = 0; i < V; ++i) {
        const A apart = seen.apart(load(v.v[i]), i);
        const A g = product(map.before(load(d.v[i]), seen.normalized(apart, i) * scale + shift), scale);
        const A slanted = apart * seen.columns[kSlant].v[i];
        store(&result.v[i], (g - seen.columns[kPull].v[i] - slanted) * seen.columns[kGain].v[i]);
      }
      store_pack<V>(grad_x + pixel * map.c + c, result);
    }
  }
}

// partial: (chunks, 4, 2, C), the parts of Moments
template <typename T, int V, bool per_channel>
__global__ void moments_kernel(const T* x, Map<acc_t<T>> map, Chunks chunks, acc_t<T>* partial) {
  using A = acc_t<T>;
  using M = Moments<A, V>;
  FUSED_INPAINT_SHARED(M, scratch, kThreads / 2);
  const unsigned c = blockIdx.y * Tile<V>::kChannels + threadIdx.x * V, end = chunks.end(blockIdx.x);
  M of[2] = {};
  if (c < map.c)
    for (unsigned pixel = chunks.begin(blockIdx.x) + threadIdx.y; pixel < end; pixel += Tile<V>::kRows) {
      const unsigned at = map.mask_pixel(pixel);
      const Pack<T, V> v = load_pack<V>(x + pixel * map.c + c);
      if constexpr (per_channel) {
        const Pack<uint8_t, V> valid = load_pack<V>(map.mask + at * map.c + c);
        for (int i = 0; i < V; ++i) valid.v[i] ? add(of[1], i, A(load(v.v[i]))) : add(of[0], i, A(load(v.v[i])));
      } else if (map.mask[at]) {
        for (int i = 0; i < V; ++i) add(of[1], i, A(load(v.v[i])));
      } else {
        for (int i = 0; i < V; ++i) add(of[0], i, A(load(v.v[i])));
      }
    }
  const auto write = [&](M& m, unsigned r) {
    finish(m);
    join_rows<V>(m, scratch, [](M& mine, const M& other) { join(mine, other); });
    if (threadIdx.y > 0 || c >= map.c) return;
    A* to = partial + size_t{blockIdx.x} * 8 * map.c + r * map.c + c;
    store_pack<V>(to, m.n);
    store_pack<V>(to + 2 * map.c, m.base);
    store_pack<V>(to + 4 * map.c, m.mean);
    store_pack<V>(to + 6 * map.c, m.m2);
  };
  // Apart, so that no index is a variable, which would put the sums into memory.
  write(of[0], 0);
  write(of[1], 1);
}

template <typename A>
__global__ void merge_moments_kernel(const A* partial, Chunks chunks, unsigned columns, unsigned c, unsigned mask_c,
                                     double* count, double* mean, double* m2) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x, both = 2 * c, group = i / both;
  const bool active = i < columns;
  const A* of_group = partial + size_t{group} * chunks.per_group * 4 * both + i % both;
  const auto part = [&](unsigned b, unsigned which) {
    return static_cast<double>(of_group[(size_t{b} * 4 + which) * both]);
  };
  const MergedMoments m = merged_moments(chunks.per_group, active, rows, part);
  if (!active || threadIdx.y > 0) return;
  mean[i] = m.mean;
  m2[i] = m.m2;
  const unsigned channel = i % c;
  if (channel < mask_c) count[i / c * mask_c + channel] = m.n;
}

template <typename A, int V>
struct Sums {
  Pack<A, V> sum, dot;
};

template <int V, typename A>
__device__ A sum_packs(A v) {
  for (int bits = Tile<V>::kPacks / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
  return v;
}

// partial: (chunks, 2, 2, C), the sums of g * s and of g * s * (x - centre). map_partial: (tiles, 2, pixels), those of
// g * x_hat and of g over a tile's channels, if there are maps. K: columns of the table that are needed.
template <typename T, int V, int K, bool per_channel>
__global__ void sums_kernel(const T* grad, const T* x, Map<acc_t<T>> map, Chunks chunks, const acc_t<T>* table,
                            acc_t<T>* partial, acc_t<T>* map_partial) {
  using A = acc_t<T>;
  using S = Sums<A, V>;
  FUSED_INPAINT_SHARED(S, scratch, kThreads / 2);
  const A* of_group = table + chunks.group(blockIdx.x) * kForward * 2 * map.c;
  const unsigned c = blockIdx.y * Tile<V>::kChannels + threadIdx.x * V, end = chunks.end(blockIdx.x);
  S of[2] = {};
  Seen<K, V, per_channel, A> seen;
  // All threads take all steps, since the packs of a pixel add up.
  for (unsigned first = chunks.begin(blockIdx.x); first < end; first += Tile<V>::kRows) {
    const unsigned pixel = first + threadIdx.y;
    A scale_sum = 0, shift_sum = 0;
    if (pixel < end && c < map.c) {
      seen.look(map, of_group, c, pixel);
      const A scale = map.scale(pixel), shift = map.shift(pixel);
      const Pack<T, V> d = load_pack<V>(grad + pixel * map.c + c), v = load_pack<V>(x + pixel * map.c + c);
      S here;
      for (int i = 0; i < V; ++i) {
        const A apart = seen.apart(load(v.v[i]), i);
        A g = load(d.v[i]);
        if constexpr (K > kGain) {
          const A u = seen.normalized(apart, i);
          g = map.before(g, u * scale + shift);
          scale_sum += g * u;
          shift_sum += g;
        }
        here.sum.v[i] = product(g, scale);
        here.dot.v[i] = here.sum.v[i] * apart;
      }
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < V; ++i)
          if (seen.in(r, i)) of[r].sum.v[i] += here.sum.v[i], of[r].dot.v[i] += here.dot.v[i];
    }
    if constexpr (K > kGain)
      if (map_partial) {
        scale_sum = sum_packs<V>(scale_sum);
        shift_sum = sum_packs<V>(shift_sum);
        if (threadIdx.x == 0 && pixel < end) {
          map_partial[size_t{blockIdx.y} * 2 * map.pixels + pixel] = scale_sum;
          map_partial[(size_t{blockIdx.y} * 2 + 1) * map.pixels + pixel] = shift_sum;
        }
      }
  }
  const auto write = [&](S& sums, unsigned r) {
    join_rows<V>(sums, scratch, [](S& mine, const S& other) {
      for (int i = 0; i < V; ++i) mine.sum.v[i] += other.sum.v[i], mine.dot.v[i] += other.dot.v[i];
    });
    if (threadIdx.y > 0 || c >= map.c) return;
    A* to = partial + size_t{blockIdx.x} * 4 * map.c + r * map.c + c;
    store_pack<V>(to, sums.sum);
    store_pack<V>(to + 2 * map.c, sums.dot);
  };
  write(of[0], 0);
  write(of[1], 1);
}

// sums: (G, 2, 2, C)
template <typename A>
__global__ void merge_sums_kernel(const A* partial, Chunks chunks, unsigned columns, Statistics<A> statistics,
                                  double* sums) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned both = 2 * static_cast<unsigned>(statistics.c);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x, group = i / both;
  const bool active = i < columns;
  const A* of_group = partial + size_t{group} * chunks.per_group * 2 * both + i % both;
  const auto part = [&](unsigned b, unsigned which) {
    return static_cast<double>(of_group[(size_t{b} * 2 + which) * both]);
  };
  const double sum = merged(chunks.per_group, active, rows, [&](unsigned b) { return part(b, 0); });
  const double dot = merged(chunks.per_group, active, rows, [&](unsigned b) { return part(b, 1); });
  if (!active || threadIdx.y > 0) return;
  double* to = sums + size_t{group} * 2 * both + i % both;
  to[0] = sum;
  to[both] = statistics.dot(i, sum, dot);
}

// partial: (tiles, 2, pixels)
template <typename A>
__global__ void merge_maps_kernel(const A* partial, unsigned tiles, unsigned pixels, A* grad_scale, A* grad_shift) {
  for (unsigned pixel = global_thread(); pixel < pixels; pixel += all_threads()) {
    A scale = 0, shift = 0;
    for (unsigned t = 0; t < tiles; ++t) {
      scale += partial[size_t{t} * 2 * pixels + pixel];
      shift += partial[(size_t{t} * 2 + 1) * pixels + pixel];
    }
    grad_scale[pixel] = scale;
    grad_shift[pixel] = shift;
  }
}

// Threads x share a pixel's channels: a power of two of them, within a warp.
dim3 pool_threads(int64_t packs) {
  unsigned lanes = 1;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

struct Pool {
  unsigned pixels, c, plane;
  explicit Pool(const Tensor& x)
      : pixels(index32(x.size(0) * x.size(2) * x.size(3))),
        c(index32(x.size(1))),
        plane(index32(x.size(2) * x.size(3))) {
    index32(x.numel());
  }
  // Of the mean; the maximum is a plane further.
  __device__ unsigned place(unsigned pixel) const { return pixel / plane * 2 * plane + pixel % plane; }
};

template <typename T, int V>
__global__ void pool_kernel(const T* x, Pool pool, T* pooled) {
  using A = acc_t<T>;
  // All threads take all steps, since lanes exchange what they have.
  for (unsigned first = blockIdx.x * blockDim.y; first < pool.pixels; first += all_pixels()) {
    const unsigned pixel = first + threadIdx.y;
    A sum = 0, most = -static_cast<A>(INFINITY);
    if (pixel < pool.pixels)
      for (unsigned c = threadIdx.x * V; c < pool.c; c += blockDim.x * V) {
        const Pack<T, V> v = load_pack<V>(x + pixel * pool.c + c);
        for (int i = 0; i < V; ++i) {
          sum += load(v.v[i]);
          most = larger(most, A(load(v.v[i])));
        }
      }
    for (int bits = blockDim.x / 2; bits > 0; bits /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, bits);
      most = larger(most, __shfl_xor_sync(0xffffffffu, most, bits));
    }
    if (threadIdx.x > 0 || pixel >= pool.pixels) continue;
    T* to = pooled + pool.place(pixel);
    store(to, sum / static_cast<A>(pool.c));
    store(to + pool.plane, most);
  }
}

template <typename T, int V>
__global__ void pool_backward_kernel(const T* grad, const T* x, const T* pooled, Pool pool, T* grad_x) {
  using A = acc_t<T>;
  for (unsigned first = blockIdx.x * blockDim.y; first < pool.pixels; first += all_pixels()) {
    const unsigned pixel = first + threadIdx.y;
    unsigned found = pool.c;
    A each = 0, to_most = 0;
    if (pixel < pool.pixels) {
      const unsigned at = pool.place(pixel);
      const A most = load(pooled[at + pool.plane]);
      each = load(grad[at]) / static_cast<A>(pool.c);
      to_most = each + load(grad[at + pool.plane]);
      for (unsigned c = threadIdx.x * V; c < pool.c && found == pool.c; c += blockDim.x * V) {
        const Pack<T, V> v = load_pack<V>(x + pixel * pool.c + c);
        for (int i = V - 1; i >= 0; --i) {
          const A value = load(v.v[i]);
          // A NaN is found as NaN.
          if (value == most || (value != value && most != most)) found = c + i;
        }
      }
    }
    for (int bits = blockDim.x / 2; bits > 0; bits /= 2) {
      const unsigned other = __shfl_xor_sync(0xffffffffu, found, bits);
      found = other < found ? other : found;
    }
    if (pixel >= pool.pixels) continue;
    for (unsigned c = threadIdx.x * V; c < pool.c; c += blockDim.x * V) {
      Pack<T, V> result;
      for (int i = 0; i < V; ++i) store(&result.v[i], c + i == found ? to_most : each);
      store_pack<V>(grad_x + pixel * pool.c + c, result);
    }
  }
}

// Calls body.template operator()<T, V, per_channel>().
template <typename F>
void dispatch(const Regions& regions, std::initializer_list<const Tensor*> maps, F&& body) {
  const bool per_channel = regions.mask_c > 1;
  const bool aligned = !per_channel || reinterpret_cast<uintptr_t>(regions.mask) % 16 == 0;
  dispatch_cuda((*maps.begin())->scalar_type(), [&]<typename T>() {
    with_pack<T>(aligned ? regions.c : 1, maps, [&]<int V>() {
      if (per_channel)
        body.template operator()<T, V, true>();
      else
        body.template operator()<T, V, false>();
    });
  });
}

void moments(const Tensor& x, const Regions& regions, Tensor& count, Tensor& mean, Tensor& m2) {
  const Chunks chunks = tile_chunks(regions);
  Tensor partial = empty({chunks.n, 4, 2, regions.c}, wide_type(x), x);
  dispatch(regions, {&x}, [&]<typename T, int V, bool per_channel>() {
    using A = acc_t<T>;
    FUSED_INPAINT_LAUNCH((moments_kernel<T, V, per_channel>), dim3(chunks.n, tiles<V>(regions.c)), tile_threads<V>(), 0,
                         current_stream(x), data<T>(x), Map<A>(regions), chunks, mutable_data<A>(partial));
    FUSED_INPAINT_LAUNCH(merge_moments_kernel<A>, merge_blocks(mean.numel()), merge_threads(), 0, current_stream(x),
                         data<A>(partial), chunks, index32(mean.numel()), index32(regions.c), index32(regions.mask_c),
                         mutable_data<double>(count), mutable_data<double>(mean), mutable_data<double>(m2));
  });
}

void normalize(const Tensor& x, const Regions& regions, const Tensor& mean, const Tensor& invstd, const Point& point,
               Tensor& y) {
  dispatch(regions, {&x, &y}, [&]<typename T, int V, bool per_channel>() {
    using A = acc_t<T>;
    const Tensor table = tabulated<A>(mean, invstd, nullptr, point);
    const dim3 threads = pixel_threads(regions.c / V);
    const Chunks chunks = pass_chunks(regions, threads);
    FUSED_INPAINT_LAUNCH((normalize_kernel<T, V, per_channel>), dim3(chunks.n), threads, 0, current_stream(x),
                         data<T>(x), Map<A>(regions, point), chunks, data<A>(table), mutable_data<T>(y));
  });
}

void gradient_sums(const Tensor& grad, const Tensor& x, const Regions& regions, const Tensor& mean,
                   const Tensor& invstd, const Point& point, Tensor& sums, Tensor& grad_scale, Tensor& grad_shift) {
  const Chunks chunks = tile_chunks(regions);
  const int64_t pixels = regions.pixels();
  Tensor partial = empty({chunks.n, 2, 2, regions.c}, wide_type(x), x);
  dispatch(regions, {&x, &grad}, [&]<typename T, int V, bool per_channel>() {
    using A = acc_t<T>;
    const Tensor table = tabulated<A>(mean, invstd, nullptr, point);
    const dim3 grid(chunks.n, tiles<V>(regions.c));
    Tensor map_partial = empty({point.scale ? grid.y : 0, 2, pixels}, wide_type(x), x);
    A* to_maps = point.scale ? mutable_data<A>(map_partial) : nullptr;
    const auto launch = [&]<int K>() {
      FUSED_INPAINT_LAUNCH((sums_kernel<T, V, K, per_channel>), grid, tile_threads<V>(), 0, current_stream(x),
                           data<T>(grad), data<T>(x), Map<A>(regions, point), chunks, data<A>(table),
                           mutable_data<A>(partial), to_maps);
    };
    if (point.scale || point.activation != Activation::none)
      launch.template operator()<kForward>();
    else
      launch.template operator()<kGain>();
    const Statistics<A> s = statistics<A>(mean, invstd, nullptr, point);
    FUSED_INPAINT_LAUNCH(merge_sums_kernel<A>, merge_blocks(s.numel()), merge_threads(), 0, current_stream(x),
                         data<A>(partial), chunks, index32(s.numel()), s, mutable_data<double>(sums));
    if (point.scale)
      FUSED_INPAINT_LAUNCH(merge_maps_kernel<A>, blocks_for(pixels), dim3(kThreads), 0, current_stream(x),
                           data<A>(map_partial), grid.y, index32(pixels), mutable_data<A>(grad_scale),
                           mutable_data<A>(grad_shift));
  });
}

void gradient(const Tensor& grad, const Tensor& x, const Regions& regions, const Tensor& mean, const Tensor& invstd,
              const Tensor& means, const Point& point, Tensor& grad_x) {
  dispatch(regions, {&x, &grad, &grad_x}, [&]<typename T, int V, bool per_channel>() {
    using A = acc_t<T>;
    const Tensor table = tabulated<A>(mean, invstd, &means, point);
    const dim3 threads = pixel_threads(regions.c / V);
    const Chunks chunks = pass_chunks(regions, threads);
    FUSED_INPAINT_LAUNCH((gradient_kernel<T, V, per_channel>), dim3(chunks.n), threads, 0, current_stream(x),
                         data<T>(grad), data<T>(x), Map<A>(regions, point), chunks, data<A>(table),
                         mutable_data<T>(grad_x));
  });
}

void pool(const Tensor& x, Tensor& pooled) {
  dispatch_cuda(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(x.size(1), {&x}, [&]<int V>() {
      const Pool shape(x);
      const dim3 threads = pool_threads(x.size(1) / V);
      FUSED_INPAINT_LAUNCH((pool_kernel<T, V>), pixel_blocks(shape.pixels, threads), threads, 0, current_stream(x),
                           data<T>(x), shape, mutable_data<T>(pooled));
    });
  });
}

void pool_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, Tensor& grad_x) {
  dispatch_cuda(x.scalar_type(), [&]<typename T>() {
    with_pack<T>(x.size(1), {&x, &grad_x}, [&]<int V>() {
      const Pool shape(x);
      const dim3 threads = pool_threads(x.size(1) / V);
      FUSED_INPAINT_LAUNCH((pool_backward_kernel<T, V>), pixel_blocks(shape.pixels, threads), threads, 0,
                           current_stream(x), data<T>(grad), data<T>(x), data<T>(pooled), shape,
                           mutable_data<T>(grad_x));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("region_moments", TORCH_BOX(&region_moments));
  m.impl("region_norm", TORCH_BOX(&region_norm));
  m.impl("region_norm_sums", TORCH_BOX(&region_norm_sums));
  m.impl("region_norm_gradient", TORCH_BOX(&region_norm_gradient));
  m.impl("channel_pool", TORCH_BOX(&channel_pool));
  m.impl("channel_pool_backward", TORCH_BOX(&channel_pool_backward));
}

}  // namespace fused_inpaint::cuda
