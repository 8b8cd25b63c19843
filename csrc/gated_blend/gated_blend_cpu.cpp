// SPDX-License-Identifier: Apache-2.0
// The gated blend on the CPU. Channels are the vectors' lanes.
#define FUSED_INPAINT_DEVICE cpu
#include <vector>

#include "common/chunks.h"

namespace fused_inpaint::cpu {

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

}  // namespace fused_inpaint::cpu

#include "gated_blend/gated_blend.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;

Chunks chunks_of(const Shape& shape) { return Chunks(shape.pixels, shape.n, shape.c); }

// Runs body(chunk, scratch) for all, with room for `columns` values of each channel.
template <typename A, typename F>
void for_chunks(const Chunks& chunks, int64_t columns, int64_t channels, F&& body) {
  parallel_for(0, chunks.n, chunks.grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(columns * channels);
    for (int64_t b = begin; b < end; ++b) body(b, scratch.data());
  });
}

// Adds K pixels to the sums of the deviations from `shift` and of their squares.
template <int K, typename T>
FUSED_INPAINT_INLINE void add_moments(const T* __restrict gate, const acc_t<T>* __restrict shift,
                                      double* __restrict sum, double* __restrict square, int64_t channels) {
  using A = acc_t<T>;
  fetch_ahead(gate, K * channels);
  for (int64_t c = 0; c < channels; ++c) {
    A sums = 0, squares = 0;
    for (int k = 0; k < K; ++k) {
      const A d = load(gate[k * channels + c]) - shift[c];
      sums += d, squares += d * d;
    }
    sum[c] += sums, square[c] += squares;
  }
}

// Mean and sum of squared deviations from it. gate (pixels, C); shift is scratch.
template <typename T>
FUSED_INPAINT_CLONES void moments_chunk(const T* gate, int64_t c, int64_t pixels, acc_t<T>* __restrict shift,
                                        double* __restrict mean, double* __restrict m2) {
  const double n = static_cast<double>(pixels);
  for (int64_t i = 0; i < c; ++i) shift[i] = load(gate[i]);
  // By deviations from the first value, then from the mean so found: the first may lie far from all others.
  for (int round = 0; round < 2; ++round) {
    if (round > 0)
      for (int64_t i = 0; i < c; ++i) shift[i] += static_cast<acc_t<T>>(mean[i] / n);
    std::fill(mean, mean + c, 0.0);
    std::fill(m2, m2 + c, 0.0);
    int64_t p = 0;
    for (; p + kTogether <= pixels; p += kTogether) add_moments<kTogether>(gate + p * c, shift, mean, m2, c);
    for (; p < pixels; ++p) add_moments<1>(gate + p * c, shift, mean, m2, c);
  }
  for (int64_t i = 0; i < c; ++i) {
    const double sum = mean[i];
    mean[i] = static_cast<double>(shift[i]) + sum / n;
    m2[i] = std::max(m2[i] - sum * (sum / n), 0.0);
  }
}

// Chan's rule over the chunks of a sample, (chunks, C) each; the first one's mean and m2 become those of all. The mean
// is taken from it, so that equal values have themselves as their mean.
FUSED_INPAINT_CLONES void merge_moments(double* __restrict mean, double* __restrict m2, const Chunks& chunks,
                                        int64_t c) {
  const auto values = [&](int64_t b) { return static_cast<double>(chunks.end(b) - chunks.begin(b)); };
  double before = values(0);
  for (int64_t b = 1; b < chunks.per_group; ++b) {
    const double n = values(b), share = n / (before + n);
    for (int64_t i = 0; i < c; ++i) {
      const double apart = mean[b * c + i] - mean[i];
      mean[i] += apart * share;
      m2[i] += m2[b * c + i] + apart * apart * (before * share);
    }
    before += n;
  }
}

void statistics_of(const Tensor& gate, Tensor& statistics) {
  dispatch_float("gated_blend", gate.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const Shape shape(gate);
    const Chunks chunks = chunks_of(shape);
    const int64_t c = shape.c;
    std::vector<double> means(chunks.n * c), m2s(chunks.n * c);
    const T* v = data<T>(gate);
    for_chunks<A>(chunks, 1, c, [&](int64_t b, A* shift) {
      moments_chunk(v + chunks.begin(b) * c, c, chunks.end(b) - chunks.begin(b), shift, means.data() + b * c,
                    m2s.data() + b * c);
    });
    for (int64_t n = 0; n < shape.n; ++n) {
      double *mean = means.data() + n * chunks.per_group * c, *m2 = m2s.data() + n * chunks.per_group * c;
      merge_moments(mean, m2, chunks, c);
      A* to = mutable_data<A>(statistics) + n * kStatistics * c;
      for (int64_t i = 0; i < c; ++i) {
        to[kMean * c + i] = static_cast<A>(mean[i]);
        to[kRest * c + i] = static_cast<A>(mean[i] - static_cast<double>(to[kMean * c + i]));
        to[kStd * c + i] = static_cast<A>(std::sqrt(m2[i] / std::max<double>(1, shape.pixels - 1)));
      }
    }
  });
}

