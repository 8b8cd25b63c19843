// SPDX-License-Identifier: Apache-2.0
// The passes over the output: renormalisation, bias or batch norm, activation and holes in one read and one write, and
// the same backwards. Reductions run over blocks of a fixed number of pixels and are merged in order, so that the
// result does not depend on the number of threads.
#define FUSED_INPAINT_DEVICE cpu
#include <algorithm>
#include <cmath>

#include "common/dispatch.h"
#include "partial_conv/partial_conv.h"
#include "partial_conv/partial_pixel.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;

// Parameters in the accumulator type, widened from the tensor's own type.
template <typename A>
std::vector<A> widen(const Tensor& t) {
  std::vector<A> out(t.numel());
  dispatch_float("partial_conv2d", t.scalar_type(), [&]<typename S>() {
    const S* p = data<S>(t);
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<A>(load(p[i]));
  });
  return out;
}

// Those of n channels, or one value for all of them.
template <typename A>
std::vector<A> widen_or(const Tensor* t, int64_t n, A otherwise) {
  return t ? widen<A>(*t) : std::vector<A>(n, otherwise);
}

// The sum of the convolutions at a pixel: from y, from the phases, or both.
template <typename T, bool from_y, bool from_phases>
FUSED_INPAINT_INLINE acc_t<T> numerator(const T* y, const T* phases, int64_t c) {
  if constexpr (from_y && from_phases) return acc_t<T>(load(y[c])) + load(phases[c]);
  if constexpr (from_y) return load(y[c]);
  return load(phases[c]);
}

template <typename T, Activation kind, bool from_y, bool from_phases>
FUSED_INPAINT_CLONES void epilogue_rows(T* y, const T* phases, Phases at, Output out, const acc_t<T>* __restrict scale,
                                        const acc_t<T>* __restrict bias, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(out.slope);
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* count = out.count_row(row);
    const T* f_row = from_phases ? phases + at.row(row, out.h) : nullptr;
    for (int64_t x = 0; x < out.w; ++x) {
      T* __restrict o = y + (row * out.w + x) * out.c;
      if (count[x] == 0) {
        std::memset(o, 0, out.c * sizeof(T));
        continue;
      }
      const A ratio = static_cast<A>(out.window) / static_cast<A>(count[x]);
      const T* __restrict f = from_phases ? f_row + at.column(x) : nullptr;
      for (int64_t c = 0; c < out.c; ++c) {
        const A v = numerator<T, from_y, from_phases>(o, f, c) * ratio * scale[c] + bias[c];
        store(o + c, activate<kind>(v, slope));
      }
    }
  }
}

// A copy of one finished row of the gradient into the phases that fed it.
template <typename T>
FUSED_INPAINT_INLINE void scatter_row(const T* grad_row, T* phases, const Phases& at, const Output& out, int64_t row) {
  T* to = phases + at.row(row, out.h);
  for (int64_t x = 0; x < out.w; ++x) std::memcpy(to + at.column(x), grad_row + x * out.c, out.c * sizeof(T));
}

// Where the phases are shifted, a border row and column of each belongs to no output pixel.
template <typename T>
void zero_border(T* phases, const Phases& at, int64_t batch) {
  if (at.shift == 0) return;
  const int64_t pixel = 4 * at.c;
  for (int64_t n = 0; n < batch; ++n) {
    T* map = phases + n * at.h * at.w * pixel;
    std::memset(map, 0, at.w * pixel * sizeof(T));
    std::memset(map + (at.h - 1) * at.w * pixel, 0, at.w * pixel * sizeof(T));
    for (int64_t y = 0; y < at.h; ++y) {
      std::memset(map + y * at.w * pixel, 0, pixel * sizeof(T));
      std::memset(map + (y * at.w + at.w - 1) * pixel, 0, pixel * sizeof(T));
    }
  }
}

int64_t row_grain(const Output& out) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, out.w * out.c)); }

// Blocks of pixels for reductions: a block of float32 stays in the first-level caches.
struct Blocks {
  int64_t pixels, size, n;
  explicit Blocks(const Output& out)
      : pixels(out.pixels()),
        size(std::clamp<int64_t>(16384 / std::max<int64_t>(1, out.c), 16, 1024)),
        n(ceil_div(pixels, size)) {}
};

// Runs body(block, begin, end) over all blocks.
template <typename F>
void for_blocks(const Blocks& blocks, F&& body) {
  parallel_for(0, blocks.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, b * blocks.size, std::min(blocks.pixels, (b + 1) * blocks.size));
  });
}

