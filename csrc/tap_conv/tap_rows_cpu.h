// SPDX-License-Identifier: Apache-2.0
// Convolution at the input's resolution on a CPU (tap_conv.h): bands of output rows, of a block of output channels
// each, go over the threads. The vendor multiplies a few input rows at a time with all taps' matrices into a ring of
// rows; an output row is summed from it as the tables of coordinates and weights say, first down the columns, then
// along the row. How the work is cut depends on the shape alone, and what a band gives not on the thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/exp.h"
#include "common/products.h"
#include "tap_conv/tap_conv.h"

namespace fused_inpaint::cpu {
namespace {

// One axis: the pixels of the input, with weights, that tap `tap` of an output's coordinate reads.
template <typename T>
struct TapAxis {
  struct Term {
    int32_t tap, from;
    T weight;
  };
  std::vector<int32_t> first;  // of each output's terms
  std::vector<Term> terms;
  std::vector<int32_t> least, most;  // `from` of each output's terms

  TapAxis(int64_t size, const TapConv& c) {
    const int64_t out = size * c.factor();
    for (int64_t i = 0; i < out; ++i) {
      first.push_back(static_cast<int32_t>(terms.size()));
      for (int64_t tap = 0; tap < c.kernel; ++tap)
        if (const int64_t up = padded(i + tap - c.kernel / 2, out, c.mode); up >= 0) add(tap, up, size, out, c);
      const auto by_pixel = [](const Term& a, const Term& b) { return a.from < b.from; };
      least.push_back(std::min_element(terms.begin() + first.back(), terms.end(), by_pixel)->from);
      most.push_back(std::max_element(terms.begin() + first.back(), terms.end(), by_pixel)->from);
    }
    first.push_back(static_cast<int32_t>(terms.size()));
  }
  int64_t count() const { return static_cast<int64_t>(least.size()); }
  // Rows that lie between the first and the last one read by an output, at most.
  int64_t span() const {
    int64_t n = 0;
    for (size_t i = 0; i < least.size(); ++i) n = std::max<int64_t>(n, most[i] - least[i] + 1);
    return n;
  }

