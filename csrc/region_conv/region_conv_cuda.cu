// SPDX-License-Identifier: Apache-2.0
// Region-wise convolution on the GPU: one pass that selects, concatenates and pads, the vendor's convolution, one pass
// over its output. Which location belongs to which region is known on the device only, and waiting for it would cost
// more than the filter it saves; what is saved here is traffic, and the upsample, which is folded. A thread keeps its
// channels, 16 bytes of them where they divide, and walks the pixels.
#define FUSED_INPAINT_DEVICE cuda
#include <cmath>
#include <tuple>

#include "common/cuda_types.cuh"
#include "common/frame.cuh"
#include "common/launch.cuh"
#include "region_conv/region_conv.h"

namespace fused_inpaint::cuda {
namespace {

template <typename F>
void dispatch(ScalarType dtype, F&& body) {
  if (dtype == ScalarType::Half) return body.template operator()<__half>();
  dispatch_float("region_conv2d", dtype, body);
}

template <typename F>
void with_flag(bool flag, F&& body) {
  flag ? body.template operator()<true>() : body.template operator()<false>();
}

// Parameters come in the accumulator's type; a narrower tensor would be read past its end. Null if there are none.
template <typename A>
const A* parameters(const std::optional<Tensor>& t) {
  const ScalarType expected = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(!t || t->scalar_type() == expected, "region_conv2d: bias must be ",
                  torch::headeronly::toString(expected));
  return t ? data<A>(*t) : nullptr;
}

// The region of each pixel of a batch; null: all are valid.
struct Regions {
  const uint8_t* mask = nullptr;
  unsigned pixels = 1;  // of the mask
  Regions() = default;
  explicit Regions(const Tensor& m) : mask(data<uint8_t>(m)), pixels(index32(m.numel())) {}
  __device__ unsigned operator()(unsigned pixel) const { return !mask || mask[pixel % pixels] != 0; }
};

// The input of the convolution, which pads with zeros itself and has the upsample folded into it.
Frame frame_of(const Tensor& x, const Geometry& g) {
  const bool pads = g.side[0].mode != Padding::zeros;
  return Frame(x, g.folded() ? 1 : g.side[0].upsample, pads ? g.side[0].padding : 0, pads ? g.side[1].padding : 0,
               g.folded() ? Padding::replicate : g.side[0].mode);
}

// (n, padded_h, padded_w, valid_c + hole_c)
template <typename T, int V>
__global__ void operand_kernel(const T* valid, unsigned valid_c, const T* hole, unsigned hole_c, Regions regions,
                               Frame frame, T* out) {
  const unsigned channels = valid_c + hole_c, pixels = frame.n * frame.padded_h * frame.padded_w;
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V)
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      const unsigned source = frame.source(pixel);
      const bool of_valid = c < valid_c;
      Pack<T, V> values{};
      if (of_valid == (regions(source) != 0))
        values = load_pack<V>(of_valid ? valid + source * valid_c + c : hole + source * hole_c + (c - valid_c));
      store_pack<V>(out + pixel * channels + c, values);
    }
}

// Back from its gradient; a map that is null takes none.
template <typename T, int V>
__global__ void split_kernel(const T* grad, Regions regions, Frame frame, T* valid, unsigned valid_c, T* hole,
                             unsigned hole_c) {
  const unsigned channels = valid_c + hole_c, pixels = frame.n * frame.h * frame.w;
  for (unsigned c = threadIdx.x * V; c < channels; c += blockDim.x * V) {
    const bool of_valid = c < valid_c;
    T* const to = of_valid ? valid : hole;
    if (!to) continue;
    const unsigned stride = of_valid ? valid_c : hole_c, at = of_valid ? c : c - valid_c;
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      Pack<T, V> values{};
      if (of_valid == (regions(pixel) != 0)) {
        Pack<acc_t<T>, V> sum{};
        frame.copies(pixel, [&](unsigned copy) {
          const Pack<T, V> g = load_pack<V>(grad + copy * channels + c);
          for (int k = 0; k < V; ++k) sum.v[k] += load(g.v[k]);
        });
        for (int k = 0; k < V; ++k) store(&values.v[k], sum.v[k]);
      }
      store_pack<V>(to + pixel * stride + at, values);
    }
  }
}

