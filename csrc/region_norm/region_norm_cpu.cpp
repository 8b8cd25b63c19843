// SPDX-License-Identifier: Apache-2.0
// Region normalization on the CPU. Channels are the vectors' lanes. Where one mask serves all channels, pixels are
// taken in runs of one region; where each has its own, every element selects between the two. Reductions run over
// chunks of pixels fixed by the shape and are merged in order, so that the result does not depend on the number of
// threads.
#define FUSED_INPAINT_DEVICE cpu
#include <algorithm>
#include <limits>
#include <vector>

#include "common/chunks.h"
#include "region_norm/region_norm.h"

namespace fused_inpaint::cpu {

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

}  // namespace fused_inpaint::cpu

#include "region_norm/region_norm_host.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;

Chunks chunks_of(const Regions& r) { return Chunks(r.pixels() / r.groups, r.groups, r.c); }

// Runs body(chunk, scratch) for all, with as much scratch memory as a table takes.
template <typename A, typename F>
void for_chunks(const Chunks& chunks, int64_t channels, F&& body) {
  parallel_for(0, chunks.n, chunks.grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(kBackward * 2 * channels);
    for (int64_t b = begin; b < end; ++b) body(b, scratch.data());
  });
}

// Calls body.template operator()<flag>().
template <typename F>
void with_flag(bool flag, F&& body) {
  if (flag)
    body.template operator()<true>();
  else
    body.template operator()<false>();
}

// Steps through the runs of pixels of one region in [begin, last). With a mask for each channel a run is of both.
template <bool per_channel>
struct Run {
  const Regions& regions;
  int64_t begin, end, last, region = 0;
  const uint8_t* mask = nullptr;  // of pixel `begin`

  FUSED_INPAINT_INLINE Run(const Regions& r, int64_t first, int64_t last_)
      : regions(r), begin(first), end(first), last(last_) {}
  FUSED_INPAINT_INLINE bool next() {
    begin = end;
    if (begin == last) return false;
    mask = regions.mask_of(begin);
    // A shared mask ends with each sample.
    const int64_t stop =
        regions.mask_is_shared() ? std::min(last, begin + regions.plane() - begin % regions.plane()) : last;
    if constexpr (per_channel) {
      end = stop;
    } else {
      region = mask[0] != 0;
      for (end = begin + 1; end < stop && (mask[end - begin] != 0) == (region != 0);) ++end;
    }
    return true;
  }
  FUSED_INPAINT_INLINE const uint8_t* mask_of(int64_t pixel) const {
    return mask + (pixel - begin) * (per_channel ? regions.c : 1);
  }
  // Where the run's region begins in (2, C), or both do.
  template <typename V>
  FUSED_INPAINT_INLINE V* of(V* column) const {
    return column + region * regions.c;
  }
};

// Adds K pixels to the sums over each region (Run::of) of the deviations from `shift`, and of their squares.
template <int K, bool per_channel, typename T>
FUSED_INPAINT_INLINE void add_moments(const T* __restrict x, const uint8_t* __restrict mask,
                                      const acc_t<T>* __restrict shift, double* __restrict sum,
                                      double* __restrict square, double* __restrict valid, int64_t channels) {
  using A = acc_t<T>;
  fetch_ahead(x, K * channels);
  for (int64_t c = 0; c < channels; ++c) {
    A sum0 = 0, square0 = 0, sum1 = 0, square1 = 0, ones = 0;
    for (int k = 0; k < K; ++k) {
      const A v = load(x[k * channels + c]);
      if constexpr (per_channel) {
        const bool r = mask[k * channels + c] != 0;
        const A d0 = r ? A(0) : v - shift[c], d1 = r ? v - shift[channels + c] : A(0);
        sum0 += d0, square0 += d0 * d0, sum1 += d1, square1 += d1 * d1, ones += r ? A(1) : A(0);
      } else {
        const A d = v - shift[c];
        sum0 += d, square0 += d * d;
      }
    }
    sum[c] += sum0, square[c] += square0;
    if constexpr (per_channel) sum[channels + c] += sum1, square[channels + c] += square1, valid[c] += ones;
  }
}