template <typename T, Activation kind>
FUSED_INPAINT_CLONES void epilogue_backward_block(const T* grad, const T* y, Output out,
                                                  const acc_t<T>* __restrict scale, T* grad_conv,
                                                  acc_t<T>* __restrict bias_sum, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(out.slope);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const A ratio = out.template ratio<A>(pixel);
    T* __restrict g = grad_conv + pixel * out.c;
    if (ratio == 0) {
      std::memset(g, 0, out.c * sizeof(T));
      continue;
    }
    const T *d = grad + pixel * out.c, *o = y + pixel * out.c;
    for (int64_t c = 0; c < out.c; ++c) {
      const A v = through<kind>(A(load(d[c])), A(load(o[c])), slope);
      bias_sum[c] += v;
      store(g + c, v * ratio * scale[c]);
    }
  }
}

// Mean of one block, and the sums of the deviations from it and of their squares, in two sweeps over data that the
// first has brought into the cache. The deviations sum to what rounding has taken from the mean, which matters where
// the mean is large and the variance small.
template <typename T, bool from_y, bool from_phases>
FUSED_INPAINT_CLONES void moments_block(T* conv, const T* phases, Phases at, Output out, acc_t<T>* __restrict mean,
                                        acc_t<T>* __restrict rest, acc_t<T>* __restrict m2, int64_t begin,
                                        int64_t end) {
  using A = acc_t<T>;
  std::fill(mean, mean + out.c, A(0));
  std::fill(rest, rest + out.c, A(0));
  std::fill(m2, m2 + out.c, A(0));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    T* __restrict v = conv + pixel * out.c;
    const A ratio = out.template ratio<A>(pixel);
    if constexpr (from_phases) {
      const T* f = phases + at.row(pixel / out.w, out.h) + at.column(pixel % out.w);
      for (int64_t c = 0; c < out.c; ++c) store(v + c, numerator<T, from_y, true>(v, f, c));
    }
    if (ratio == 0) continue;
    for (int64_t c = 0; c < out.c; ++c) mean[c] += load(v[c]) * ratio;
  }
  const A inverse = A(1) / static_cast<A>(end - begin);
  for (int64_t c = 0; c < out.c; ++c) mean[c] *= inverse;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* v = conv + pixel * out.c;
    const A ratio = out.template ratio<A>(pixel);
    if (ratio == 0) {
      for (int64_t c = 0; c < out.c; ++c) {
        rest[c] -= mean[c];
        m2[c] += mean[c] * mean[c];
      }
      continue;
    }
    for (int64_t c = 0; c < out.c; ++c) {
      const A d = load(v[c]) * ratio - mean[c];
      rest[c] += d;
      m2[c] += d * d;
    }
  }
}

// Normalisation of channel c: (v - mean) * inverse deviation, times weight, plus bias.
template <typename A>
struct Norm {
  std::vector<A> mean, inverse, weight, bias;
  Norm(const Tensor& mean_, const Tensor& var, const Tensor& weight_, const Tensor& bias_, double eps)
      : mean(widen<A>(mean_)), inverse(widen<A>(var)), weight(widen<A>(weight_)), bias(widen<A>(bias_)) {
    for (A& v : inverse) v = A(1) / std::sqrt(v + static_cast<A>(eps));
  }
};

template <typename T, Activation kind>
FUSED_INPAINT_CLONES void batch_norm_rows(const T* conv, Output out, const acc_t<T>* __restrict mean,
                                          const acc_t<T>* __restrict gain, const acc_t<T>* __restrict bias, T* y,
                                          int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(out.slope);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const A ratio = out.template ratio<A>(pixel);
    T* __restrict o = y + pixel * out.c;
    if (ratio == 0) {
      std::memset(o, 0, out.c * sizeof(T));
      continue;
    }
    const T* v = conv + pixel * out.c;
    for (int64_t c = 0; c < out.c; ++c)
      store(o + c, activate<kind>((load(v[c]) * ratio - mean[c]) * gain[c] + bias[c], slope));
  }
}

// Sums over a block of g = dL/d(normalised and affine) and of g * x_hat.
template <typename T, Activation kind>
FUSED_INPAINT_CLONES void norm_sums_block(const T* grad, const T* conv, Output out, const acc_t<T>* __restrict mean,
                                          const acc_t<T>* __restrict inverse, const acc_t<T>* __restrict weight,
                                          const acc_t<T>* __restrict bias, acc_t<T>* __restrict sum,
                                          acc_t<T>* __restrict dot, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(out.slope);
  std::fill(sum, sum + out.c, A(0));
  std::fill(dot, dot + out.c, A(0));
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const A ratio = out.template ratio<A>(pixel);
    if (ratio == 0) continue;
    const T *d = grad + pixel * out.c, *v = conv + pixel * out.c;
    for (int64_t c = 0; c < out.c; ++c) {
      const A x_hat = (load(v[c]) * ratio - mean[c]) * inverse[c];
      const A g = through<kind>(A(load(d[c])), x_hat * weight[c] + bias[c], slope);
      sum[c] += g;
      dot[c] += g * x_hat;
    }
  }
}