// Where the convolution's output holds the c channels of an output pixel: beside those of the other region, or among
// the phases of the folded upsample, or alone.
struct Place {
  unsigned c, h, w, slots;
  bool folded;
  Place(int64_t outputs, const Geometry& g, int64_t regions)
      : c(index32(outputs)),
        h(index32(g.side[0].out)),
        w(index32(g.side[1].out)),
        slots(index32(g.phases() * regions)),
        folded(g.folded()) {}
  __device__ unsigned operator()(unsigned pixel, unsigned region) const {
    if (!folded) return (pixel * slots + (slots == 2 ? region : 0)) * c;
    const unsigned row = pixel / w, x = pixel % w, n = row / h, y = row % h, a = y % 2, b = x % 2;
    return (((n * (h / 2 + 1) + y / 2 + a) * (w / 2 + 1) + x / 2 + b) * 4 + a * 2 + b) * c;
  }
};

template <typename T, int V, bool elu>
__global__ void finish_kernel(const T* conv, Place place, Regions regions, const acc_t<T>* bias, T* y,
                              unsigned pixels) {
  using A = acc_t<T>;
  for (unsigned c = threadIdx.x * V; c < place.c; c += blockDim.x * V) {
    Pack<A, V> offset{}, offset_valid{};
    if (bias)
      for (int k = 0; k < V; ++k) {
        offset.v[k] = bias[c + k];
        if (regions.mask) offset_valid.v[k] = bias[place.c + c + k];
      }
    for (unsigned pixel = first_pixel(); pixel < pixels; pixel += all_pixels()) {
      const unsigned region = regions.mask ? regions(pixel) : 0;
      const Pack<T, V> sum = load_pack<V>(conv + place(pixel, region) + c);
      Pack<T, V> result;
      for (int k = 0; k < V; ++k) {
        const A v = A(load(sum.v[k])) + (region ? offset_valid.v[k] : offset.v[k]);
        store(&result.v[k], !elu || v > 0 ? v : A(std::expm1(v)));
      }
      store_pack<V>(y + pixel * place.c + c, result);
    }
  }
}

// One block sums one chunk of pixels, fixed by the shape, for a tile of channels: thread (x, y) takes pack x of every
// pixel y of kRows.
template <int V>
struct SumTile {
  static constexpr int kPacks = V == 1 ? 32 : 8, kRows = kThreads / kPacks, kChannels = kPacks * V;
};

struct Chunks {
  unsigned pixels, size, n;
  explicit Chunks(int64_t pixels_)
      : pixels(index32(pixels_)),
        size(static_cast<unsigned>(std::max<int64_t>(64, ceil_div(pixels, 512)))),
        n(static_cast<unsigned>(ceil_div(pixels, size))) {}
};