// Moments of one chunk, by sums of deviations from the first value of each region: count (2, P), mean and m2 (2, C).
// shift (2, C) is scratch.
template <typename T, bool per_channel>
FUSED_INPAINT_CLONES void moments_chunk(const T* x, Regions regions, int64_t begin, int64_t end,
                                        acc_t<T>* __restrict shift, double* __restrict count, double* __restrict mean,
                                        double* __restrict m2) {
  using A = acc_t<T>;
  const int64_t c = regions.c;
  std::fill(count, count + 2 * regions.mask_c, 0.0);
  std::fill(mean, mean + 2 * c, 0.0);
  std::fill(m2, m2 + 2 * c, 0.0);
  std::fill(shift, shift + 2 * c, A(0));
  if constexpr (per_channel)
    for (int64_t pixel = end - 1; pixel >= begin; --pixel) {
      const uint8_t* __restrict mask = regions.mask_of(pixel);
      const T* __restrict v = x + pixel * c;
      for (int64_t i = 0; i < c; ++i) {
        const A hole = shift[i], valid = shift[c + i], value = load(v[i]);
        shift[i] = mask[i] ? hole : value;
        shift[c + i] = mask[i] ? value : valid;
      }
    }
  for (Run<per_channel> run(regions, begin, end); run.next();) {
    A* at = run.of(shift);
    if constexpr (!per_channel) {
      if (count[run.region] == 0)
        for (int64_t i = 0; i < c; ++i) at[i] = load(x[run.begin * c + i]);
      count[run.region] += static_cast<double>(run.end - run.begin);
    }
    int64_t pixel = run.begin;
    for (; pixel + kTogether <= run.end; pixel += kTogether)
      add_moments<kTogether, per_channel>(x + pixel * c, run.mask_of(pixel), at, run.of(mean), run.of(m2),
                                          count + regions.mask_c, c);
    for (; pixel < run.end; ++pixel)
      add_moments<1, per_channel>(x + pixel * c, run.mask_of(pixel), at, run.of(mean), run.of(m2),
                                  count + regions.mask_c, c);
  }
  if constexpr (per_channel)
    for (int64_t i = 0; i < c; ++i) count[i] = static_cast<double>(end - begin) - count[c + i];
  for (int64_t i = 0; i < 2 * c; ++i) {
    const double n = std::max(count[per_channel ? i : i / c], 1.0), sum = mean[i];
    mean[i] = static_cast<double>(shift[i]) + sum / n;
    m2[i] = std::max(m2[i] - sum * (sum / n), 0.0);
  }
}

// Chan's rule over the chunks of a group, (chunks, 2, P or C) each.
template <bool per_channel>
FUSED_INPAINT_CLONES void merge_moments(const double* __restrict counts, const double* __restrict means,
                                        const double* __restrict m2s, int64_t chunks, int64_t c, int64_t mask_c,
                                        double* __restrict count, double* __restrict mean, double* __restrict m2) {
  std::fill(count, count + 2 * mask_c, 0.0);
  std::fill(mean, mean + 2 * c, 0.0);
  std::fill(m2, m2 + 2 * c, 0.0);
  for (int64_t b = 0; b < chunks; ++b)
    for (int64_t i = 0; i < 2 * mask_c; ++i) count[i] += counts[b * 2 * mask_c + i];
  for (int64_t r = 0; r < 2; ++r) {
    const double* total = count + r * mask_c;
    double *m = mean + r * c, *s = m2 + r * c;
    for (int64_t b = 0; b < chunks; ++b) {
      const double *n = counts + (b * 2 + r) * mask_c, *each = means + (b * 2 + r) * c;
      for (int64_t i = 0; i < c; ++i) m[i] += n[per_channel ? i : 0] * each[i];
    }
    for (int64_t i = 0; i < c; ++i) m[i] /= std::max(total[per_channel ? i : 0], 1.0);
    for (int64_t b = 0; b < chunks; ++b) {
      const double *n = counts + (b * 2 + r) * mask_c, *each = means + (b * 2 + r) * c, *m2_ = m2s + (b * 2 + r) * c;
      for (int64_t i = 0; i < c; ++i) {
        const double apart = each[i] - m[i];
        s[i] += m2_[i] + n[per_channel ? i : 0] * apart * apart;
      }
    }
  }
}

