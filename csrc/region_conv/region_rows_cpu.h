// SPDX-License-Identifier: Apache-2.0
// Convolution on the CPU as products of matrices whose rows are sorted by region. A row is what the taps of one
// location read, gathered through tables of coordinates that know padding, upsampling and stride; the rows of a region
// are multiplied with its filter alone, a hundred or two at a time, each lot on one thread. Backwards the same: what
// reads a pixel is gathered for it and multiplied with the transposed filter of its region.
//
// The gathering takes a twentieth of the product's time. Tiles of pixels would gather less, but each tile on the border
// of the regions would pay for both filters, and thin strokes are all border.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <vector>

#include "common/products.h"
#include "region_conv/region_conv.h"

namespace fused_inpaint::cpu {
namespace {

// Rows whose taps read holes only (or nothing), valid pixels only, or both.
enum Kind { kHole, kValid, kMixed, kKinds };

// Along one axis: the coordinates that each tap of each position reads. None in zero padding; several where positions
// of the output share a pixel, in a gradient.
struct Axis {
  int64_t positions = 0, taps = 0;
  std::vector<int32_t> first, at;  // the list of (position, tap) is at[first[i]] .. at[first[i + 1]]
  std::vector<uint8_t> run;        // whether a position's taps read one coordinate each, one after the other

  std::span<const int32_t> of(int64_t position, int64_t tap) const { return span(position * taps + tap, 1); }
  std::span<const int32_t> of(int64_t position) const { return span(position * taps, taps); }

 private:
  std::span<const int32_t> span(int64_t i, int64_t n) const { return {at.data() + first[i], at.data() + first[i + n]}; }
};

// visit(emit) calls emit(position, tap, coordinate), the same way each time.
template <typename F>
Axis make_axis(int64_t positions, int64_t taps, F&& visit) {
  Axis axis;
  axis.positions = positions;
  axis.taps = taps;
  axis.first.assign(positions * taps + 1, 0);
  visit([&](int64_t position, int64_t tap, int64_t) { ++axis.first[position * taps + tap + 1]; });
  for (size_t i = 1; i < axis.first.size(); ++i) axis.first[i] += axis.first[i - 1];
  axis.at.resize(axis.first.back());
  std::vector<int32_t> next(axis.first.begin(), axis.first.end() - 1);
  visit([&](int64_t position, int64_t tap, int64_t coordinate) {
    axis.at[next[position * taps + tap]++] = static_cast<int32_t>(coordinate);
  });
  axis.run.assign(positions, 1);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t t = 0; t < taps; ++t)
      axis.run[p] &= axis.of(p, t).size() == 1 && axis.of(p, t)[0] == axis.of(p, 0)[0] + t;
  return axis;
}

// What the convolution reads.
Axis windows(const Side& side) {
  return make_axis(side.positions(), side.taps(), [&](auto&& emit) {
    for (int64_t p = 0; p < side.positions(); ++p)
      for (int64_t t = 0; t < side.taps(); ++t)
        if (const int64_t i = side.source(p, t); i >= 0) emit(p, t, i);
  });
}

// The tap of `readers` that is tap `tap`, phase `phase` of the convolution: in the order in which they lie in the
// output.
int64_t reader_tap(const Side& side, int64_t tap, int64_t phase) {
  return (side.taps() - 1 - tap) * side.phases() + side.phases() - 1 - phase;
}

// What reads a pixel: coordinates of the output.
Axis readers(const Side& side) {
  return make_axis(side.size, side.taps() * side.phases(), [&](auto&& emit) {
    for (int64_t p = 0; p < side.positions(); ++p)
      for (int64_t t = 0; t < side.taps(); ++t)
        for (int64_t a = 0; a < side.phases(); ++a) {
          const int64_t i = side.source(p, t), to = side.target(p, a);
          if (i >= 0 && to >= 0 && to < side.out) emit(i, reader_tap(side, t, a), to);
        }
  });
}

// One value for each mask pixel or row: bit 0 for holes, bit 1 for valid pixels.
std::vector<uint8_t> own_regions(const Tensor& mask) {
  const uint8_t* m = data<uint8_t>(mask);
  std::vector<uint8_t> out(mask.numel());
  for (size_t i = 0; i < out.size(); ++i) out[i] = m[i] ? 2 : 1;
  return out;
}

// Of all that the taps of each (y, x) read under the mask.
std::vector<uint8_t> window_regions(const Tensor& mask, const Axis& y, const Axis& x) {
  const int64_t n = mask.size(0), h = mask.size(2), w = mask.size(3);
  const std::vector<uint8_t> own = own_regions(mask);
  std::vector<uint8_t> across(n * h * x.positions, 0), out(n * y.positions * x.positions, 0);
  for (int64_t row = 0; row < n * h; ++row)
    for (int64_t p = 0; p < x.positions; ++p)
      for (int32_t i : x.of(p)) across[row * x.positions + p] |= own[row * w + i];
  for (int64_t row = 0; row < n * y.positions; ++row)
    for (int32_t i : y.of(row % y.positions)) {
      const uint8_t* from = across.data() + (row / y.positions * h + i) * x.positions;
      for (int64_t p = 0; p < x.positions; ++p) out[row * x.positions + p] |= from[p];
    }
  return out;
}

// All rows of a batch, by kind and within a kind in their order. `regions` is of one sample or all.
struct Rows {
  std::vector<int32_t> order;
  std::array<int64_t, kKinds + 1> first{};

