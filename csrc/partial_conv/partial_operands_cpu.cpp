// SPDX-License-Identifier: Apache-2.0
// The operands of the vendor's convolution: sources with their holes zeroed, weights cut and folded, and the way back.
#define FUSED_INPAINT_DEVICE cpu
#include <algorithm>
#include <atomic>

#include "common/dispatch.h"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;
constexpr int64_t kGrain = 1 << 14;  // elements below which another thread does not pay

// The holes of a feature map (n, channels, h, w) under its mask, found row by row.
struct Holes {
  const uint8_t* mask;
  int64_t mask_n, planes, h, w, channels;
  Holes(const Tensor& m, int64_t channels)
      : mask(data<uint8_t>(m)), mask_n(m.size(0)), planes(m.size(1)), h(m.size(2)), w(m.size(3)), channels(channels) {}

  // Calls visit(first element, elements) for the runs of holes of a row of pixels, the map being channels last; visit
  // returns false to stop. A one-plane mask gives all channels of a run of pixels at once.
  template <typename F>
  FUSED_INPAINT_INLINE void in_row(int64_t row, F&& visit) const {
    const int64_t batch = mask_n == 1 ? 0 : row / h, y = row % h;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const uint8_t* m = mask + ((batch * planes + plane) * h + y) * w;
      const uint8_t* end = m + w;
      for (const uint8_t* at = m; (at = static_cast<const uint8_t*>(std::memchr(at, 0, end - at))) != nullptr;) {
        const uint8_t* first = at++;
        if (planes == 1)
          while (at < end && !*at) ++at;
        const int64_t n = planes == 1 ? (at - first) * channels : 1;
        if (!visit((row * w + (first - m)) * channels + plane, n)) return;
      }
    }
  }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, w * channels)); }
};

template <typename T>
FUSED_INPAINT_CLONES bool all_zero(const T* x, int64_t n) {
  bool nonzero = false;
  for (int64_t i = 0; i < n; ++i) nonzero |= !(load(x[i]) == 0);
  return !nonzero;
}

int64_t grain(int64_t channels) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, channels)); }

template <typename T>
bool holes_are_zero(const T* x, const Holes& holes, int64_t rows) {
  std::atomic<bool> clean{true};
  parallel_for(0, rows, holes.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && clean.load(std::memory_order_relaxed); ++row)
      holes.in_row(row, [&](int64_t first, int64_t n) {
        if (all_zero(x + first, n)) return true;
        clean.store(false, std::memory_order_relaxed);
        return false;
      });
  });
  return clean;
}

// Each tap of the folded kernel is a sum of the kernel's own taps; at most four, one where the phases part.
template <typename T>
FUSED_INPAINT_CLONES void fold_outputs(const T* weight, T* folded, Fold fold, int64_t outputs, int64_t total,
                                       int64_t first, int64_t channels, int64_t begin, int64_t end) {
  const int64_t k = fold.kernel, taps = fold.taps;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t phase = 0; phase < 4; ++phase)
      for (int64_t s = 0; s < taps; ++s)
        for (int64_t t = 0; t < taps; ++t) {
          const T* parts[4] = {};
          int64_t n = 0;
          for (int64_t u = 0; u < k; ++u)
            for (int64_t v = 0; v < k; ++v)
              if (fold.tap(phase / 2, u) == s && fold.tap(phase % 2, v) == t)
                parts[n++] = weight + ((o * k + u) * k + v) * total + first;
          T* __restrict to = folded + (((phase * outputs + o) * taps + s) * taps + t) * channels;
          const T *a = parts[0], *b = parts[n > 1 ? 1 : 0], *c = parts[n > 2 ? 2 : 0], *d = parts[n > 2 ? 3 : 0];
          if (n == 1)
            std::memcpy(to, a, channels * sizeof(T));
          else if (n == 2)
            for (int64_t i = 0; i < channels; ++i) store(to + i, load(a[i]) + load(b[i]));
          else
            for (int64_t i = 0; i < channels; ++i) store(to + i, (load(a[i]) + load(b[i])) + (load(c[i]) + load(d[i])));
        }
}

}  // namespace

void zero_holes(Tensor& x, const Tensor& mask) {
  const Holes holes(mask, x.size(1));
  const int64_t item = static_cast<int64_t>(x.element_size());
  char* bytes = mutable_data<char>(x);
  parallel_for(0, x.size(0) * x.size(2), holes.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      holes.in_row(row, [&](int64_t first, int64_t n) {
        std::memset(bytes + first * item, 0, n * item);
        return true;
      });
  });
}

// A producer of this library has already written zeros into the holes, so a look at the hole pixels alone mostly
// saves the copy.
Tensor select_valid(const Tensor& x, const Tensor& mask) {
  if (is_channels_last(x)) {
    bool clean = false;
    dispatch_float("partial_conv2d", x.scalar_type(), [&]<typename T>() {
      clean = holes_are_zero(data<T>(x), Holes(mask, x.size(1)), x.size(0) * x.size(2));
    });
    if (clean) return x;
  }
  Tensor copy = clone_channels_last(x);
  zero_holes(copy, mask);
  return copy;
}