// (G, columns, 2, C)
template <typename A>
struct Table {
  Statistics<A> statistics;
  std::vector<A> values;

  Table(const Tensor& mean, const Tensor& invstd, const Tensor* means, const Point& point)
      : statistics(fused_inpaint::statistics<A>(mean, invstd, means, point)),
        values(statistics.numel() * statistics.columns()) {
    for (int64_t i = 0; i < statistics.numel(); ++i) statistics.tabulate(i, values.data());
  }
  const A* of(int64_t group) const { return values.data() + group * statistics.columns() * 2 * statistics.c; }
};

// The values of the maps at each pixel.
template <typename A>
struct Maps {
  const A *scales, *shifts;  // or null
  explicit Maps(const Point& point)
      : scales(point.scale ? data<A>(*point.scale) : nullptr), shifts(point.shift ? data<A>(*point.shift) : nullptr) {}
  FUSED_INPAINT_INLINE A scale(int64_t pixel) const { return scales ? scales[pixel] : A(1); }
  FUSED_INPAINT_INLINE A shift(int64_t pixel) const { return shifts ? shifts[pixel] : A(0); }
};

// A table (columns, 2, C) as a pixel sees it. With a mask for each channel, the columns of both regions are put
// together in `scratch`, of the table's size, and after the first of them the mask.
template <bool per_channel, typename A>
struct Seen {
  const A* table;
  int64_t c;

  FUSED_INPAINT_INLINE Seen(const A* of_group, int columns, const Run<per_channel>& run, int64_t pixel, A* scratch)
      : table(per_channel ? scratch : run.of(of_group)), c(run.regions.c) {
    if constexpr (per_channel) {
      const uint8_t* __restrict mask = run.mask_of(pixel);
      A* __restrict to = scratch;
      for (int64_t i = 0; i < c; ++i) to[c + i] = mask[i] ? A(1) : A(0);
      for (int column = 0; column < columns; ++column) {
        const A* __restrict from = of_group + column * 2 * c;
        for (int64_t i = 0; i < c; ++i) {
          const A hole = from[i], valid = from[c + i];
          to[column * 2 * c + i] = to[c + i] != 0 ? valid : hole;
        }
      }
    }
  }
  FUSED_INPAINT_INLINE bool is_valid(int64_t i) const { return table[c + i] != 0; }
  FUSED_INPAINT_INLINE A get(Column column, int64_t i) const { return table[column * 2 * c + i]; }
  // u of region_norm.h; `apart` is x - centre
  FUSED_INPAINT_INLINE A normalized(A apart, int64_t i) const { return apart * get(kGain, i) + get(kOffset, i); }
  // The gradient in front of the activation.
  template <Activation kind>
  FUSED_INPAINT_INLINE A before(A grad, A apart, int64_t i, A scale, A shift, A slope) const {
    return through<kind>(grad, normalized(apart, i) * scale + shift, slope);
  }
};