  Rows(const std::vector<uint8_t>& regions, int64_t rows) : order(rows) {
    STD_TORCH_CHECK(rows < int64_t{1} << 31, "region_conv2d: maps must have fewer than 2^31 pixels, got ", rows);
    const auto kind = [&](int64_t row) { return std::max(1, int{regions[row % regions.size()]}) - 1; };
    for (int64_t row = 0; row < rows; ++row) ++first[kind(row) + 1];
    for (int k = 0; k < kKinds; ++k) first[k + 1] += first[k];
    std::array<int64_t, kKinds + 1> next = first;
    for (int64_t row = 0; row < rows; ++row) order[next[kind(row)]++] = static_cast<int32_t>(row);
  }
  int64_t count(int kind) const { return first[kind + 1] - first[kind]; }
};

template <typename T>
FUSED_INPAINT_CLONES void add(acc_t<T>* __restrict sum, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += load(x[i]);
}

// The left operand. A row of one region holds, tap after tap, the channels of that region's map; a mixed row holds for
// each tap the channels of the valid map, then those of the hole's, of which a pixel fills one and leaves the other 0.
template <typename T>
struct Gather {
  const Axis &y, &x;
  int64_t h, w;                 // of the maps
  std::array<const T*, 2> map;  // hole, valid: (n, h, w, channels)
  std::array<int64_t, 2> channels;
  const uint8_t* mask = nullptr;  // of the maps' pixels, for mixed rows
  int64_t mask_n = 0;

  int64_t taps() const { return y.taps * x.taps; }
  int64_t width(int kind) const { return kind == kMixed ? channels[0] + channels[1] : channels[kind]; }

  // The taps [begin, end) of a row. `sum` has room for one tap.
  void row(int kind, int64_t row, int64_t begin, int64_t end, T* to, acc_t<T>* sum) const {
    const int64_t gx = row % x.positions, gy = row / x.positions % y.positions, n = row / x.positions / y.positions;
    for (int64_t t = begin; t < end;) {
      const int64_t u = t / x.taps, v = t % x.taps, rest = std::min(end - t, x.taps - v);
      const auto ys = y.of(gy, u);
      const bool run = ys.size() == 1 && x.run[gx] && kind != kMixed;
      if (run)
        std::memcpy(to, pixel(kind, n, ys[0], x.of(gx, v)[0]), rest * channels[kind] * sizeof(T));
      else
        tap(kind, n, ys, x.of(gx, v), to, sum);
      to += (run ? rest : 1) * width(kind);
      t += run ? rest : 1;
    }
  }