// The gradient in front of the activation, in the place of the convolution's output, and for each chunk, region and
// channel its sum. y is the activation's output, whose derivative is y + 1 below 0.
template <typename T, int V, bool elu>
__global__ void gradient_kernel(const T* grad, const T* y, Place place, Regions regions, Chunks chunks, T* out,
                                acc_t<T>* partial) {
  using A = acc_t<T>;
  using Sums = Pack<A, V>;
  using Tile = SumTile<V>;
  FUSED_INPAINT_SHARED(Sums, scratch, kThreads);
  const unsigned c = blockIdx.y * Tile::kChannels + threadIdx.x * V, begin = blockIdx.x * chunks.size;
  const unsigned end = begin + chunks.size < chunks.pixels ? begin + chunks.size : chunks.pixels;
  const unsigned parts = regions.mask ? 2 : 1;
  Sums sum[2]{};
  if (c < place.c)
    for (unsigned pixel = begin + threadIdx.y; pixel < end; pixel += Tile::kRows) {
      const unsigned region = regions.mask ? regions(pixel) : 0;
      const Pack<T, V> g = load_pack<V>(grad + pixel * place.c + c);
      Pack<T, V> result = g;
      if constexpr (elu) {
        const Pack<T, V> o = load_pack<V>(y + pixel * place.c + c);
        for (int k = 0; k < V; ++k)
          if (!(load(o.v[k]) > 0)) store(&result.v[k], A(load(g.v[k])) * (A(load(o.v[k])) + 1));
      }
      for (int k = 0; k < V; ++k) {
        sum[0].v[k] += region ? A(0) : A(load(result.v[k]));
        sum[1].v[k] += region ? A(load(result.v[k])) : A(0);
      }
      store_pack<V>(out + place(pixel, region) + c, result);
      if (parts == 2) store_pack<V>(out + place(pixel, 1 - region) + c, Pack<T, V>{});
    }
  const int thread = threadIdx.y * Tile::kPacks + threadIdx.x;
  for (unsigned r = 0; r < parts; ++r) {
    __syncthreads();
    scratch[thread] = r ? sum[1] : sum[0];
    __syncthreads();
    const unsigned channel = blockIdx.y * Tile::kChannels + thread;
    if (thread < Tile::kChannels && channel < place.c) {
      const A* values = scratch->v;
      A total = 0;
      for (int row = 0; row < Tile::kRows; ++row) total += values[row * Tile::kChannels + thread];
      partial[(blockIdx.x * parts + r) * place.c + channel] = total;
    }
  }
}

// A block merges the chunks of 32 columns of (chunks, columns): each of its rows a range of them in their order, then
// the rows in theirs, in double.
constexpr unsigned kMergeColumns = 32, kMergeRows = 16;

template <typename A>
__global__ void merge_kernel(const A* partial, unsigned chunks, unsigned columns, A* total) {
  FUSED_INPAINT_SHARED(double, rows, kMergeColumns* kMergeRows);
  const unsigned i = blockIdx.x * kMergeColumns + threadIdx.x, share = (chunks + kMergeRows - 1) / kMergeRows;
  const unsigned begin = threadIdx.y * share;
  double sum = 0;
  if (i < columns)
    for (unsigned b = begin; b < begin + share && b < chunks; ++b) sum += partial[b * columns + i];
  rows[threadIdx.y * kMergeColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= columns) return;
  for (unsigned r = 1; r < kMergeRows; ++r) sum += rows[r * kMergeColumns + threadIdx.x];
  total[i] = static_cast<A>(sum);
}

// The convolution's operands and its geometry. `missing` and `mask` are null with select="output".
struct Operands {
  Tensor x, filters;
  ConvGeometry geometry;
};

Tensor operand(const Tensor& valid_, const Tensor* missing, const Tensor* mask, const Geometry& g) {
  const Tensor valid = channels_last(valid_);
  const Frame frame = frame_of(valid, g);
  if (!missing && frame.plain()) return valid;
  const Tensor hole = missing ? channels_last(*missing) : valid;
  const unsigned valid_c = index32(valid.size(1)), hole_c = missing ? index32(hole.size(1)) : 0;
  Tensor out =
      empty_channels_last({frame.n, valid_c + hole_c, frame.padded_h, frame.padded_w}, valid.scalar_type(), valid);
  index32(out.numel());
  dispatch(valid.scalar_type(), [&]<typename T>() {
    with_pack<T>(valid_c | hole_c, {&valid, &hole, &out}, [&]<int V>() {
      const dim3 threads = pixel_threads((valid_c + hole_c) / V);
      FUSED_INPAINT_LAUNCH((operand_kernel<T, V>),
                           pixel_blocks(int64_t{frame.n} * frame.padded_h * frame.padded_w, threads), threads, 0,
                           current_stream(out), data<T>(valid), valid_c, data<T>(hole), hole_c,
                           mask ? Regions(*mask) : Regions(), frame, mutable_data<T>(out));
    });
  });
  return out;
}

