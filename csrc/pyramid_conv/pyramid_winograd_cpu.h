// SPDX-License-Identifier: Apache-2.0
// A dilated 3x3 convolution on the CPU by Winograd's F(2x2, 3x3): a tile of 4 x 4 pixels, `dilation` apart, gives 2 x 2
// outputs by 16 products where the direct form takes 36. The products are one 1x1 convolution with 16 groups, by the
// vendor, on (tile, 16, channels). Tiles gather their pixels through tables of coordinates that know the padding, and
// write their outputs, activated, to where they belong. Rounding is that of the direct form: the transforms of the
// input and the output only add.
//
// A NaN or an infinity reaches all outputs of its tile.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "pyramid_conv/pyramid_conv.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;

#ifndef PYR_M
#define PYR_M 4
#endif
constexpr int kOut = PYR_M, kIn = kOut + 2, kTaps = kIn * kIn;

// The tiles along one axis: the coordinates that each reads (-1: zero) and writes (-1: none).
struct TileAxis {
  std::vector<std::array<int32_t, kIn>> from;
  std::vector<std::array<int32_t, kOut>> to;

  TileAxis(int64_t size, int64_t dilation, Padding mode) {
    for (int64_t i = 0; i < size; ++i) {
      if (i / dilation % kOut != 0) continue;
      const int64_t outputs = std::min<int64_t>(ceil_div(size - i, dilation), kOut);
      from.emplace_back().fill(-1);
      to.emplace_back().fill(-1);
      for (int64_t k = 0; k < outputs; ++k) to.back()[k] = static_cast<int32_t>(i + k * dilation);
      for (int64_t k = 0; k < outputs + 2; ++k)
        from.back()[k] = static_cast<int32_t>(padded(i + (k - 1) * dilation, size, mode));
    }
  }
};

struct Tiles {
  TileAxis y, x;
  int64_t n, h, w;

  Tiles(const Pyramid& p, int64_t dilation)
      : y(p.h, dilation, p.mode), x(p.w, dilation, p.mode), n(p.n), h(p.h), w(p.w) {}
  int64_t count() const { return n * static_cast<int64_t>(y.to.size() * x.to.size()); }
  // Calls visit(i, pixel) for the pixels that a tile reads or writes; -1 for none.
  template <typename F>
  FUSED_INPAINT_INLINE void read(int64_t tile, F&& visit) const {
    each<kIn>(tile, y.from, x.from, visit);
  }
  template <typename F>
  FUSED_INPAINT_INLINE void written(int64_t tile, F&& visit) const {
    each<kOut>(tile, y.to, x.to, visit);
  }

 private:
  template <int side, typename Table, typename F>
  FUSED_INPAINT_INLINE void each(int64_t tile, const Table& rows, const Table& columns, F&& visit) const {
    const int64_t across = static_cast<int64_t>(columns.size()), down = static_cast<int64_t>(rows.size());
    const auto &i = rows[tile / across % down], &j = columns[tile % across];
    const int64_t first = tile / across / down * h;
    for (int u = 0; u < side; ++u)
      for (int v = 0; v < side; ++v) visit(u * side + v, i[u] < 0 || j[v] < 0 ? -1 : (first + i[u]) * w + j[v]);
  }
};

// The transforms along one axis, of points 0, 1, -1, 1/2, -2 and infinity
#if PYR_M == 4
constexpr double kOfInput[6][6] = {{2, -3, -4, 3, 2, 0},    {0, -2, 1, 5, 2, 0},  {0, -2, 5, -1, -2, 0},
                                   {0, 32, 16, -32, -16, 0}, {0, 1, -2, -1, 2, 0}, {0, 2, -3, -4, 3, 2}};
constexpr double kOfFilter[6][3] = {{1. / 2, 0, 0},
                                    {1. / 6, 1. / 6, 1. / 6},
                                    {1. / 6, -1. / 6, 1. / 6},
                                    {1. / 15, 1. / 30, 1. / 60},
                                    {1. / 30, -1. / 15, 2. / 15},
                                    {0, 0, 1. / 2}};
constexpr double kToOutput[4][6] = {
    {1, 1, 1, 1, 1, 0}, {0, 1, -1, .5, -2, 0}, {0, 1, 1, .25, 4, 0}, {0, 1, -1, .125, -8, 1}};