template <typename T, Activation kind, bool per_channel>
FUSED_INPAINT_CLONES void normalize_chunk(const T* x, Regions regions, const acc_t<T>* table, acc_t<T>* scratch,
                                          Maps<acc_t<T>> maps, acc_t<T> slope, T* y, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t c = regions.c;
  for (Run<per_channel> run(regions, begin, end); run.next();)
    for (int64_t pixel = run.begin; pixel < run.end; ++pixel) {
      const Seen<per_channel, A> seen(table, kForward, run, pixel, scratch);
      const A scale = maps.scale(pixel), shift = maps.shift(pixel);
      const T* __restrict v = x + pixel * c;
      T* __restrict o = y + pixel * c;
      fetch_ahead(v, c);
      for (int64_t i = 0; i < c; ++i) {
        const A u = seen.normalized(load(v[i]) - seen.get(kCentre, i), i);
        store(o + i, activate<kind>(u * scale + shift, slope));
      }
    }
}

// Adds K pixels to the sums of g * s and of g * s * (x - centre): Run::of (2, C), or all of them.
template <int K, Activation kind, bool per_channel, typename T>
FUSED_INPAINT_INLINE void add_gradients(const T* __restrict grad, const T* __restrict x,
                                        const Seen<per_channel, acc_t<T>>& seen, const Maps<acc_t<T>>& maps,
                                        int64_t pixel, acc_t<T> slope, double* __restrict sum, double* __restrict dot) {
  using A = acc_t<T>;
  static_assert(K == 1 || !per_channel);
  const int64_t c = seen.c;
  A scale[K], shift[K];
  fetch_ahead(grad, K * c);
  fetch_ahead(x, K * c);
  for (int k = 0; k < K; ++k) scale[k] = maps.scale(pixel + k), shift[k] = maps.shift(pixel + k);
  for (int64_t i = 0; i < c; ++i) {
    A sums = 0, dots = 0;
    for (int k = 0; k < K; ++k) {
      const A apart = load(x[k * c + i]) - seen.get(kCentre, i);
      const A g = seen.template before<kind>(load(grad[k * c + i]), apart, i, scale[k], shift[k], slope) * scale[k];
      sums += g, dots += g * apart;
    }
    if constexpr (per_channel) {
      const bool valid = seen.is_valid(i);
      const A sum0 = valid ? A(0) : sums, dot0 = valid ? A(0) : dots, sum1 = valid ? sums : A(0),
              dot1 = valid ? dots : A(0);
      sum[i] += sum0, dot[i] += dot0, sum[c + i] += sum1, dot[c + i] += dot1;
    } else {
      sum[i] += sums, dot[i] += dots;
    }
  }
}

// What runs over the channels of a pixel does so in lanes, which are joined last: the order is fixed, and vectors fit
// it.
constexpr int64_t kLanes = 16;

// Calls add(first channel, channels), the second constant but for the last call.
template <typename F>
FUSED_INPAINT_INLINE void in_lanes(int64_t channels, const F& add) {
  int64_t first = 0;
  for (; first + kLanes <= channels; first += kLanes) add(first, kLanes);
  if (first < channels) add(first, channels - first);
}

template <typename A>
FUSED_INPAINT_INLINE A total(const A* lanes) {
  A half[kLanes / 2];
  for (int64_t k = 0; k < kLanes / 2; ++k) half[k] = lanes[k] + lanes[k + kLanes / 2];
  A sum = 0;
  for (int64_t k = 0; k < kLanes / 2; ++k) sum += half[k];
  return sum;
}

// The gradients of scale and shift at one pixel.
template <Activation kind, bool per_channel, typename T>
FUSED_INPAINT_INLINE void map_gradients(const T* __restrict grad, const T* __restrict x,
                                        const Seen<per_channel, acc_t<T>>& seen, acc_t<T> scale, acc_t<T> shift,
                                        acc_t<T> slope, acc_t<T>* grad_scale, acc_t<T>* grad_shift) {
  using A = acc_t<T>;
  A scales[kLanes] = {}, shifts[kLanes] = {};
  in_lanes(seen.c, [&](int64_t first, int64_t width) __attribute__((always_inline)) {
    for (int64_t k = 0; k < width; ++k) {
      const int64_t i = first + k;
      const A apart = load(x[i]) - seen.get(kCentre, i);
      const A g = seen.template before<kind>(load(grad[i]), apart, i, scale, shift, slope);
      shifts[k] += g;
      scales[k] += g * seen.normalized(apart, i);
    }
  });
  *grad_scale = total(scales);
  *grad_shift = total(shifts);
}