void split(const Tensor& grad, const Tensor* mask, const Geometry& g, Tensor* valid, unsigned valid_c, Tensor* hole,
           unsigned hole_c, const Tensor& like) {
  const Frame frame = frame_of(like, g);
  index32(grad.numel());
  dispatch(grad.scalar_type(), [&]<typename T>() {
    with_pack<T>(valid_c | hole_c, {&grad, valid, hole}, [&]<int V>() {
      const dim3 threads = pixel_threads((valid_c + hole_c) / V);
      FUSED_INPAINT_LAUNCH((split_kernel<T, V>), pixel_blocks(int64_t{frame.n} * frame.h * frame.w, threads), threads,
                           0, current_stream(grad), data<T>(grad), mask ? Regions(*mask) : Regions(), frame,
                           valid ? mutable_data<T>(*valid) : nullptr, valid_c, hole ? mutable_data<T>(*hole) : nullptr,
                           hole_c);
    });
  });
}

ConvGeometry conv_geometry(const Geometry& g) {
  if (g.side[0].mode != Padding::zeros) return {g.stride, {0, 0}, g.dilation, 1};
  return {g.stride, g.padding, g.dilation, 1};
}

// (2, O, C, kh, kw) -> (2 O, C, kh, kw)
Tensor stacked(const Tensor& weight) {
  return channels_last(
      torch::stable::reshape(weight, Ints{2 * weight.size(1), weight.size(2), weight.size(3), weight.size(4)}));
}

Tensor filters_of(const Tensor& weight, const Geometry& g) {
  return g.folded() ? fold_weight(weight, 0, weight.size(1)) : channels_last(weight);
}

// Of the convolution, whose output has `slots` sets of the output's channels.
std::vector<int64_t> conv_sizes(const Tensor& x, int64_t channels, const Geometry& g) {
  return {x.size(0), channels, g.side[0].positions(), g.side[1].positions()};
}

Tensor convolve_and_finish(const Tensor& x, const Tensor& filters, const Tensor* mask,
                           const std::optional<Tensor>& bias, int64_t outputs, const Geometry& g) {
  const int64_t regions = mask ? 2 : 1;
  const Tensor conv = aten_convolution(x, filters, conv_geometry(g));
  check_map("the convolution", conv, conv_sizes(x, outputs * regions * g.phases(), g), x.scalar_type());
  index32(conv.numel());
  const bool in_place = regions * g.phases() == 1;
  Tensor y = in_place ? conv : empty_channels_last(output_sizes(x, outputs, g), x.scalar_type(), x);
  const unsigned pixels = index32(y.numel()) / index32(outputs);
  dispatch(y.scalar_type(), [&]<typename T>() {
    with_flag(g.elu, [&]<bool elu>() {
      with_pack<T>(outputs, {&conv, &y}, [&]<int V>() {
        const dim3 threads = pixel_threads(outputs / V);
        FUSED_INPAINT_LAUNCH((finish_kernel<T, V, elu>), pixel_blocks(pixels, threads), threads, 0, current_stream(y),
                             data<T>(conv), Place(outputs, g, regions), mask ? Regions(*mask) : Regions(),
                             parameters<acc_t<T>>(bias), mutable_data<T>(y), pixels);
      });
    });
  });
  return y;
}