 private:
  void add(int64_t tap, int64_t up, int64_t size, int64_t out, const TapConv& c) {
    const double at = c.upsampling == Upsampling::bilinear
                          ? static_cast<double>(up * (size - 1)) / static_cast<double>(std::max<int64_t>(out - 1, 1))
                          : static_cast<double>(up / c.factor());
    const int64_t low = static_cast<int64_t>(at);
    const double part = at - static_cast<double>(low);
    terms.push_back({static_cast<int32_t>(tap), static_cast<int32_t>(low), static_cast<T>(1 - part)});
    if (part > 0) terms.push_back({static_cast<int32_t>(tap), static_cast<int32_t>(low + 1), static_cast<T>(part)});
  }
};

template <typename T>
struct Vectors {
  typedef T type __attribute__((vector_size(32)));
  typedef T stored __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
  static constexpr int64_t lanes = 32 / sizeof(T);
};

// What an output row is summed from: at each input column, a row of the products at this tap, with this weight.
template <typename T>
struct Line {
  const int32_t* rows;  // of the columns
  int64_t tap;          // where the tap's values begin in a row
  T weight;
};

// The weighted sum down each column, (columns, n). A row of the products has `depth` values. `from` has room for a
// pointer to each line.
template <typename T>
FUSED_INPAINT_CLONES void sum_lines(const std::vector<Line<T>>& lines, const T* products, int64_t depth, const T** from,
                                    T* to, int64_t n, int64_t columns) {
  using V = typename Vectors<T>::type;
  using S = typename Vectors<T>::stored;
  constexpr int64_t lanes = Vectors<T>::lanes;
  const int64_t count = static_cast<int64_t>(lines.size());
  for (int64_t column = 0; column < columns; ++column, to += n) {
    for (int64_t i = 0; i < count; ++i) from[i] = products + lines[i].rows[column] * depth + lines[i].tap;
    int64_t c = 0;
    for (; c + 2 * lanes <= n; c += 2 * lanes) {
      V a{}, b{};
      for (int64_t i = 0; i < count; ++i) {
        a += *reinterpret_cast<const S*>(from[i] + c) * lines[i].weight;
        b += *reinterpret_cast<const S*>(from[i] + c + lanes) * lines[i].weight;
      }
      *reinterpret_cast<S*>(to + c) = a;
      *reinterpret_cast<S*>(to + c + lanes) = b;
    }
    for (; c < n; ++c) {
      T a = 0;
      for (int64_t i = 0; i < count; ++i) a += from[i][c] * lines[i].weight;
      to[c] = a;
    }
  }
}

template <TapActivation activation, typename T>
FUSED_INPAINT_INLINE T activated(T v, T slope) {
  if constexpr (activation == TapActivation::relu) return v < 0 ? T(0) : v;  // a NaN stays one
  if constexpr (activation == TapActivation::leaky_relu) return v < 0 ? v * slope : v;
  if constexpr (activation == TapActivation::elu) {
    // One of the two is 0. A choice between two results would become a branch, and the loop no vectors.
    const T above = v > 0 ? v : T(0), below = v > 0 ? T(0) : v;
    return above + exp_minus_one(below);
  }
  return v;
}

// Values [c, c + count vectors) of the sum that is one output.
template <int count, typename T, typename Term>
FUSED_INPAINT_INLINE void sum_terms(const Term* begin, const Term* end, const T* down, int64_t column, int64_t tap,
                                    const T* bias, T* y, int64_t c) {
  using V = typename Vectors<T>::type;
  using S = typename Vectors<T>::stored;
  constexpr int64_t lanes = Vectors<T>::lanes;
  V sum[count];
  for (int k = 0; k < count; ++k) sum[k] = *reinterpret_cast<const S*>(bias + c + k * lanes);
  for (const Term* t = begin; t < end; ++t) {
    const T* from = down + t->from * column + t->tap * tap + c;
    for (int k = 0; k < count; ++k) sum[k] += *reinterpret_cast<const S*>(from + k * lanes) * t->weight;
  }
  for (int k = 0; k < count; ++k) *reinterpret_cast<S*>(y + c + k * lanes) = sum[k];
}

// An output row: `down` (input columns, taps, n) summed along the row, with bias and activation, to y (columns,
// stride). A pixel of `down` has `column` values, a tap `tap`.
template <TapActivation activation, typename T>
FUSED_INPAINT_CLONES void finish_row(const TapAxis<T>& axis, const T* down, int64_t column, int64_t tap, const T* bias,
                                     T slope, T* y, int64_t stride, int64_t n) {
  constexpr int64_t lanes = Vectors<T>::lanes;
  for (int64_t j = 0; j < axis.count(); ++j, y += stride) {
    const auto *begin = axis.terms.data() + axis.first[j], *end = axis.terms.data() + axis.first[j + 1];
    int64_t c = 0;
    for (; c + 4 * lanes <= n; c += 4 * lanes) sum_terms<4>(begin, end, down, column, tap, bias, y, c);
    for (; c + lanes <= n; c += lanes) sum_terms<1>(begin, end, down, column, tap, bias, y, c);
    for (; c < n; ++c) {
      T sum = bias[c];
      for (const auto* t = begin; t < end; ++t) sum += down[t->from * column + t->tap * tap + c] * t->weight;
      y[c] = sum;
    }
    if constexpr (activation != TapActivation::none)
      if (n != stride)
        for (c = 0; c < n; ++c) y[c] = activated<activation>(y[c], slope);
  }
  // Of few channels, a pixel is no vector.
  if constexpr (activation != TapActivation::none)
    if (n == stride) {
      y -= axis.count() * stride;
      for (int64_t i = 0; i < axis.count() * n; ++i) y[i] = activated<activation>(y[i], slope);
    }
}

template <typename T, typename... Rest>
void finish(const TapConv& c, const Rest&... rest) {
  switch (c.activation) {
    case TapActivation::none:
      return finish_row<TapActivation::none, T>(rest...);
    case TapActivation::relu:
      return finish_row<TapActivation::relu, T>(rest...);
    case TapActivation::leaky_relu:
      return finish_row<TapActivation::leaky_relu, T>(rest...);
    case TapActivation::elu:
      return finish_row<TapActivation::elu, T>(rest...);
  }
}

// How the work is cut, by the shape alone.
struct Cut {
  int64_t block, blocks;  // output channels of an item, and of these blocks how many
  int64_t column;         // values of one tap row at a pixel: (taps, block), with room to a whole vector
  int64_t band, bands;    // output rows of an item
  int64_t group, ring;    // input rows multiplied at a time, and kept