// sums: (2, 2, C)
template <typename T, Activation kind, bool per_channel>
FUSED_INPAINT_CLONES void sums_chunk(const T* grad, const T* x, Regions regions, const acc_t<T>* table,
                                     acc_t<T>* scratch, Maps<acc_t<T>> maps, acc_t<T> slope, double* sums,
                                     acc_t<T>* grad_scale, acc_t<T>* grad_shift, int64_t begin, int64_t end) {
  const int64_t c = regions.c;
  std::fill(sums, sums + 4 * c, 0.0);
  for (Run<per_channel> run(regions, begin, end); run.next();) {
    double *sum = run.of(sums), *dot = run.of(sums + 2 * c);
    int64_t pixel = run.begin;
    if constexpr (!per_channel) {
      const Seen seen(table, kForward, run, pixel, scratch);
      for (; pixel + kTogether <= run.end; pixel += kTogether)
        add_gradients<kTogether, kind>(grad + pixel * c, x + pixel * c, seen, maps, pixel, slope, sum, dot);
    }
    for (; pixel < run.end; ++pixel) {
      const Seen seen(table, kForward, run, pixel, scratch);
      add_gradients<1, kind>(grad + pixel * c, x + pixel * c, seen, maps, pixel, slope, sum, dot);
    }
    if (!maps.scales) continue;
    for (pixel = run.begin; pixel < run.end; ++pixel) {
      const Seen seen(table, kForward, run, pixel, scratch);
      map_gradients<kind>(grad + pixel * c, x + pixel * c, seen, maps.scale(pixel), maps.shift(pixel), slope,
                          grad_scale + pixel, grad_shift + pixel);
    }
  }
}

template <typename T, Activation kind, bool per_channel>
FUSED_INPAINT_CLONES void gradient_chunk(const T* grad, const T* x, Regions regions, const acc_t<T>* table,
                                         acc_t<T>* scratch, Maps<acc_t<T>> maps, acc_t<T> slope, T* grad_x,
                                         int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t c = regions.c;
  for (Run<per_channel> run(regions, begin, end); run.next();)
    for (int64_t pixel = run.begin; pixel < run.end; ++pixel) {
      const Seen<per_channel, A> seen(table, kBackward, run, pixel, scratch);
      const A scale = maps.scale(pixel), shift = maps.shift(pixel);
      const T* __restrict d = grad + pixel * c, * __restrict v = x + pixel * c;
      T* __restrict o = grad_x + pixel * c;
      fetch_ahead(d, c);
      fetch_ahead(v, c);
      for (int64_t i = 0; i < c; ++i) {
        const A apart = load(v[i]) - seen.get(kCentre, i);
        const A g = seen.template before<kind>(load(d[i]), apart, i, scale, shift, slope) * scale;
        store(o + i, (g - seen.get(kPull, i) - apart * seen.get(kSlant, i)) * seen.get(kGain, i));
      }
    }
}

template <typename T>
FUSED_INPAINT_CLONES void pool_pixels(const T* x, int64_t c, int64_t plane, T* pooled, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* v = x + pixel * c;
    fetch_ahead(v, c);
    A sums[kLanes] = {}, most[kLanes];
    std::fill(most, most + kLanes, -std::numeric_limits<A>::infinity());
    // Without the pragma the loop is unrolled into numbers one by one.
    in_lanes(c, [&](int64_t first, int64_t width) __attribute__((always_inline)) {
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) {
        const A value = load(v[first + k]);
        sums[k] += value;
        most[k] = larger(most[k], value);
      }
    });
    for (int k = 1; k < kLanes; ++k) most[0] = larger(most[0], most[k]);
    T* to = pooled + pixel / plane * 2 * plane + pixel % plane;
    store(to, total(sums) / static_cast<A>(c));
    store(to + plane, most[0]);
  }
}