template <typename T, Activation kind>
FUSED_INPAINT_CLONES void norm_gradient_rows(const T* grad, const T* conv, Output out, const acc_t<T>* __restrict mean,
                                             const acc_t<T>* __restrict inverse, const acc_t<T>* __restrict weight,
                                             const acc_t<T>* __restrict bias, const acc_t<T>* __restrict mean_g,
                                             const acc_t<T>* __restrict mean_dot, T* grad_conv, int64_t begin,
                                             int64_t end) {
  using A = acc_t<T>;
  const A slope = static_cast<A>(out.slope);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const A ratio = out.template ratio<A>(pixel);
    T* __restrict o = grad_conv + pixel * out.c;
    if (ratio == 0) {
      std::memset(o, 0, out.c * sizeof(T));
      continue;
    }
    const T *d = grad + pixel * out.c, *v = conv + pixel * out.c;
    for (int64_t c = 0; c < out.c; ++c) {
      const A x_hat = (load(v[c]) * ratio - mean[c]) * inverse[c];
      const A g = through<kind>(A(load(d[c])), x_hat * weight[c] + bias[c], slope);
      store(o + c, (g - mean_g[c] - x_hat * mean_dot[c]) * inverse[c] * weight[c] * ratio);
    }
  }
}

// Sums the blocks' partial sums of each channel in their order, in double.
template <typename A>
std::vector<double> merge(const std::vector<A>& partial, int64_t blocks, int64_t stride, int64_t first,
                          int64_t channels) {
  std::vector<double> sum(channels, 0.0);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < channels; ++c) sum[c] += partial[b * stride + first + c];
  return sum;
}

template <typename V>
void write(Tensor& t, const std::vector<V>& values) {
  dispatch_float("partial_conv2d", t.scalar_type(), [&]<typename T>() {
    T* p = mutable_data<T>(t);
    for (size_t i = 0; i < values.size(); ++i) store(p + i, static_cast<acc_t<T>>(values[i]));
  });
}

}  // namespace

void epilogue(Tensor& y, bool y_holds_sum, const Tensor* phases, int64_t shift, const Output& out, const Tensor* scale,
              const Tensor* bias) {
  dispatch_float("partial_conv2d", y.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      using A = acc_t<T>;
      const auto s = widen_or<A>(scale, out.c, A(1)), b = widen_or<A>(bias, out.c, A(0));
      T* o = mutable_data<T>(y);
      const T* f = phases ? data<T>(*phases) : nullptr;
      const Phases at = phases_of(out, shift);
      parallel_for(0, out.n * out.h, row_grain(out), [&](int64_t begin, int64_t end) {
        if (!phases)
          epilogue_rows<T, kind, true, false>(o, f, at, out, s.data(), b.data(), begin, end);
        else if (y_holds_sum)
          epilogue_rows<T, kind, true, true>(o, f, at, out, s.data(), b.data(), begin, end);
        else
          epilogue_rows<T, kind, false, true>(o, f, at, out, s.data(), b.data(), begin, end);
      });
    });
  });
}

void epilogue_backward(const Tensor& grad, const Tensor& y, const Output& out, const Tensor* scale, Tensor& grad_conv,
                       Tensor* grad_phases, int64_t shift, Tensor* grad_bias) {
  dispatch_float("partial_conv2d", grad.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      using A = acc_t<T>;
      const auto s = widen_or<A>(scale, out.c, A(1));
      const Blocks blocks(out);
      std::vector<A> sums(blocks.n * out.c, A(0));
      const T *d = data<T>(grad), *o = data<T>(y);
      T* g = mutable_data<T>(grad_conv);
      for_blocks(blocks, [&](int64_t b, int64_t begin, int64_t end) {
        epilogue_backward_block<T, kind>(d, o, out, s.data(), g, sums.data() + b * out.c, begin, end);
      });
      if (grad_phases) {
        const Phases at = phases_of(out, shift);
        T* f = mutable_data<T>(*grad_phases);
        zero_border(f, at, out.n);
        parallel_for(0, out.n * out.h, row_grain(out), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) scatter_row(g + row * out.w * out.c, f, at, out, row);
        });
      }
      if (grad_bias) write(*grad_bias, merge(sums, blocks.n, out.c, 0, out.c));
    });
  });
}