  Cut(const TapConv& c, int64_t span, int64_t value_bytes) {
    constexpr int64_t kBlock = 32, kItems = 8, kGroupBytes = int64_t{1} << 20;
    const int64_t lanes = 32 / value_bytes, out = c.h * c.factor();
    block = std::min(c.outputs, kBlock);
    blocks = ceil_div(c.outputs, block);
    column = ceil_div(c.kernel * block, lanes) * lanes;
    bands = std::min(ceil_div(kItems, c.n * blocks), ceil_div(out, 16));
    band = ceil_div(out, bands);
    bands = ceil_div(out, band);
    group = std::clamp<int64_t>(kGroupBytes / (c.w * c.kernel * column * value_bytes), 1, c.h);
    ring = ceil_div(span - 1 + group, group) * group;
  }
};

// (blocks, taps down, column, C) of the channels [first, first + channels) of the weight (O, C, k, k), which lies with
// channels last: rows of zeros fill up.
template <typename T>
Tensor right_operand(const Tensor& weight, int64_t first, int64_t channels, const TapConv& c, const Cut& cut) {
  Tensor out = empty({cut.blocks * c.kernel * cut.column, channels}, weight.scalar_type(), weight);
  const int64_t all = weight.size(1);
  const T* from = data<T>(weight) + first;
  T* to = mutable_data<T>(out);
  parallel_for(0, cut.blocks * c.kernel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      for (int64_t i = 0; i < cut.column; ++i) {
        const int64_t tap = i / cut.block, o = item / c.kernel * cut.block + i % cut.block;
        T* row = to + (item * cut.column + i) * channels;
        if (tap < c.kernel && o < c.outputs)
          std::memcpy(row, from + ((o * c.kernel + item % c.kernel) * c.kernel + tap) * all, channels * sizeof(T));
        else
          std::memset(row, 0, channels * sizeof(T));
      }
  });
  return out;
}

// The maps that stand side by side for the pixels of a region, and the weight's channels that are theirs.
struct TapSource {
  std::vector<Tensor> maps;
  int64_t first;

  int64_t channels() const {
    int64_t n = 0;
    for (const Tensor& m : maps) n += m.size(1);
    return n;
  }
};

// The convolution: of one source, or of two between which a mask (1 or N, 1, H, W) chooses at each pixel, the first one
// where it is 0.
template <typename T>
class Bands {
 public:
  Bands(const TapConv& conv, const std::vector<TapSource>& sources, const Tensor* mask, const Tensor& weight,
        const T* bias, T* y)
      : c_(conv),
        rows_(c_.h, c_),
        columns_(c_.w, c_),
        cut_(c_, rows_.span(), sizeof(T)),
        like_(weight),
        mask_(mask ? data<uint8_t>(*mask) : nullptr),
        mask_n_(mask ? mask->size(0) : 0),
        bias_(bias),
        y_(y) {
    for (const TapSource& s : sources) {
      Kind kind{{}, {}, s.channels(), right_operand<T>(weight, s.first, s.channels(), c_, cut_)};
      for (const Tensor& m : s.maps) {
        kind.from.push_back(data<T>(m));
        kind.channels.push_back(m.size(1));
      }
      widest_ = std::max(widest_, kind.width);
      kinds_.push_back(kind);
    }
  }

  void run() const {
    share(c_.n * cut_.blocks * cut_.bands, [&](auto&& take) {
      Scratch s{empty({cut_.ring * c_.w * depth()}, like_.scalar_type(), like_),
                empty({in_place(kinds_[0]) ? 0 : cut_.group * c_.w * widest_}, like_.scalar_type(), like_),
                std::vector<T>(c_.w * cut_.column),
                std::vector<int32_t>(cut_.ring * c_.w),
                {},
                {}};
      for (int64_t i; (i = take()) >= 0;)
        item(i / cut_.bands / cut_.blocks, i / cut_.bands % cut_.blocks, i % cut_.bands, s);
    });
  }