 private:
  const T* pixel(int region, int64_t n, int64_t i, int64_t j) const {
    return map[region] + ((n * h + i) * w + j) * channels[region];
  }
  void tap(int kind, int64_t n, std::span<const int32_t> ys, std::span<const int32_t> xs, T* to, acc_t<T>* sum) const {
    const size_t pixels = ys.size() * xs.size();
    const bool one = pixels == 1;
    if (one ? kind == kMixed : pixels == 0) std::memset(to, 0, width(kind) * sizeof(T));
    if (pixels == 0) return;
    if (!one) std::fill(sum, sum + width(kind), acc_t<T>(0));
    for (int32_t i : ys)
      for (int32_t j : xs) {
        const int region = kind == kMixed ? mask[((mask_n == 1 ? 0 : n) * h + i) * w + j] != 0 : kind;
        const int64_t at = kind == kMixed && region == kHole ? channels[kValid] : 0;
        if (one)
          std::memcpy(to + at, pixel(region, n, i, j), channels[region] * sizeof(T));
        else
          add(sum + at, pixel(region, n, i, j), channels[region]);
      }
    if (!one)
      for (int64_t c = 0; c < width(kind); ++c) store(to + c, sum[c]);
  }
};

// Rows of a product are padded to a multiple of this, so that few shapes occur whatever the mask.
constexpr int64_t kRowStep = 32;
int64_t padded_rows(int64_t n) { return ceil_div(n, kRowStep) * kRowStep; }

struct Chunk {
  int kind;
  int64_t begin, end;
};

// Rows of one product: 2 MiB of the left operand, which stay near the core, but enough rows that packing the filter for
// them costs little; of few rows in all, fewer at a time, for the sake of many threads.
int64_t chunk_rows(int64_t rows, int64_t bytes_per_row) {
  const int64_t fit = std::clamp<int64_t>((int64_t{1} << 21) / bytes_per_row, 128, 256);
  return padded_rows(std::min(fit, std::max<int64_t>(64, rows / 16)));
}

// scatter(kind, row, values) for each row's product with the (taps * width, outputs) matrix of its kind.
template <typename T, typename F>
void multiply_rows(const Gather<T>& g, const Rows& rows, const std::array<std::optional<Tensor>, kKinds>& weight,
                   F&& scatter) {
  std::vector<Chunk> chunks;
  int64_t most = 0, most_out = 0, widest = 0;
  // The dearest first, so that no thread is left with one at the end.
  for (int kind = kKinds - 1; kind >= 0; --kind) {
    if (!weight[kind] || rows.count(kind) == 0) continue;
    const int64_t depth = g.taps() * g.width(kind),
                  step = chunk_rows(rows.count(kind), depth * static_cast<int64_t>(sizeof(T)));
    for (int64_t begin = rows.first[kind]; begin < rows.first[kind + 1]; begin += step)
      chunks.push_back({kind, begin, std::min(begin + step, rows.first[kind + 1])});
    most = std::max(most, step * depth);
    most_out = std::max(most_out, step * weight[kind]->size(1));
    widest = std::max(widest, g.width(kind));
  }
  if (chunks.empty()) return;
  const Tensor& like = *weight[chunks[0].kind];
  share(static_cast<int64_t>(chunks.size()), [&](auto&& take) {
    Tensor left = empty({most}, like.scalar_type(), like), product = empty({most_out}, like.scalar_type(), like);
    std::vector<acc_t<T>> sum(widest);
    T *a = mutable_data<T>(left), *z = mutable_data<T>(product);
    for (int64_t i; (i = take()) >= 0;) {
      const auto [kind, begin, end] = chunks[i];
      const int64_t depth = g.taps() * g.width(kind), n = end - begin, m = padded_rows(n);
      const int64_t outputs = weight[kind]->size(1);
      for (int64_t r = 0; r < n; ++r) g.row(kind, rows.order[begin + r], 0, g.taps(), a + r * depth, sum.data());
      std::memset(a + n * depth, 0, (m - n) * depth * sizeof(T));
      multiply(matrix(a, m, depth, depth, 1, like), *weight[kind], matrix(z, m, outputs, outputs, 1, like));
      for (int64_t r = 0; r < n; ++r) scatter(kind, rows.order[begin + r], z + r * outputs);
    }
  });
}

// For a hole and for valid pixels: the sum over the rows of that kind of (their pixel of `of`)^T * (what their taps
// read), (channels, taps * width) in the accumulator's type. A pixel of `of` belongs to each row.
template <typename T>
std::array<Tensor, 2> multiply_transposed(const Gather<T>& g, const Rows& rows, std::array<const T*, 2> of,
                                          std::array<int64_t, 2> channels, std::array<bool, 2> wanted,
                                          const Tensor& like) {
  using A = acc_t<T>;
  constexpr int64_t kRows = 512, kColumns = 256, kItems = 16;
  struct Item {
    int kind;
    int64_t tap, taps, begin, end;
  };
  std::vector<Item> items;
  std::array<Tensor, 2> out;
  std::vector<int64_t> first{0};  // of each item's sums
  int64_t most = 0, most_out = 0, widest = 0;
  for (int kind : {kHole, kValid}) {
    const int64_t width = g.width(kind), taps = std::clamp<int64_t>(kColumns / width, 1, g.taps());
    // A kernel of few taps is cut along the rows too, for the sake of many threads.
    const int64_t cuts =
        std::clamp<int64_t>(kItems / ceil_div(g.taps(), taps), 1, ceil_div(rows.count(kind), kRows) + 1);
    const int64_t step = ceil_div(ceil_div(rows.count(kind), cuts), kRows) * kRows;
    out[kind] = empty({channels[kind], g.taps() * width}, wide(like.scalar_type()), like);
    torch::stable::zero_(out[kind]);
    if (!wanted[kind] || rows.count(kind) == 0) continue;
    for (int64_t tap = 0; tap < g.taps(); tap += taps)
      for (int64_t begin = rows.first[kind]; begin < rows.first[kind + 1]; begin += step) {
        const Item item{kind, tap, std::min(taps, g.taps() - tap), begin, std::min(begin + step, rows.first[kind + 1])};
        items.push_back(item);
        first.push_back(first.back() + channels[kind] * item.taps * width);
      }
    most = std::max(most, channels[kind]);
    most_out = std::max(most_out, taps * width);
    widest = std::max(widest, width);
  }
  std::vector<A> sums(first.back());
  share(static_cast<int64_t>(items.size()), [&](auto&& take) {
    Tensor left = empty({kRows * most}, like.scalar_type(), like),
           right = empty({kRows * most_out}, like.scalar_type(), like);
    Tensor product = empty({most * most_out}, like.scalar_type(), like);
    std::vector<A> sum(widest);
    T *a = mutable_data<T>(left), *b = mutable_data<T>(right), *p = mutable_data<T>(product);
    for (int64_t i; (i = take()) >= 0;) {
      const auto [kind, tap, taps, from, to] = items[i];
      const int64_t c = channels[kind], columns = taps * g.width(kind);
      A* total = sums.data() + first[i];
      std::fill(total, total + c * columns, A(0));
      for (int64_t begin = from; begin < to; begin += kRows) {
        const int64_t n = std::min(kRows, to - begin), m = padded_rows(n);
        for (int64_t r = 0; r < n; ++r) {
          const int64_t row = rows.order[begin + r];
          std::memcpy(a + r * c, of[kind] + row * c, c * sizeof(T));
          g.row(kind, row, tap, tap + taps, b + r * columns, sum.data());
        }
        std::memset(a + n * c, 0, (m - n) * c * sizeof(T));
        std::memset(b + n * columns, 0, (m - n) * columns * sizeof(T));
        multiply(matrix(a, c, m, 1, c, like), matrix(b, m, columns, columns, 1, like),
                 matrix(p, c, columns, columns, 1, like));
        add(total, p, c * columns);
      }
    }
  });
  for (size_t i = 0; i < items.size(); ++i) {
    const auto [kind, tap, taps, begin, end] = items[i];
    const int64_t width = g.width(kind), columns = taps * width;
    A* to = mutable_data<A>(out[kind]) + tap * width;
    for (int64_t c = 0; c < channels[kind]; ++c)
      add(to + c * g.taps() * width, sums.data() + first[i] + c * columns, columns);
  }
  return out;
}

}  // namespace
}  // namespace fused_inpaint::cpu