template <typename T>
FUSED_INPAINT_CLONES void pool_backward_pixels(const T* grad, const T* x, const T* pooled, int64_t c, int64_t plane,
                                               T* grad_x, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t at = pixel / plane * 2 * plane + pixel % plane;
    const A each = load(grad[at]) / static_cast<A>(c), most = load(pooled[at + plane]);
    const T* __restrict v = x + pixel * c;
    T* __restrict o = grad_x + pixel * c;
    for (int64_t i = 0; i < c; ++i) store(o + i, each);
    // A NaN is found as NaN.
    const auto is_most = [&](int64_t i) { return load(v[i]) == most || (load(v[i]) != load(v[i]) && most != most); };
    int64_t i = 0;
    while (i < c && !is_most(i)) ++i;
    if (i < c) store(o + i, each + load(grad[at + plane]));
  }
}

// Calls body.template operator()<T, kind, per_channel>().
template <typename F>
void dispatch(const Tensor& x, const Regions& regions, const Point& point, F&& body) {
  dispatch_float("region_norm", x.scalar_type(), [&]<typename T>() {
    with_activation(point.activation, [&]<Activation kind>() {
      with_flag(regions.mask_c > 1, [&]<bool per_channel>() { body.template operator()<T, kind, per_channel>(); });
    });
  });
}

void moments(const Tensor& x, const Regions& regions, Tensor& count, Tensor& mean, Tensor& m2) {
  dispatch_float("region_norm", x.scalar_type(), [&]<typename T>() {
    with_flag(regions.mask_c > 1, [&]<bool per_channel>() {
      const Chunks chunks = chunks_of(regions);
      const int64_t c = regions.c, p = regions.mask_c;
      std::vector<double> counts(chunks.n * 2 * p), means(chunks.n * 2 * c), m2s(chunks.n * 2 * c);
      const T* v = data<T>(x);
      for_chunks<acc_t<T>>(chunks, c, [&](int64_t b, acc_t<T>* shift) {
        moments_chunk<T, per_channel>(v, regions, chunks.begin(b), chunks.end(b), shift, counts.data() + b * 2 * p,
                                      means.data() + b * 2 * c, m2s.data() + b * 2 * c);
      });
      for (int64_t g = 0; g < regions.groups; ++g) {
        const int64_t b = g * chunks.per_group;
        merge_moments<per_channel>(counts.data() + b * 2 * p, means.data() + b * 2 * c, m2s.data() + b * 2 * c,
                                   chunks.per_group, c, p, mutable_data<double>(count) + g * 2 * p,
                                   mutable_data<double>(mean) + g * 2 * c, mutable_data<double>(m2) + g * 2 * c);
      }
    });
  });
}

void normalize(const Tensor& x, const Regions& regions, const Tensor& mean, const Tensor& invstd, const Point& point,
               Tensor& y) {
  dispatch(x, regions, point, [&]<typename T, Activation kind, bool per_channel>() {
    using A = acc_t<T>;
    const Table<A> table(mean, invstd, nullptr, point);
    const T* v = data<T>(x);
    T* o = mutable_data<T>(y);
    const Chunks chunks = chunks_of(regions);
    for_chunks<A>(chunks, regions.c, [&](int64_t b, A* scratch) {
      normalize_chunk<T, kind, per_channel>(v, regions, table.of(chunks.group(b)), scratch, Maps<A>(point),
                                            static_cast<A>(point.slope), o, chunks.begin(b), chunks.end(b));
    });
  });
}