 private:
  struct Kind {
    std::vector<const T*> from;
    std::vector<int64_t> channels;  // of each map
    int64_t width;                  // of all
    Tensor right;
  };
  struct Scratch {
    Tensor products, left;
    std::vector<T> down;
    std::vector<int32_t> index;  // of the pixels in the ring: their row of the products
    std::vector<Line<T>> lines;
    std::vector<const T*> from;
  };
  const TapConv& c_;
  const TapAxis<T> rows_, columns_;
  const Cut cut_;
  const Tensor& like_;
  const uint8_t* mask_;
  int64_t mask_n_, widest_ = 0;
  const T* bias_;
  T* y_;
  std::vector<Kind> kinds_;

  int64_t depth() const { return c_.kernel * cut_.column; }  // values of all taps at a pixel
  bool in_place(const Kind& kind) const { return !mask_ && kind.from.size() == 1; }

  void item(int64_t n, int64_t block, int64_t band, Scratch& s) const {
    const int64_t out_h = c_.h * c_.factor(), out_w = c_.w * c_.factor();
    const int64_t begin = band * cut_.band, end = std::min(begin + cut_.band, out_h);
    const int64_t outputs = std::min(cut_.block, c_.outputs - block * cut_.block), start = rows_.least[begin];
    int64_t done = start;
    for (int64_t i = begin; i < end; ++i) {
      while (done <= rows_.most[i]) {
        const int64_t count = std::min<int64_t>(cut_.group, rows_.most[end - 1] + 1 - done);
        multiply_group(n, block, done, count, (done - start) % cut_.ring, s);
        done += count;
      }
      s.lines.clear();
      for (int32_t t = rows_.first[i]; t < rows_.first[i + 1]; ++t) {
        const auto& term = rows_.terms[t];
        s.lines.push_back(
            {s.index.data() + (term.from - start) % cut_.ring * c_.w, term.tap * cut_.column, term.weight});
      }
      s.from.resize(s.lines.size());
      sum_lines(s.lines, data<T>(s.products), depth(), s.from.data(), s.down.data(), cut_.column, c_.w);
      finish<T>(c_, columns_, s.down.data(), cut_.column, cut_.block, bias_ + block * cut_.block,
                static_cast<T>(c_.slope), y_ + (n * out_h + i) * out_w * c_.outputs + block * cut_.block, c_.outputs,
                outputs);
    }
  }

  // Input rows [first, first + count) into the ring from `slot` on.
  void multiply_group(int64_t n, int64_t block, int64_t first, int64_t count, int64_t slot, Scratch& s) const {
    const int64_t pixel = (n * c_.h + first) * c_.w, pixels = count * c_.w;
    const uint8_t* mask = mask_ ? mask_ + ((mask_n_ == 1 ? 0 : n) * c_.h + first) * c_.w : nullptr;
    int32_t* index = s.index.data() + slot * c_.w;
    int64_t row = slot * c_.w;
    for (size_t k = 0; k < kinds_.size(); ++k) {
      const Kind& kind = kinds_[k];
      T* const left = mutable_data<T>(s.left);
      const int64_t begin = row;
      for (int64_t p = 0; p < pixels; ++p) {
        if (mask && (mask[p] != 0) != (k == 1)) continue;
        index[p] = static_cast<int32_t>(row);
        if (!in_place(kind)) {
          T* to = left + (row - begin) * kind.width;
          for (size_t m = 0; m < kind.from.size(); to += kind.channels[m++])
            std::memcpy(to, kind.from[m] + (pixel + p) * kind.channels[m], kind.channels[m] * sizeof(T));
        }
        ++row;
      }
      if (row == begin) continue;
      const T* operand = in_place(kind) ? kind.from[0] + pixel * kind.width : left;
      multiply(matrix(operand, row - begin, kind.width, kind.width, 1, like_),
               matrix(data<T>(kind.right) + block * depth() * kind.width, kind.width, depth(), 1, kind.width, like_),
               matrix(mutable_data<T>(s.products) + begin * depth(), row - begin, depth(), depth(), 1, like_));
    }
  }
};

// y of the bias (O,) in weight's dtype or none, where it is not empty.
template <typename T>
void convolve_taps(const TapConv& c, const std::vector<TapSource>& sources, const Tensor* mask, const Tensor& weight,
                   const T* bias, Tensor& y) {
  const std::vector<T> zeros(bias ? 0 : c.outputs, T(0));
  Bands<T>(c, sources, mask, channels_last(weight), bias ? bias : zeros.data(), mutable_data<T>(y)).run();
}

}  // namespace
}  // namespace fused_inpaint::cpu