// The gradient of the convolution's output; its sums into grad_bias unless that is null.
Tensor conv_gradient(const Tensor& grad_, const Tensor& y_, const Tensor* mask, const Geometry& g, Tensor* grad_bias) {
  const Tensor grad = channels_last(grad_);
  const int64_t regions = mask ? 2 : 1, outputs = grad.size(1), slots = regions * g.phases();
  if (!g.elu && slots == 1 && !grad_bias) return grad;
  const Tensor y = g.elu ? channels_last(y_) : grad;
  Tensor out = empty_channels_last(conv_sizes(grad, outputs * slots, g), grad.scalar_type(), grad);
  // A border row and column of each phase belongs to no output pixel.
  if (g.folded()) torch::stable::zero_(out);
  index32(out.numel());
  const Chunks chunks(grad.numel() / outputs);
  Tensor partial = empty({chunks.n, regions * outputs}, wide(grad.scalar_type()), grad);
  const unsigned columns = index32(regions * outputs);
  dispatch(grad.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    with_flag(g.elu, [&]<bool elu>() {
      with_pack<T>(outputs, {&grad, &y, &out}, [&]<int V>() {
        using Tile = SumTile<V>;
        const dim3 blocks(chunks.n, static_cast<unsigned>(ceil_div(outputs, Tile::kChannels)));
        FUSED_INPAINT_LAUNCH((gradient_kernel<T, V, elu>), blocks, dim3(Tile::kPacks, Tile::kRows), 0,
                             current_stream(grad), data<T>(grad), data<T>(y), Place(outputs, g, regions),
                             mask ? Regions(*mask) : Regions(), chunks, mutable_data<T>(out), mutable_data<A>(partial));
      });
    });
    if (!grad_bias) return;
    FUSED_INPAINT_LAUNCH(merge_kernel<A>, dim3((columns + kMergeColumns - 1) / kMergeColumns),
                         dim3(kMergeColumns, kMergeRows), 0, current_stream(grad), data<A>(partial), chunks.n, columns,
                         mutable_data<A>(*grad_bias));
  });
  return out;
}

Tensor empty_gradient(const Tensor& x, bool wanted) {
  return wanted ? empty_channels_last(sizes(x), x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
}

Tensor empty_bias_gradient(const std::vector<int64_t>& size, const Tensor& like, bool wanted) {
  return empty(wanted ? size : std::vector<int64_t>{0}, wide(like.scalar_type()), like);
}

}  // namespace

Tensor region_conv2d_output(Tensor x, Tensor mask, Tensor weight, std::optional<Tensor> bias, Ints stride, Ints padding,
                            Ints dilation, std::string padding_mode, std::string activation) {
  const Geometry g = describe_output(x, mask, weight, stride, padding, dilation, padding_mode, activation);
  const DeviceGuard guard(x);
  const int64_t outputs = weight.size(1);
  check_bias(bias, 2 * outputs);
  const auto size = output_sizes(x, outputs, g);
  if (size[0] == 0 || outputs == 0) return empty_channels_last(size, x.scalar_type(), x);
  return convolve_and_finish(operand(x, nullptr, nullptr, g), stacked(weight), &mask, bias, outputs, g);
}

std::tuple<Tensor, Tensor, Tensor> region_conv2d_output_backward(Tensor grad, Tensor y, Tensor x, Tensor mask,
                                                                 Tensor weight, Ints stride, Ints padding,
                                                                 Ints dilation, std::string padding_mode,
                                                                 std::string activation, bool need_x, bool need_weight,
                                                                 bool need_bias) {
  const Geometry g = describe_output(x, mask, weight, stride, padding, dilation, padding_mode, activation);
  const DeviceGuard guard(x);
  const int64_t outputs = weight.size(1), channels = x.size(1);
  check_map("grad", grad, output_sizes(x, outputs, g), x.scalar_type());
  check_map("y", y, output_sizes(x, outputs, g), x.scalar_type());
  Tensor grad_x = empty_gradient(x, need_x), grad_bias = empty_bias_gradient({2, outputs}, x, need_bias);
  Tensor grad_weight = empty(need_weight ? sizes(weight) : std::vector<int64_t>{0}, weight.scalar_type(), weight);
  if (grad.numel() == 0) {
    for (Tensor* t : {&grad_x, &grad_weight, &grad_bias}) torch::stable::zero_(*t);
    return {grad_x, grad_weight, grad_bias};
  }
  const Tensor grad_conv = conv_gradient(grad, y, &mask, g, need_bias ? &grad_bias : nullptr);
  if (!need_x && !need_weight) return {grad_x, grad_weight, grad_bias};
  const auto [grad_operand, grad_filters] = aten_convolution_backward(
      grad_conv, operand(x, nullptr, nullptr, g), stacked(weight), conv_geometry(g), need_x, need_weight);
  if (need_x) {
    if (frame_of(x, g).plain())
      grad_x = *grad_operand;
    else
      split(*grad_operand, nullptr, g, &grad_x, index32(channels), nullptr, 0, x);
  }
  if (need_weight) {
    Tensor view = torch::stable::view(grad_weight, sizes(*grad_filters));
    torch::stable::copy_(view, *grad_filters);
  }
  return {grad_x, grad_weight, grad_bias};
}