// (N, columns, C)
template <typename A>
struct Table {
  int64_t columns, c;
  std::vector<A> values;

  Table(const Tensor& statistics, int64_t columns_) : columns(columns_), c(statistics.size(2)) {
    values.resize(statistics.size(0) * columns * c);
    for (int64_t n = 0; n < statistics.size(0); ++n) {
      const A* from = data<A>(statistics) + n * kStatistics * c;
      A* to = values.data() + n * columns * c;
      for (int64_t i = 0; i < c; ++i) {
        const A gain = gain_of(from[kStd * c + i]);
        to[kCentre * c + i] = from[kMean * c + i];
        to[kGain * c + i] = gain;
        to[kOffset * c + i] = offset_of(from[kRest * c + i], gain);
      }
    }
  }
  const A* of(int64_t sample) const { return values.data() + sample * columns * c; }
};

// x, f and gate (pixels, C); table (columns, C)
template <typename T>
FUSED_INPAINT_CLONES void blend_chunk(const T* x, const T* f, const T* gate, const acc_t<T>* __restrict table, T* y,
                                      int64_t c, int64_t pixels) {
  using A = acc_t<T>;
  const A *centre = table + kCentre * c, *gain = table + kGain * c, *offset = table + kOffset * c;
  for (int64_t p = 0; p < pixels; ++p) {
    const T* __restrict a = x + p * c, * __restrict b = f + p * c, * __restrict v = gate + p * c;
    T* __restrict o = y + p * c;
    fetch_ahead(a, c), fetch_ahead(b, c), fetch_ahead(v, c);
    for (int64_t i = 0; i < c; ++i) {
      const Gate<A> g((load(v[i]) - centre[i]) * gain[i] + offset[i]);
      store(o + i, load(a[i]) * g.shut + load(b[i]) * g.open);
    }
  }
}

void blend(const Tensor& x, const Tensor& f, const Tensor& gate, const Tensor& statistics, Tensor& y) {
  dispatch_float("gated_blend", x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const Table<A> table(statistics, kForward);
    const Shape shape(x);
    const Chunks chunks = chunks_of(shape);
    const T *a = data<T>(x), *b = data<T>(f), *v = data<T>(gate);
    T* o = mutable_data<T>(y);
    parallel_for(0, chunks.n, chunks.grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t at = chunks.begin(k) * shape.c;
        blend_chunk(a + at, b + at, v + at, table.of(chunks.group(k)), o + at, shape.c,
                    chunks.end(k) - chunks.begin(k));
      }
    });
  });
}

// The maps of a backward pass, from a chunk's first pixel on.
template <typename T>
struct Maps {
  const T *grad, *x, *f, *gate;
  Maps at(int64_t i) const { return {grad + i, x + i, f + i, gate + i}; }
};

// sums (2, C): of p and of p * (gate - centre). scratch (2, C) holds those of a few pixels.
template <typename T>
FUSED_INPAINT_CLONES void sums_chunk(Maps<T> maps, const acc_t<T>* __restrict table, acc_t<T>* __restrict scratch,
                                     double* __restrict sums, int64_t c, int64_t pixels) {
  using A = acc_t<T>;
  const A *centre = table + kCentre * c, *gain = table + kGain * c, *offset = table + kOffset * c;
  std::fill(sums, sums + 2 * c, 0.0);
  for (int64_t first = 0; first < pixels; first += kTogether) {
    std::fill(scratch, scratch + 2 * c, A(0));
    for (int64_t p = first; p < std::min(first + kTogether, pixels); ++p) {
      const Maps<T> m = maps.at(p * c);
      fetch_ahead(m.grad, c), fetch_ahead(m.x, c), fetch_ahead(m.f, c), fetch_ahead(m.gate, c);
      for (int64_t i = 0; i < c; ++i) {
        const A apart = load(m.gate[i]) - centre[i];
        const Gate<A> g(apart * gain[i] + offset[i]);
        const A d = load(m.grad[i]) * (load(m.f[i]) - load(m.x[i])) * (g.open * g.shut);
        scratch[i] += d;
        scratch[c + i] += d * apart;
      }
    }
    for (int64_t i = 0; i < 2 * c; ++i) sums[i] += scratch[i];
  }
}