void batch_statistics(Tensor& conv, bool conv_holds_sum, const Tensor* phases, int64_t shift, const Output& out,
                      Tensor& mean, Tensor& var) {
  dispatch_float("partial_conv2d", conv.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const Blocks blocks(out);
    std::vector<A> partial(blocks.n * 3 * out.c);
    T* v = mutable_data<T>(conv);
    const T* f = phases ? data<T>(*phases) : nullptr;
    const Phases at = phases_of(out, shift);
    for_blocks(blocks, [&](int64_t b, int64_t begin, int64_t end) {
      A *m = partial.data() + b * 3 * out.c, *rest = m + out.c, *m2 = rest + out.c;
      if (!phases)
        moments_block<T, true, false>(v, f, at, out, m, rest, m2, begin, end);
      else if (conv_holds_sum)
        moments_block<T, true, true>(v, f, at, out, m, rest, m2, begin, end);
      else
        moments_block<T, false, true>(v, f, at, out, m, rest, m2, begin, end);
    });
    // Chan's rule, block after block.
    std::vector<double> total(out.c, 0.0), squares(out.c, 0.0);
    double seen = 0;
    for (int64_t b = 0; b < blocks.n; ++b) {
      const double size = static_cast<double>(std::min(blocks.pixels, (b + 1) * blocks.size) - b * blocks.size);
      const A *m = partial.data() + b * 3 * out.c, *rest = m + out.c, *m2 = rest + out.c;
      const double both = seen + size;
      for (int64_t c = 0; c < out.c; ++c) {
        const double missed = rest[c] / size, delta = m[c] + missed - total[c];
        total[c] += delta * size / both;
        squares[c] += m2[c] - missed * rest[c] + delta * delta * seen * size / both;
      }
      seen = both;
    }
    for (double& s : squares) s = std::max(s / seen, 0.0);
    write(mean, total);
    write(var, squares);
  });
}

void batch_norm(const Tensor& conv, const Output& out, const Tensor& mean, const Tensor& var, const Tensor& weight,
                const Tensor& bias, double eps, Tensor& y) {
  dispatch_float("partial_conv2d", conv.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      using A = acc_t<T>;
      const Norm<A> norm(mean, var, weight, bias, eps);
      std::vector<A> gain(out.c);
      for (int64_t c = 0; c < out.c; ++c) gain[c] = norm.inverse[c] * norm.weight[c];
      const T* v = data<T>(conv);
      T* o = mutable_data<T>(y);
      for_blocks(Blocks(out), [&](int64_t, int64_t begin, int64_t end) {
        batch_norm_rows<T, kind>(v, out, norm.mean.data(), gain.data(), norm.bias.data(), o, begin, end);
      });
    });
  });
}

void batch_norm_backward(const Tensor& grad, const Tensor& conv, const Output& out, const Tensor& mean,
                         const Tensor& var, const Tensor& weight, const Tensor& bias, double eps, Tensor& grad_conv,
                         Tensor* grad_phases, int64_t shift, Tensor& grad_weight, Tensor& grad_bias) {
  dispatch_float("partial_conv2d", conv.scalar_type(), [&]<typename T>() {
    with_activation(out.activation, [&]<Activation kind>() {
      using A = acc_t<T>;
      const Norm<A> norm(mean, var, weight, bias, eps);
      const Blocks blocks(out);
      std::vector<A> partial(blocks.n * 2 * out.c);
      const T *d = data<T>(grad), *v = data<T>(conv);
      for_blocks(blocks, [&](int64_t b, int64_t begin, int64_t end) {
        A *sum = partial.data() + b * 2 * out.c, *dot = sum + out.c;
        norm_sums_block<T, kind>(d, v, out, norm.mean.data(), norm.inverse.data(), norm.weight.data(), norm.bias.data(),
                                 sum, dot, begin, end);
      });
      const auto sum = merge(partial, blocks.n, 2 * out.c, 0, out.c),
                 dot = merge(partial, blocks.n, 2 * out.c, out.c, out.c);
      write(grad_bias, sum);
      write(grad_weight, dot);
      std::vector<A> mean_g(out.c), mean_dot(out.c);
      for (int64_t c = 0; c < out.c; ++c) {
        mean_g[c] = static_cast<A>(sum[c] / static_cast<double>(blocks.pixels));
        mean_dot[c] = static_cast<A>(dot[c] / static_cast<double>(blocks.pixels));
      }
      T* g = mutable_data<T>(grad_conv);
      T* f = grad_phases ? mutable_data<T>(*grad_phases) : nullptr;
      const Phases at = phases_of(out, shift);
      if (grad_phases) zero_border(f, at, out.n);
      parallel_for(0, out.n * out.h, row_grain(out), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          norm_gradient_rows<T, kind>(d, v, out, norm.mean.data(), norm.inverse.data(), norm.weight.data(),
                                      norm.bias.data(), mean_g.data(), mean_dot.data(), g, row * out.w,
                                      (row + 1) * out.w);
          if (f) scatter_row(g + row * out.w * out.c, f, at, out, row);
        }
      });
    });
  });
}

}  // namespace fused_inpaint::cpu