#else
constexpr double kOfInput[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
constexpr double kOfFilter[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
constexpr double kToOutput[2][4] = {{1, 1, 1, 0}, {0, 1, -1, 1}};
#endif

template <int R, int C, const double (&m)[R][C], bool transposed = false>
struct Transform {
  static constexpr int from = transposed ? R : C, to = transposed ? C : R;
  static constexpr double entry(int i, int j) { return transposed ? m[j][i] : m[i][j]; }
  template <typename T, typename V>
  FUSED_INPAINT_INLINE static void run(const V* v, int s, V* o, int t) {
#pragma GCC unroll 6
    for (int i = 0; i < to; ++i) {
      V sum{};
      bool first = true;
#pragma GCC unroll 6
      for (int j = 0; j < from; ++j) {
        const double e = entry(i, j);
        if (e == 0) continue;
        const V& x = v[j * s];
        const V term = e == 1 || e == -1 ? x : x * static_cast<T>(e < 0 ? -e : e);
        sum = first ? (e < 0 ? -term : term) : e < 0 ? sum - term : sum + term;
        first = false;
      }
      o[i * t] = sum;
    }
  }
};
using Input = Transform<kIn, kIn, kOfInput>;
using InputAdjoint = Transform<kIn, kIn, kOfInput, true>;
using Filter = Transform<kIn, 3, kOfFilter>;
using Output = Transform<kOut, kIn, kToOutput>;
using OutputAdjoint = Transform<kOut, kIn, kToOutput, true>;

template <typename Along, typename T, typename V>
FUSED_INPAINT_INLINE void both_axes(const V* from, V* to) {
  V half[Along::from * Along::to];
#pragma GCC unroll 6
  for (int i = 0; i < Along::from; ++i) Along::template run<T>(from + i * Along::from, 1, half + i * Along::to, 1);
#pragma GCC unroll 6
  for (int j = 0; j < Along::to; ++j) Along::template run<T>(half + j, Along::to, to + j, Along::to);
}

// Vectors of 32 bytes, or of what the machine has in their place, and the same where they lie in memory. The compiler
// makes none of its own of loops over this many rows.
template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(32)));
  typedef T stored __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
};
template <typename T>
struct Lane {
  using type = T;
  using stored = T;
};

template <typename L, typename T>
FUSED_INPAINT_INLINE const typename L::stored& at(const T* p) {
  return *reinterpret_cast<const typename L::stored*>(p);
}
template <typename L, typename T>
FUSED_INPAINT_INLINE typename L::stored& at(T* p) {
  return *reinterpret_cast<typename L::stored*>(p);
}

// What becomes of a value of channel c: stored; stored with the bias and the activation; or added to what is there.
struct Store {
  template <typename L, typename T>
  FUSED_INPAINT_INLINE void put(const typename L::type& v, T* to, int64_t) const {
    at<L>(to) = v;
  }
};
template <typename T, bool relu>
struct Finish {
  const T* bias;
  template <typename L>
  FUSED_INPAINT_INLINE void put(const typename L::type& v, T* to, int64_t c) const {
    const typename L::type sum = v + at<L>(bias + c);
    at<L>(to) = relu ? (sum < 0 ? typename L::type{} : sum) : sum;  // a NaN stays one
  }
};
struct Add {
  template <typename L, typename T>
  FUSED_INPAINT_INLINE void put(const typename L::type& v, T* to, int64_t) const {
    at<L>(to) += v;
  }
};

template <typename Along, typename L, typename T, typename F>
FUSED_INPAINT_INLINE void transform_at(const T* const* from, T* const* to, int64_t c, const F& finish) {
  constexpr int in = Along::from * Along::from, out = Along::to * Along::to;
  typename L::type before[in], after[out];
#pragma GCC unroll 36
  for (int i = 0; i < in; ++i) before[i] = at<L>(from[i] + c);
  both_axes<Along, T>(before, after);
#pragma GCC unroll 36
  for (int i = 0; i < out; ++i) finish.template put<L>(after[i], to[i] + c, c);
}

// For the channels [0, n) of one tile: reads from[i][c], transforms along both axes, and puts the results to to[i] + c.
template <typename Along, typename T, typename F>
FUSED_INPAINT_INLINE void transform(const T* const* from, T* const* to, int64_t n, const F& finish) {
  constexpr int64_t lanes = sizeof(typename Lanes<T>::type) / sizeof(T);
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) transform_at<Along, Lanes<T>>(from, to, c, finish);
  for (; c < n; ++c) transform_at<Along, Lane<T>>(from, to, c, finish);
}