// scratch (2, C) holds a pixel's g and 1 - g.
template <typename T>
FUSED_INPAINT_CLONES void gradient_chunk(Maps<T> maps, const acc_t<T>* __restrict table, acc_t<T>* __restrict scratch,
                                         T* grad_x, T* grad_f, T* grad_gate, int64_t c, int64_t pixels) {
  using A = acc_t<T>;
  const A *centre = table + kCentre * c, *gain = table + kGain * c, *offset = table + kOffset * c;
  A* __restrict open = scratch, * __restrict shut = scratch + c;
  for (int64_t p = 0; p < pixels; ++p) {
    const Maps<T> m = maps.at(p * c);
    fetch_ahead(m.grad, c), fetch_ahead(m.gate, c);
    for (int64_t i = 0; i < c; ++i) {
      const Gate<A> g((load(m.gate[i]) - centre[i]) * gain[i] + offset[i]);
      open[i] = g.open, shut[i] = g.shut;
    }
    if (grad_x) {
      T* __restrict to = grad_x + p * c;
      for (int64_t i = 0; i < c; ++i) store(to + i, load(m.grad[i]) * shut[i]);
    }
    if (grad_f) {
      T* __restrict to = grad_f + p * c;
      for (int64_t i = 0; i < c; ++i) store(to + i, load(m.grad[i]) * open[i]);
    }
    if (grad_gate) {
      const A *pull = table + kPull * c, *slant = table + kSlant * c;
      T* __restrict to = grad_gate + p * c;
      fetch_ahead(m.x, c), fetch_ahead(m.f, c);
      for (int64_t i = 0; i < c; ++i) {
        const A d = load(m.grad[i]) * (load(m.f[i]) - load(m.x[i])) * (open[i] * shut[i]);
        store(to + i, (d - pull[i] - (load(m.gate[i]) - centre[i]) * slant[i]) * gain[i]);
      }
    }
  }
}

void gradients(const Tensor& grad, const Tensor& x, const Tensor& f, const Tensor& gate, const Tensor& statistics,
               Tensor* grad_x, Tensor* grad_f, Tensor* grad_gate) {
  dispatch_float("gated_blend", x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    Table<A> table(statistics, grad_gate ? kForward + kGradient : kForward);
    const Shape shape(x);
    const Chunks chunks = chunks_of(shape);
    const int64_t c = shape.c;
    const Maps<T> maps{data<T>(grad), data<T>(x), data<T>(f), data<T>(gate)};
    const auto pixels = [&](int64_t k) { return chunks.end(k) - chunks.begin(k); };
    if (grad_gate) {
      std::vector<double> partial(chunks.n * 2 * c), sums(2 * c);
      for_chunks<A>(chunks, 2, c, [&](int64_t k, A* scratch) {
        sums_chunk(maps.at(chunks.begin(k) * c), table.of(chunks.group(k)), scratch, partial.data() + k * 2 * c, c,
                   pixels(k));
      });
      for (int64_t n = 0; n < shape.n; ++n) {
        merge_sums(partial.data() + n * chunks.per_group * 2 * c, chunks.per_group, 2 * c, sums.data());
        const A* of_sample = data<A>(statistics) + n * kStatistics * c;
        A* to = table.values.data() + n * table.columns * c;
        for (int64_t i = 0; i < c; ++i) {
          const GradientColumns g(sums[i], sums[c + i], of_sample[kRest * c + i], of_sample[kStd * c + i],
                                  shape.pixels);
          to[kPull * c + i] = static_cast<A>(g.pull);
          to[kSlant * c + i] = static_cast<A>(g.slant);
        }
      }
    }
    T* to_x = grad_x ? mutable_data<T>(*grad_x) : nullptr;
    T* to_f = grad_f ? mutable_data<T>(*grad_f) : nullptr;
    T* to_gate = grad_gate ? mutable_data<T>(*grad_gate) : nullptr;
    for_chunks<A>(chunks, 2, c, [&](int64_t k, A* scratch) {
      const int64_t at = chunks.begin(k) * c;
      const auto from = [&](T* to) { return to ? to + at : nullptr; };
      gradient_chunk(maps.at(at), table.of(chunks.group(k)), scratch, from(to_x), from(to_f), from(to_gate), c,
                     pixels(k));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, CPU, m) {
  m.impl("gated_blend", TORCH_BOX(&gated_blend));
  m.impl("gated_blend_backward", TORCH_BOX(&gated_blend_backward));
}

}  // namespace fused_inpaint::cpu