Tensor region_conv2d_input(Tensor existing, Tensor missing, Tensor mask, Tensor weight, std::optional<Tensor> bias,
                           int64_t upsample, Ints stride, Ints padding, Ints dilation, std::string padding_mode,
                           std::string activation) {
  const Geometry g =
      describe_input(existing, missing, mask, weight, upsample, stride, padding, dilation, padding_mode, activation);
  const DeviceGuard guard(existing);
  const int64_t outputs = weight.size(0);
  check_bias(bias, outputs);
  const auto size = output_sizes(existing, outputs, g);
  if (size[0] == 0 || outputs == 0) return empty_channels_last(size, existing.scalar_type(), existing);
  return convolve_and_finish(operand(existing, &missing, &mask, g), filters_of(weight, g), nullptr, bias, outputs, g);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> region_conv2d_input_backward(
    Tensor grad, Tensor y, Tensor existing, Tensor missing, Tensor mask, Tensor weight, int64_t upsample, Ints stride,
    Ints padding, Ints dilation, std::string padding_mode, std::string activation, bool need_existing,
    bool need_missing, bool need_weight, bool need_bias) {
  const Geometry g =
      describe_input(existing, missing, mask, weight, upsample, stride, padding, dilation, padding_mode, activation);
  const DeviceGuard guard(existing);
  const int64_t outputs = weight.size(0);
  const ScalarType dtype = existing.scalar_type();
  check_map("grad", grad, output_sizes(existing, outputs, g), dtype);
  check_map("y", y, output_sizes(existing, outputs, g), dtype);
  Tensor grad_existing = empty_gradient(existing, need_existing), grad_missing = empty_gradient(missing, need_missing);
  Tensor grad_weight = empty_gradient(weight, need_weight);
  Tensor grad_bias = empty_bias_gradient({outputs}, existing, need_bias);
  if (grad.numel() == 0) {
    for (Tensor* t : {&grad_existing, &grad_missing, &grad_weight, &grad_bias}) torch::stable::zero_(*t);
    return {grad_existing, grad_missing, grad_weight, grad_bias};
  }
  const Tensor grad_conv = conv_gradient(grad, y, nullptr, g, need_bias ? &grad_bias : nullptr);
  const bool need_maps = need_existing || need_missing;
  if (!need_maps && !need_weight) return {grad_existing, grad_missing, grad_weight, grad_bias};
  const auto [grad_operand, grad_filters] =
      aten_convolution_backward(grad_conv, operand(existing, &missing, &mask, g), filters_of(weight, g),
                                conv_geometry(g), need_maps, need_weight);
  if (need_maps)
    split(*grad_operand, &mask, g, need_existing ? &grad_existing : nullptr, index32(existing.size(1)),
          need_missing ? &grad_missing : nullptr, index32(missing.size(1)), existing);
  if (need_weight) {
    if (g.folded())
      unfold_gradient(*grad_filters, 0, grad_weight);
    else
      grad_weight = *grad_filters;
  }
  return {grad_existing, grad_missing, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("region_conv2d_output", TORCH_BOX(&region_conv2d_output));
  m.impl("region_conv2d_output_backward", TORCH_BOX(&region_conv2d_output_backward));
  m.impl("region_conv2d_input", TORCH_BOX(&region_conv2d_input));
  m.impl("region_conv2d_input_backward", TORCH_BOX(&region_conv2d_input_backward));
}

}  // namespace fused_inpaint::cuda