// The pointers of one tile: `at` and then every n.
template <int count, typename T>
struct Rows {
  T* at[count];
  FUSED_INPAINT_INLINE Rows(T* first, int64_t n) {
    for (int i = 0; i < count; ++i) at[i] = first + i * n;
  }
};

// x (pixels, n) to the tiles [begin, end), (tile, 16, n). `zero` has n of them.
template <typename T>
FUSED_INPAINT_CLONES void gather_input(const Tiles& tiles, const T* x, const T* zero, T* to, int64_t n, int64_t begin,
                                       int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile, to += kTaps * n) {
    const T* from[kTaps];
    tiles.read(tile, [&](int i, int64_t pixel) { from[i] = pixel < 0 ? zero : x + pixel * n; });
    transform<Input>(from, Rows<kTaps, T>(to, n).at, n, Store{});
  }
}

// The gradient of the outputs (pixels, n) likewise.
template <typename T>
FUSED_INPAINT_CLONES void gather_output(const Tiles& tiles, const T* grad, const T* zero, T* to, int64_t n,
                                        int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile, to += kTaps * n) {
    const T* from[kOut * kOut];
    tiles.written(tile, [&](int i, int64_t pixel) { from[i] = pixel < 0 ? zero : grad + pixel * n; });
    transform<OutputAdjoint>(from, Rows<kTaps, T>(to, n).at, n, Store{});
  }
}

// Products (tile, 16, n) to y (pixels, stride). What belongs nowhere goes into `nowhere`, of n.
template <typename T, bool relu>
FUSED_INPAINT_CLONES void scatter_output(const Tiles& tiles, const T* products, const T* bias, T* y, int64_t stride,
                                         T* nowhere, int64_t n, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile, products += kTaps * n) {
    T* to[kOut * kOut];
    tiles.written(tile, [&](int i, int64_t pixel) { to[i] = pixel < 0 ? nowhere : y + pixel * stride; });
    transform<Output>(Rows<kTaps, const T>(products, n).at, to, n, Finish<T, relu>{bias});
  }
}

// Adds the gradient of the tiles (tile, 16, n) to that of x (pixels, n), in the channels [first, first + count).
template <typename T>
FUSED_INPAINT_CLONES void scatter_input(const Tiles& tiles, const T* products, T* grad, T* nowhere, int64_t n,
                                        int64_t first, int64_t count, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile, products += kTaps * n) {
    T* to[kTaps];
    tiles.read(tile, [&](int i, int64_t pixel) { to[i] = pixel < 0 ? nowhere : grad + pixel * n + first; });
    transform<InputAdjoint>(Rows<kTaps, const T>(products + first, n).at, to, count, Add{});
  }
}

// (O, C, 3, 3) channels last to (16 O, C, 1, 1).
template <typename T>
FUSED_INPAINT_CLONES void transform_filters(const T* weight, T* to, int64_t n, int64_t outputs, int64_t begin,
                                            int64_t end) {
  for (int64_t o = begin; o < end; ++o)
    transform<Filter>(Rows<9, const T>(weight + o * 9 * n, n).at, Rows<kTaps, T>(to + o * n, outputs * n).at, n,
                      Store{});
}

template <typename T>
Tensor filters_of(const Tensor& weight) {
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  Tensor out = empty_channels_last({kTaps * outputs, channels, 1, 1}, weight.scalar_type(), weight);
  const T* from = data<T>(weight);
  T* to = mutable_data<T>(out);
  parallel_for(0, outputs, 1,
               [&](int64_t begin, int64_t end) { transform_filters(from, to, channels, outputs, begin, end); });
  return out;
}

// torch leaves 1x1 convolutions to oneDNN on a single thread, too, from this batch on.
constexpr int64_t kBatch = 16;
const ConvGeometry kProducts{{1, 1}, {0, 0}, {1, 1}, kTaps};

// The tiles of one product, and the memory that all of a call take turns in: as much as stays in the caches between the
// passes, for enough tiles to be worth packing the filters for.
class Workspace {
 public:
  explicit Workspace(const Tensor& x)
      : bytes_(int64_t{getenv("PYR_CHUNK") ? atoi(getenv("PYR_CHUNK")) : 4096} << 10), memory_(empty({bytes_}, ScalarType::Byte, x)), dtype_(x.scalar_type()) {}