void gradient_sums(const Tensor& grad, const Tensor& x, const Regions& regions, const Tensor& mean,
                   const Tensor& invstd, const Point& point, Tensor& sums, Tensor& grad_scale, Tensor& grad_shift) {
  dispatch(x, regions, point, [&]<typename T, Activation kind, bool per_channel>() {
    using A = acc_t<T>;
    const Table<A> table(mean, invstd, nullptr, point);
    const T *d = data<T>(grad), *v = data<T>(x);
    A *to_scale = mutable_data<A>(grad_scale), *to_shift = mutable_data<A>(grad_shift);
    const Chunks chunks = chunks_of(regions);
    const int64_t c = regions.c;
    std::vector<double> partial(chunks.n * 4 * c);
    for_chunks<A>(chunks, c, [&](int64_t b, A* scratch) {
      sums_chunk<T, kind, per_channel>(d, v, regions, table.of(chunks.group(b)), scratch, Maps<A>(point),
                                       static_cast<A>(point.slope), partial.data() + b * 4 * c, to_scale, to_shift,
                                       chunks.begin(b), chunks.end(b));
    });
    for (int64_t g = 0; g < regions.groups; ++g) {
      double* to = mutable_data<double>(sums) + g * 4 * c;
      merge_sums(partial.data() + g * chunks.per_group * 4 * c, chunks.per_group, 4 * c, to);
      for (int64_t i = 0; i < 2 * c; ++i) to[2 * c + i] = table.statistics.dot(g * 2 * c + i, to[i], to[2 * c + i]);
    }
  });
}

void gradient(const Tensor& grad, const Tensor& x, const Regions& regions, const Tensor& mean, const Tensor& invstd,
              const Tensor& means, const Point& point, Tensor& grad_x) {
  dispatch(x, regions, point, [&]<typename T, Activation kind, bool per_channel>() {
    using A = acc_t<T>;
    const Table<A> table(mean, invstd, &means, point);
    const T *d = data<T>(grad), *v = data<T>(x);
    T* o = mutable_data<T>(grad_x);
    const Chunks chunks = chunks_of(regions);
    for_chunks<A>(chunks, regions.c, [&](int64_t b, A* scratch) {
      gradient_chunk<T, kind, per_channel>(d, v, regions, table.of(chunks.group(b)), scratch, Maps<A>(point),
                                           static_cast<A>(point.slope), o, chunks.begin(b), chunks.end(b));
    });
  });
}

void pool(const Tensor& x, Tensor& pooled) {
  dispatch_float("channel_pool", x.scalar_type(), [&]<typename T>() {
    const int64_t c = x.size(1), plane = x.size(2) * x.size(3);
    const T* v = data<T>(x);
    T* o = mutable_data<T>(pooled);
    parallel_for(0, x.size(0) * plane, ceil_div(kGrain, c),
                 [&](int64_t begin, int64_t end) { pool_pixels(v, c, plane, o, begin, end); });
  });
}

void pool_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, Tensor& grad_x) {
  dispatch_float("channel_pool", x.scalar_type(), [&]<typename T>() {
    const int64_t c = x.size(1), plane = x.size(2) * x.size(3);
    const T *d = data<T>(grad), *v = data<T>(x), *m = data<T>(pooled);
    T* o = mutable_data<T>(grad_x);
    parallel_for(0, x.size(0) * plane, ceil_div(kGrain, c),
                 [&](int64_t begin, int64_t end) { pool_backward_pixels(d, v, m, c, plane, o, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("region_moments", TORCH_BOX(&region_moments));
  m.impl("region_norm", TORCH_BOX(&region_norm));
  m.impl("region_norm_sums", TORCH_BOX(&region_norm_sums));
  m.impl("region_norm_gradient", TORCH_BOX(&region_norm_gradient));
  m.impl("channel_pool", TORCH_BOX(&channel_pool));
  m.impl("channel_pool_backward", TORCH_BOX(&channel_pool_backward));
}

}  // namespace fused_inpaint::cpu
