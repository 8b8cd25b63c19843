// SPDX-License-Identifier: Apache-2.0
// A dilated 3x3 convolution on the CPU by Winograd's F(2x2, 3x3): a tile of 4 x 4 pixels, `dilation` apart, gives 2 x 2
// outputs by 16 products where the direct form takes 36. The products are a 1x1 convolution of 16 groups on (tile, 16,
// channels), by the vendor. Tiles read their pixels through tables of coordinates that know the padding, and write
// their outputs, activated, to their places. The transforms add and halve: rounding is no worse than the direct form's.
//
// A NaN or an infinity reaches all outputs of the tiles that read it.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "pyramid_conv/pyramid_conv.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int kOut = 2, kIn = 4, kTaps = kIn * kIn;

// The tiles along one axis: the coordinates that each reads (-1: 0 is read) and writes (-1: none).
struct TileAxis {
  std::vector<std::array<int32_t, kIn>> from;
  std::vector<std::array<int32_t, kOut>> to;

  TileAxis(int64_t size, int64_t dilation, Padding mode) {
    const auto source = [&](int64_t i) { return static_cast<int32_t>(padded(i, size, mode)); };
    for (int64_t i = 0; i < size; ++i) {
      if (i / dilation % kOut != 0) continue;
      const int64_t second = i + dilation;
      // The last coordinate is read for the second output alone.
      const int32_t last = second < size ? source(second + dilation) : -1;
      from.push_back({source(i - dilation), source(i), source(second), last});
      to.push_back({source(i), second < size ? source(second) : -1});
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

// y = kToOutput ((kOfFilter g kOfFilter^T) * (kOfInput d kOfInput^T)) kToOutput^T
constexpr float kOfInput[kIn][kIn] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
constexpr float kOfFilter[kIn][3] = {{1, 0, 0}, {.5f, .5f, .5f}, {.5f, -.5f, .5f}, {0, 0, 1}};
constexpr float kToOutput[kOut][kIn] = {{1, 1, 1, 0}, {0, 1, -1, 1}};

// One axis: a matrix, or its transpose, times values that lie a stride apart.
template <int R, int C, const float (&matrix)[R][C], bool transposed = false>
struct Transform {
  static constexpr int from = transposed ? R : C, to = transposed ? C : R;
  template <typename V, typename T>
  FUSED_INPAINT_INLINE static void run(const V* v, int stride, V* out, int out_stride) {
#pragma GCC unroll 4
    for (int i = 0; i < to; ++i) {
      V sum{};
      bool empty = true;
#pragma GCC unroll 4
      for (int j = 0; j < from; ++j) {
        const float entry = transposed ? matrix[j][i] : matrix[i][j];
        if (entry == 0) continue;
        const V term = entry == 1 ? v[j * stride] : entry == -1 ? -v[j * stride] : v[j * stride] * T(entry);
        sum = empty ? term : sum + term;
        empty = false;
      }
      out[i * out_stride] = sum;
    }
  }
};
using Input = Transform<kIn, kIn, kOfInput>;
using Filter = Transform<kIn, 3, kOfFilter>;
using Output = Transform<kOut, kIn, kToOutput>;
using InputAdjoint = Transform<kIn, kIn, kOfInput, true>;
using OutputAdjoint = Transform<kOut, kIn, kToOutput, true>;

// Vectors of 32 bytes, or of what the machine has in their place, and the same where they lie in memory: of loops over
// this many rows the compiler makes none.
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

// What becomes of a value of channel c: stored; with the bias and the activation stored; or added to what is there.
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
  using V = typename L::type;
  V before[Along::from * Along::from], between[Along::from * Along::to], after[Along::to * Along::to];
#pragma GCC unroll 16
  for (int i = 0; i < Along::from * Along::from; ++i) before[i] = at<L>(from[i] + c);
#pragma GCC unroll 4
  for (int i = 0; i < Along::from; ++i)
    Along::template run<V, T>(before + i * Along::from, 1, between + i * Along::to, 1);
#pragma GCC unroll 4
  for (int j = 0; j < Along::to; ++j) Along::template run<V, T>(between + j, Along::to, after + j, Along::to);
#pragma GCC unroll 16
  for (int i = 0; i < Along::to * Along::to; ++i) finish.template put<L>(after[i], to[i] + c, c);
}

// For the channels [0, n) of one tile: reads from[i][c], transforms along both axes, puts the results to to[i] + c.
template <typename Along, typename T, typename F>
FUSED_INPAINT_INLINE void transform(const T* const* from, T* const* to, int64_t n, const F& finish) {
  constexpr int64_t lanes = sizeof(typename Lanes<T>::type) / sizeof(T);
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) transform_at<Along, Lanes<T>>(from, to, c, finish);
  for (; c < n; ++c) transform_at<Along, Lane<T>>(from, to, c, finish);
}

// Pointers to rows that lie one after the other.
template <int count, typename T>
struct Rows {
  T* at[count];
  FUSED_INPAINT_INLINE Rows(T* first, int64_t stride) {
    for (int i = 0; i < count; ++i) at[i] = first + i * stride;
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

// (O, C, 3, 3) channels last to (16, O, C).
template <typename T>
FUSED_INPAINT_CLONES void transform_filters(const T* weight, T* to, int64_t n, int64_t outputs, int64_t begin,
                                            int64_t end) {
  for (int64_t o = begin; o < end; ++o)
    transform<Filter>(Rows<9, const T>(weight + o * 9 * n, n).at, Rows<kTaps, T>(to + o * n, outputs * n).at, n,
                      Store{});
}

template <typename T>
Tensor transformed_filters(const Tensor& weight) {
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  Tensor out = empty_channels_last({kTaps * outputs, channels, 1, 1}, weight.scalar_type(), weight);
  const T* from = data<T>(weight);
  T* to = mutable_data<T>(out);
  parallel_for(0, outputs, 4,
               [&](int64_t begin, int64_t end) { transform_filters(from, to, channels, outputs, begin, end); });
  return out;
}

const ConvGeometry kProducts{{1, 1}, {0, 0}, {1, 1}, kTaps};
// From this batch on, torch leaves a 1x1 convolution to oneDNN on a single thread, too.
constexpr int64_t kBatch = 16;
// Of a product's operand: it stays in the caches between the passes, and has tiles enough to be worth packing the
// filters for.
constexpr int64_t kOperandBytes = int64_t{8} << 20;
constexpr int64_t kGrainTiles = 8;

// Calls body(first, last) for all tiles, the same steps whatever the number of threads.
template <typename T, typename F>
void for_steps(const Tiles& tiles, int64_t channels, F&& body) {
  const int64_t fit = std::max<int64_t>(kOperandBytes / (kTaps * channels * static_cast<int64_t>(sizeof(T))), kBatch);
  const int64_t count = tiles.count(), step = ceil_div(count, ceil_div(count, fit));
  for (int64_t first = 0; first < count; first += step) body(first, std::min(first + step, count));
}

// Memory for operands (16, 16 channels, 1, tiles / 16), which lie as (tile, 16, channels); it serves one at a time,
// since the system is slow in giving so much anew.
class Workspace {
 public:
  template <typename T>
  Tensor operand(int64_t tiles, int64_t channels, const Tensor& like) {
    const int64_t c = kTaps * channels, w = ceil_div(tiles, kBatch), count = kBatch * w * c;
    if (!memory_ || memory_->numel() < count) memory_ = empty({count}, like.scalar_type(), like);
    return torch::stable::from_blob(memory_->mutable_data_ptr(), Ints{kBatch, c, 1, w}, Ints{c * w, 1, c * w, c},
                                    like.device(), like.scalar_type());
  }

 private:
  std::optional<Tensor> memory_;
};

// One branch: x (n, c, h, w) and weight (O, c, 3, 3) to the channels that begin at `to`, `stride` to the next pixel.
template <typename T>
void winograd(const Tiles& tiles, const Tensor& x, const Tensor& weight, const T* bias, bool relu, T* to,
              int64_t stride, Workspace& space) {
  const int64_t channels = weight.size(1), outputs = weight.size(0);
  const std::vector<T> zero(channels, T(0));
  const Tensor filters = transformed_filters<T>(weight);
  const T* from = data<T>(x);
  for_steps<T>(tiles, channels, [&](int64_t first, int64_t last) {
    Tensor operand = space.operand<T>(last - first, channels, x);
    T* const spread = mutable_data<T>(operand);
    parallel_for(first, last, kGrainTiles, [&](int64_t begin, int64_t end) {
      gather_input(tiles, from, zero.data(), spread + (begin - first) * kTaps * channels, channels, begin, end);
    });
    const Tensor result = aten_convolution(operand, filters, kProducts);
    const T* const products = data<T>(result);
    parallel_for(first, last, kGrainTiles, [&](int64_t begin, int64_t end) {
      std::vector<T> nowhere(outputs);
      (relu ? scatter_output<T, true> : scatter_output<T, false>)(tiles, products + (begin - first) * kTaps * outputs,
                                                                  bias, to, stride, nowhere.data(), outputs, begin,
                                                                  end);
    });
  });
}

// Adds to grad_x (n, c, h, w) what comes back from grad (n, O, h, w).
template <typename T>
void winograd_backward(const Tiles& tiles, const Tensor& grad, const Tensor& weight, T* grad_x, Workspace& space) {
  constexpr int64_t kChannels = 32;  // that a thread takes, so that each value is summed in one order
  const int64_t channels = weight.size(1), outputs = weight.size(0);
  const std::vector<T> zero(outputs, T(0));
  const Tensor filters = transformed_filters<T>(weight);
  const T* from = data<T>(grad);
  for_steps<T>(tiles, channels, [&](int64_t first, int64_t last) {
    Tensor operand = space.operand<T>(last - first, outputs, grad);
    T* const spread = mutable_data<T>(operand);
    parallel_for(first, last, kGrainTiles, [&](int64_t begin, int64_t end) {
      gather_output(tiles, from, zero.data(), spread + (begin - first) * kTaps * outputs, outputs, begin, end);
    });
    // Of the input no more than the size is looked at.
    const Tensor input = empty_channels_last({kBatch, kTaps * channels, 1, operand.size(3)}, grad.scalar_type(), grad);
    const auto result = aten_convolution_backward(operand, input, filters, kProducts, true, false);
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