  // Calls body(first, last) for all tiles, a chunk at a time.
  template <typename F>
  void for_chunks(const Tiles& tiles, int64_t channels, F&& body) const {
    const int64_t count = tiles.count(), most = std::max<int64_t>(bytes_ / (kTaps * channels * size()), kBatch);
    const int64_t step = ceil_div(ceil_div(count, ceil_div(count, most)), kBatch) * kBatch;
    for (int64_t first = 0; first < count; first += step) body(first, std::min(first + step, count));
  }
  // (16, 16 channels, 1, tiles / 16), which lies as (tile, 16, channels). 
  Tensor operand(int64_t channels, int64_t tiles) {
    const int64_t c = kTaps * channels, w = ceil_div(tiles, kBatch), bytes = kBatch * w * c * size();
    if (bytes > memory_.numel()) memory_ = empty({bytes}, ScalarType::Byte, memory_);
    return torch::stable::from_blob(memory_.mutable_data_ptr(), Ints{kBatch, c, 1, w}, Ints{c * w, 1, c * w, c},
                                    memory_.device(), dtype_);
  }

 private:
  int64_t size() const { return dtype_ == ScalarType::Double ? 8 : 4; }
  int64_t bytes_;
  Tensor memory_;
  ScalarType dtype_;
};

// Adds x (n, c, h, w) by one branch to the channels of y that begin at `to`, `stride` to the next pixel.
template <typename T>
void winograd(const Tiles& tiles, const Tensor& x, const Tensor& weight, const T* bias, bool relu, T* to,
              int64_t stride, Workspace& space) {
  const int64_t channels = weight.size(1), outputs = weight.size(0);
  const std::vector<T> zero(channels, T(0));
  const Tensor filters = filters_of<T>(weight);
  const T* from = data<T>(x);
  space.for_chunks(tiles, channels, [&](int64_t first, int64_t last) {
    Tensor operand = space.operand(channels, last - first);
    T* const spread = mutable_data<T>(operand);
    parallel_for(first, last, 8, [&](int64_t begin, int64_t end) {
      gather_input(tiles, from, zero.data(), spread + (begin - first) * kTaps * channels, channels, begin, end);
    });
    const Tensor result = aten_convolution(operand, filters, kProducts);
    const T* const products = data<T>(result);
    parallel_for(first, last, 8, [&](int64_t begin, int64_t end) {
      std::vector<T> nowhere(outputs);
      const auto scatter = relu ? scatter_output<T, true> : scatter_output<T, false>;
      scatter(tiles, products + (begin - first) * kTaps * outputs, bias, to, stride, nowhere.data(), outputs, begin,
              end);
    });
  });
}

// Adds to grad_x (n, c, h, w) what comes back from grad (n, outputs, h, w).
template <typename T>
void winograd_backward(const Tiles& tiles, const Tensor& grad, const Tensor& weight, T* grad_x, Workspace& space) {
  // A thread takes some of the channels, so that each value is summed in one order.
  constexpr int64_t kChannels = 32;
  const int64_t channels = weight.size(1), outputs = weight.size(0);
  const std::vector<T> zero(outputs, T(0));
  const Tensor filters = filters_of<T>(weight);
  const T* from = data<T>(grad);
  space.for_chunks(tiles, channels, [&](int64_t first, int64_t last) {
    Tensor operand = space.operand(outputs, last - first);
    T* const spread = mutable_data<T>(operand);
    parallel_for(first, last, 8, [&](int64_t begin, int64_t end) {
      gather_output(tiles, from, zero.data(), spread + (begin - first) * kTaps * outputs, outputs, begin, end);
    });
    // Of the input only the size is looked at.
    const Tensor like = empty_channels_last({kBatch, kTaps * channels, 1, operand.size(3)}, grad.scalar_type(), grad);
    const auto result = aten_convolution_backward(operand, like, filters, kProducts, true, false);
    const T* const products = data<T>(*std::get<0>(result));
    parallel_for(0, ceil_div(channels, kChannels), 1, [&](int64_t begin, int64_t end) {
      T nowhere[kChannels]{};
      for (int64_t c = begin * kChannels; c < std::min(end * kChannels, channels); c += kChannels)
        scatter_input(tiles, products, grad_x, nowhere, channels, c, std::min(kChannels, channels - c), first, last);
    });
  });
}

}  // namespace
}  // namespace fused_inpaint::cpu