Tensor concat_sources(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Ints& upsample) {
  const Tensor& first = sources[0];
  const int64_t n = first.size(0), h = first.size(2) * upsample[0], w = first.size(3) * upsample[0];
  int64_t channels = 0;
  for (const Tensor& s : sources) channels += s.size(1);
  Tensor out = empty_channels_last({n, channels, h, w}, first.scalar_type(), first);
  const int64_t item = static_cast<int64_t>(out.element_size());
  char* to = mutable_data<char>(out);
  int64_t at = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor x = select_valid(sources[i], masks[i]);
    const char* from = data<char>(x);
    const int64_t c = x.size(1), up = upsample[i];
    parallel_for(0, n * h, grain(w * c), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t source_row = (row / h) * (h / up) + (row % h) / up;
        for (int64_t x0 = 0; x0 < w; ++x0)
          std::memcpy(to + ((row * w + x0) * channels + at) * item, from + (source_row * (w / up) + x0 / up) * c * item,
                      c * item);
      }
    });
    at += c;
  }
  return out;
}

// The gradient of concat_sources: slices of the channels, summed over each 2 x 2 block where the source was upsampled.
void split_gradient(const Tensor& grad, const Ints& upsample, std::vector<Tensor>& grad_sources) {
  const int64_t channels = grad.size(1), w = grad.size(3);
  int64_t at = 0;
  for (size_t i = 0; i < grad_sources.size(); ++i) {
    Tensor& out = grad_sources[i];
    const int64_t c = out.size(1), up = upsample[i], sh = out.size(2), sw = out.size(3);
    dispatch_float("partial_conv2d", grad.scalar_type(), [&]<typename T>() {
      const T* from = data<T>(grad) + at;
      T* to = mutable_data<T>(out);
      parallel_for(0, out.size(0) * sh, grain(sw * c), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t x = 0; x < sw; ++x) {
            T* o = to + (row * sw + x) * c;
            const T* g = from + (row * up * w + x * up) * channels;
            if (up == 1) {
              std::memcpy(o, g, c * sizeof(T));
              continue;
            }
            const T *right = g + channels, *below = g + w * channels, *across = below + channels;
            for (int64_t k = 0; k < c; ++k)
              store(o + k, (load(g[k]) + load(right[k])) + (load(below[k]) + load(across[k])));
          }
      });
    });
    at += c;
  }
}

Tensor slice_weight(const Tensor& weight, int64_t first, int64_t channels) {
  if (channels == weight.size(1)) return channels_last(weight);
  Tensor view = weight;
  return clone_channels_last(torch::stable::narrow(view, 1, first, channels));
}

// (O, C, k, k) -> (4 O, channels, taps, taps), phase-major. Sums run in the accumulator type and are rounded once.
Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels) {
  const int64_t outputs = weight.size(0), taps = Fold(weight.size(2)).taps;
  Tensor out = empty_channels_last({4 * outputs, channels, taps, taps}, weight.scalar_type(), weight);
  const Tensor rows = channels_last(weight);
  dispatch_float("partial_conv2d", weight.scalar_type(), [&]<typename T>() {
    const T* from = data<T>(rows);
    T* to = mutable_data<T>(out);
    parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
      fold_outputs(from, to, Fold(weight.size(2)), outputs, weight.size(1), first, channels, begin, end);
    });
  });
  return out;
}

// Adjoint of fold_weight, into channels [first, first + C) of the channels_last gradient of the whole weight.
void unfold_gradient(const Tensor& grad_folded, int64_t first, Tensor& grad_weight) {
  const Fold fold(grad_weight.size(2));
  const int64_t outputs = grad_weight.size(0), total = grad_weight.size(1), k = fold.kernel, taps = fold.taps;
  const int64_t channels = grad_folded.size(1);
  dispatch_float("partial_conv2d", grad_weight.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const T* from = data<T>(grad_folded);
    T* to = mutable_data<T>(grad_weight);
    parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        for (int64_t u = 0; u < k; ++u)
          for (int64_t v = 0; v < k; ++v) {
            const T* f[4];
            for (int64_t phase = 0; phase < 4; ++phase)
              f[phase] =
                  from +
                  (((phase * outputs + o) * taps + fold.tap(phase / 2, u)) * taps + fold.tap(phase % 2, v)) * channels;
            T* g = to + ((o * k + u) * k + v) * total + first;
            for (int64_t c = 0; c < channels; ++c) {
              const A sum = (A(load(f[0][c])) + load(f[1][c])) + (A(load(f[2][c])) + load(f[3][c]));
              store(g + c, sum);
            }
          }
    });
  });
}

void place_gradient(const Tensor& grad_slice, int64_t first, Tensor& grad_weight) {
  const int64_t channels = grad_slice.size(1), total = grad_weight.size(1);
  const int64_t item = static_cast<int64_t>(grad_weight.element_size());
  const int64_t rows = grad_weight.numel() / std::max<int64_t>(1, total);
  const char* from = data<char>(grad_slice);
  char* to = mutable_data<char>(grad_weight);
  parallel_for(0, rows, grain(channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(to + (r * total + first) * item, from + r * channels * item, channels * item);
  });
}

void accumulate(Tensor& sum, const Tensor& term) {
  dispatch_float("partial_conv2d", sum.scalar_type(), [&]<typename T>() {
    T* s = mutable_data<T>(sum);
    const T* t = data<T>(term);
    parallel_for(0, sum.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) store(s + i, load(s[i]) + load(t[i]));
    });
  });
}

}  // namespace fused_inpaint::cpu
