// SPDX-License-Identifier: Apache-2.0
// A thin layer (few channels go in or come out) on the GPU in one launch: mask sum, convolution, renormalisation, bias,
// activation and mask update. Everything is read once and written once; products are plain float32.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_mask.cuh"
#include "partial_conv/partial_pixel.h"

namespace fused_inpaint::cuda {
namespace {

// A warp makes 8 rows x 16 columns of the output for R of its channels, a lane 4 pixels of a column, every second row.
// A block is `groups` warps over channels times `bands` of them over rows.
constexpr int kRows = 8, kColumns = 16, kPixels = 4, kStep = kRows / kPixels, kLanes = 32, kMostWarps = 4;
// Input channels lie in shared memory by fours: a lane reads 16 bytes, and neighbours read neighbours.
constexpr int kQuad = 4;
constexpr int kMostSources = 2, kMostTaps = 7, kMostSpan = 16;
constexpr int64_t kSharedBytes = 48 << 10, kMostBlocks = 2048;
constexpr int kResident = 5;  // blocks of a thin layer on a multiprocessor; fewer where a tile takes more shared memory

using Quad = Pack<float, kQuad>;

template <typename T>
struct Source {
  const T* x;        // (n, h, w, channels) in memory
  const void* mask;  // (n or 1, planes, h, w)
  int mask_bytes, shared, planes, h, w, channels;
  int shift;   // 1 if upsampled
  bool quads;  // four channels can be read at once
};

template <typename T>
struct Layer {
  Source<T> source[kMostSources];
  const T* weight;            // (outputs, kernel[0], kernel[1], channels) in memory
  const float *bias, *scale;  // or null
  T* y;                       // (batch, out_h, out_w, outputs) in memory
  int32_t* count;             // (mask_batch, out_h, out_w), as the mask
  void* mask;
  MaskType mask_type;
  int sources, batch, mask_batch, channels, outputs, h, w, out_h, out_w;
  int kernel[2], stride[2], padding[2], dilation[2];
  Activation activation;
  float slope;
};

// What a block works on at a time: `patch` input pixels under its output pixels, 4 << quad_shift of their channels.
struct Tile {
  int groups, bands, quad_shift;
  int half, pitch, patch;    // columns of one parity (all of them with stride 1), of a row, pixels
  int depth, weight_pitch;   // weights (taps, depth, weight_pitch)
  unsigned across, down, n;  // tiles of a row, of a column, of the batch
  bool keeps_weights;        // all of them fit: they are staged for a block's first tile alone
  FUSED_INPAINT_INLINE int rows() const { return kRows * bands; }
};

__device__ float activated(Activation kind, float v, float slope) {
  switch (kind) {
    case Activation::relu:
      return activate<Activation::relu>(v, slope);
    case Activation::leaky_relu:
      return activate<Activation::leaky_relu>(v, slope);
    default:
      return v;
  }
}

// A block's place in the work, and its shared memory.
struct Block {
  int thread, threads;
  int output;          // first of its output channels
  int n, row, column;  // first output pixel of its tile
  Quad* x;             // (quads, patch)
  float* weights;      // (taps, depth, weight_pitch)
  int* at;             // (patch) pixel of the source, or -1 where it has no value
  int* valid;          // (patch) values of the sources so far
  int* count;          // (rows, kColumns) values under the windows
};

template <typename T>
__device__ unsigned first_mask(const Source<T>& m, int n) {
  return (m.shared ? 0u : n) * m.planes * m.h * m.w;
}

template <typename T>
__device__ void find_pixels(const Layer<T>& l, const Tile& t, const Block& b, const Source<T>& m, bool first) {
  for (int p = b.thread; p < t.patch; p += b.threads) {
    const int rest = p % t.pitch;
    const int row = b.row * l.stride[0] - l.padding[0] + p / t.pitch;
    const int column = b.column * l.stride[1] - l.padding[1] + rest % t.half * l.stride[1] + rest / t.half;
    int pixel = -1, values = 0;
    if (row >= 0 && row < l.h && column >= 0 && column < l.w) {
      pixel = (row >> m.shift) * m.w + (column >> m.shift);
      for (int c = 0; c < m.planes; ++c)
        values += holds_value(m.mask, m.mask_bytes, first_mask(m, b.n) + c * m.h * m.w + pixel);
      if (m.planes == 1) values *= m.channels;
    }
    b.at[p] = values > 0 && b.n < l.batch ? pixel : -1;
    b.valid[p] = (first ? 0 : b.valid[p]) + values;
  }
}

// From channel c0 on.
template <typename T>
__device__ void stage_pixels(const Tile& t, const Block& b, const Source<T>& m, int c0) {
  for (int i = b.thread; i < t.patch << t.quad_shift; i += b.threads) {
    const int p = i >> t.quad_shift, q = i & ((1 << t.quad_shift) - 1), c = c0 + q * kQuad, pixel = b.at[p];
    Pack<T, kQuad> values{};
    if (pixel >= 0 && c < m.channels) {
      const T* from = m.x + (static_cast<unsigned>(b.n * m.h * m.w + pixel) * m.channels + c);
      if (m.quads)
        values = load_pack<kQuad>(from);
      else
        for (int k = 0; k < kQuad; ++k)
          if (c + k < m.channels) values.v[k] = from[k];
      if (m.planes > 1)
        for (int k = 0; k < kQuad; ++k)
          if (c + k < m.channels &&
              !holds_value(m.mask, m.mask_bytes, first_mask(m, b.n) + (c + k) * m.h * m.w + pixel))
            values.v[k] = T{};
    }
    Quad wide;
    for (int k = 0; k < kQuad; ++k) wide.v[k] = load(values.v[k]);
    b.x[q * t.patch + p] = wide;
  }
}

// For `depth` channels, of which the first is channel c0 of all sources.
template <int R, typename T>
__device__ void stage_weights(const Layer<T>& l, const Tile& t, const Block& b, int c0, int depth) {
  const int taps = l.kernel[0] * l.kernel[1];
  for (int o = b.thread / kLanes; o < t.groups * R; o += b.threads / kLanes)
    for (int i = b.thread % kLanes; i < taps * depth; i += kLanes) {
      const int tap = i / depth, c = i % depth, output = b.output + o;
      b.weights[(tap * t.depth + c) * t.weight_pitch + o] =
          output < l.outputs ? load(l.weight[static_cast<unsigned>(output * taps + tap) * l.channels + c0 + c]) : 0.0f;
    }
}

// From an output pixel's place in the patch to that of a tap.
template <typename T>
__device__ int tap_offset(const Layer<T>& l, const Tile& t, int u, int v) {
  const int column = v * l.dilation[1], shift = l.stride[1] - 1;
  return u * l.dilation[0] * t.pitch + (column & shift) * t.half + (column >> shift);
}

// Adds what K channels of a quad give to a lane's pixels.
template <int K, typename T, int R>
__device__ void multiply(const Layer<T>& l, const Tile& t, const Quad* corner, const float* weights,
                         float (&sum)[kPixels][R]) {
  for (int u = 0; u < l.kernel[0]; ++u)
    for (int v = 0; v < l.kernel[1]; ++v, weights += t.depth * t.weight_pitch) {
      const Quad* from = corner + tap_offset(l, t, u, v);
      Quad in[kPixels], factor[K][R / kQuad];
      for (int j = 0; j < kPixels; ++j) in[j] = from[j * kStep * l.stride[0] * t.pitch];
      for (int k = 0; k < K; ++k)
        for (int r = 0; r < R / kQuad; ++r) factor[k][r] = load_pack<kQuad>(weights + k * t.weight_pitch + r * kQuad);
      for (int k = 0; k < K; ++k)
        for (int j = 0; j < kPixels; ++j)
          for (int r = 0; r < R; ++r) sum[j][r] += in[j].v[k] * factor[k][r / kQuad].v[r % kQuad];
    }
}

template <typename T>
__device__ void count_values(const Layer<T>& l, const Tile& t, const Block& b) {
  for (int i = b.thread; i < t.rows() * kColumns; i += b.threads) {
    const int y = i / kColumns, x = i % kColumns, row = b.row + y, column = b.column + x;
    const int* corner = b.valid + y * l.stride[0] * t.pitch + x;
    int values = 0;
    for (int u = 0; u < l.kernel[0]; ++u)
      for (int v = 0; v < l.kernel[1]; ++v) values += corner[tap_offset(l, t, u, v)];
    b.count[i] = values;
    if (blockIdx.y == 0 && b.n < l.mask_batch && row < l.out_h && column < l.out_w) {
      const unsigned pixel = (b.n * l.out_h + row) * l.out_w + column;
      l.count[pixel] = values;
      write_bits(l.mask, l.mask_type.bytes, pixel, values > 0 ? l.mask_type.one : 0);
    }
  }
}

// `valid` values lie under the pixel's window; R channels from `output` on.
template <typename T, int R>
__device__ void write_pixel(const Layer<T>& l, unsigned pixel, int output, int valid, const float (&sum)[R]) {
  Pack<T, R> result{};
  if (valid > 0) {
    const float ratio = static_cast<float>(l.channels * l.kernel[0] * l.kernel[1]) / static_cast<float>(valid);
    for (int r = 0; r < R; ++r) {
      if (output + r >= l.outputs) break;
      float a = sum[r] * ratio;
      if (l.scale) a *= l.scale[output + r];
      if (l.bias) a += l.bias[output + r];
      store(&result.v[r], activated(l.activation, a, l.slope));
    }
  }
  T* to = l.y + (pixel * l.outputs + output);
  if (l.outputs % R == 0)
    store_pack<R>(to, result);
  else
    for (int r = 0; r < R; ++r)
      if (output + r < l.outputs) to[r] = result.v[r];
}

template <typename T, int R>
__global__ void __launch_bounds__(kLanes* kMostWarps, kResident)
    direct_kernel(const __grid_constant__ Layer<T> l, const __grid_constant__ Tile t) {
  FUSED_INPAINT_DYNAMIC_SHARED(Quad, memory);
  Block b{};
  b.thread = (threadIdx.z * blockDim.y + threadIdx.y) * kLanes + threadIdx.x;
  b.threads = blockDim.z * blockDim.y * kLanes;
  b.output = blockIdx.y * t.groups * R;
  b.x = memory;
  b.weights = reinterpret_cast<float*>(b.x + (t.patch << t.quad_shift));
  b.at = reinterpret_cast<int*>(b.weights + l.kernel[0] * l.kernel[1] * t.depth * t.weight_pitch);
  b.valid = b.at + t.patch;
  b.count = b.valid + t.patch;
  const int y = threadIdx.z * kRows + threadIdx.x / kColumns, x = threadIdx.x % kColumns;  // in the tile
  const int output = b.output + threadIdx.y * R;

  for (unsigned tile = blockIdx.x; tile < t.n; tile += gridDim.x) {
    b.n = tile / t.across / t.down;
    b.row = tile / t.across % t.down * t.rows();
    b.column = tile % t.across * kColumns;
    float sum[kPixels][R] = {};
    for (int s = 0, first = 0; s < l.sources; first += l.source[s++].channels) {
      const Source<T>& m = l.source[s];
      find_pixels(l, t, b, m, s == 0);
      for (int c0 = 0; c0 < m.channels; c0 += kQuad << t.quad_shift) {
        const int depth = min(m.channels - c0, kQuad << t.quad_shift);
        __syncthreads();
        stage_pixels(t, b, m, c0);
        if (!t.keeps_weights || tile == blockIdx.x) stage_weights<R>(l, t, b, first + c0, depth);
        __syncthreads();
        for (int q = 0; q * kQuad < depth; ++q) {
          const Quad* corner = b.x + q * t.patch + y * l.stride[0] * t.pitch + x;
          const float* w = b.weights + q * kQuad * t.weight_pitch + threadIdx.y * R;
          switch (depth - q * kQuad) {
            case 1:
              multiply<1>(l, t, corner, w, sum);
              break;
            case 2:
              multiply<2>(l, t, corner, w, sum);
              break;
            case 3:
              multiply<3>(l, t, corner, w, sum);
              break;
            default:
              multiply<4>(l, t, corner, w, sum);
          }
        }
      }
    }
    count_values(l, t, b);
    __syncthreads();
    for (int j = 0; j < kPixels; ++j) {
      const int row = b.row + y + j * kStep, column = b.column + x;
      if (b.n < l.batch && row < l.out_h && column < l.out_w && output < l.outputs)
        write_pixel<T, R>(l, (b.n * l.out_h + row) * l.out_w + column, output, b.count[(y + j * kStep) * kColumns + x],
                          sum[j]);
    }
  }
}

// The largest tile whose shared memory fits: fewer channels at a time first, since that costs least.
template <int R, typename T>
std::pair<Tile, int64_t> plan(const Layer<T>& l, int samples) {
  int most = 0;
  for (int s = 0; s < l.sources; ++s) most = std::max(most, l.source[s].channels);
  Tile t{};
  t.groups = static_cast<int>(std::min<int64_t>(kMostWarps, ceil_div(l.outputs, R)));
  t.bands = kMostWarps / t.groups;
  t.quad_shift = most > 2 * kQuad ? 2 : most > kQuad ? 1 : 0;
  for (;;) {
    auto span = [&](int d, int n) { return (n - 1) * l.stride[d] + (l.kernel[d] - 1) * l.dilation[d] + 1; };
    t.half = static_cast<int>(ceil_div(span(1, kColumns), l.stride[1]));
    t.pitch = t.half * l.stride[1];
    t.patch = span(0, t.rows()) * t.pitch;
    t.depth = std::min(most, kQuad << t.quad_shift);
    t.weight_pitch = t.groups * R + kQuad;  // not a multiple of 32: staging writes down the columns
    const int64_t bytes = (int64_t{t.patch} << t.quad_shift) * sizeof(Quad) +
                          sizeof(float) * l.kernel[0] * l.kernel[1] * t.depth * t.weight_pitch +
                          sizeof(int) * (2 * t.patch + t.rows() * kColumns);
    if (bytes <= kSharedBytes) {
      t.across = static_cast<unsigned>(ceil_div(l.out_w, kColumns));
      t.down = static_cast<unsigned>(ceil_div(l.out_h, t.rows()));
      t.n = index32(int64_t{t.across} * t.down * samples);
      t.keeps_weights = l.sources == 1 && most <= kQuad << t.quad_shift;
      return {t, bytes};
    }
    if (t.quad_shift > 0)
      --t.quad_shift;
    else if (t.bands > 1)
      t.bands /= 2;
    else
      t.groups /= 2;
  }
}

template <int R, typename T>
void launch(const Layer<T>& l, cudaStream_t stream) {
  const auto [tile, bytes] = plan<R>(l, std::max(l.batch, l.mask_batch));
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(tile.n, kMostBlocks)),
                  static_cast<unsigned>(ceil_div(l.outputs, tile.groups * R)));
  FUSED_INPAINT_LAUNCH((direct_kernel<T, R>), grid, dim3(kLanes, tile.groups, tile.bands), bytes, stream, l, tile);
}

template <typename F>
void dispatch_single(ScalarType dtype, F&& body) {
  if (dtype == ScalarType::Half) return body.template operator()<__half>();
  if (dtype == ScalarType::BFloat16) return body.template operator()<bf16>();
  STD_TORCH_CHECK(dtype == ScalarType::Float, "partial_conv2d_direct: dtype must be float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  body.template operator()<float>();
}

void check_direct(const std::vector<Tensor>& sources, const std::vector<Tensor>& masks, const Tensor& weight,
                  const Ints& upsample, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  const char* op = "partial_conv2d_direct";
  const size_t n = sources.size();
  STD_TORCH_CHECK(n >= 1 && n <= kMostSources && masks.size() == n && upsample.size() == n, op,
                  ": sources, masks and upsample must be of one length, 1 or 2");
  int64_t channels = 0;
  for (size_t i = 0; i < n; ++i) {
    const Tensor &x = sources[i], &m = masks[i];
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.scalar_type() == sources[0].scalar_type() &&
                        (upsample[i] == 1 || upsample[i] == 2),
                    op, ": sources must be (N, C, H, W) of one dtype, upsampled by 1 or 2");
    STD_TORCH_CHECK(x.size(0) == sources[0].size(0) && x.size(2) * upsample[i] == sources[0].size(2) * upsample[0] &&
                        x.size(3) * upsample[i] == sources[0].size(3) * upsample[0],
                    op, ": sources must be of one size after upsampling");
    STD_TORCH_CHECK(m.dim() == 4 && m.is_contiguous() && m.size(2) == x.size(2) && m.size(3) == x.size(3) &&
                        (m.size(0) == 1 || m.size(0) == x.size(0)) && (m.size(1) == 1 || m.size(1) == x.size(1)),
                    op, ": a mask must be contiguous and of its source's size");
    channels += x.size(1);
  }
  STD_TORCH_CHECK(groups == 1, op, ": groups must be 1, got ", groups);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == sources[0].scalar_type() && weight.size(0) > 0 &&
                      weight.size(1) == channels,
                  op, ": weight must have the sources' dtype and ", channels, " channels");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation must be two numbers each");
  for (int d = 0; d < 2; ++d) {
    const int64_t k = weight.size(2 + d), side = sources[0].size(2 + d) * upsample[0];
    STD_TORCH_CHECK(k >= 1 && k <= kMostTaps && dilation[d] >= 1 && dilation[d] <= kMostSpan &&
                        (k - 1) * dilation[d] + 1 <= kMostSpan,
                    op, ": kernel must be at most ", kMostTaps, " a side and span ", kMostSpan, ", got ", k,
                    " dilated by ", dilation[d]);
    STD_TORCH_CHECK(stride[d] == 1 || stride[d] == 2, op, ": stride must be 1 or 2, got ", stride[d]);
    STD_TORCH_CHECK(
        padding[d] >= 0 && padding[d] < 1 << 28 && side < 1 << 28 && side + 2 * padding[d] > (k - 1) * dilation[d], op,
        ": the kernel must fit into its input, padded by at least 0, and both be below 2^28");
  }
}

const float* floats(const char* name, const std::optional<Tensor>& t, int64_t n) {
  STD_TORCH_CHECK(!t || (t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == n),
                  "partial_conv2d_direct: ", name, " must be contiguous float32 with ", n, " values");
  return t ? data<float>(*t) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> partial_conv2d_direct(std::vector<Tensor> sources, std::vector<Tensor> masks,
                                                         Tensor weight, std::optional<Tensor> bias,
                                                         std::optional<Tensor> scale, Ints upsample, Ints stride,
                                                         Ints padding, Ints dilation, int64_t groups,
                                                         std::string activation, double slope) {
  check_direct(sources, masks, weight, upsample, stride, padding, dilation, groups);
  const DeviceGuard guard(weight);
  for (Tensor& x : sources) x = channels_last(x);
  weight = channels_last(weight);
  const int64_t batch = sources[0].size(0), outputs = weight.size(0), mask_batch = batch_of(masks);
  int64_t size[2], out[2];
  for (int d = 0; d < 2; ++d) {
    size[d] = sources[0].size(2 + d) * upsample[0];
    out[d] = window_output(size[d], weight.size(2 + d), stride[d], padding[d], dilation[d]);
  }
  const MaskType kind = mask_type("partial_conv2d_direct", masks[0].scalar_type());
  Tensor y = empty_channels_last({batch, outputs, out[0], out[1]}, sources[0].scalar_type(), weight);
  Tensor count = empty({mask_batch, 1, out[0], out[1]}, ScalarType::Int, weight);
  Tensor mask = empty({mask_batch, 1, out[0], out[1]}, masks[0].scalar_type(), weight);
  dispatch_single(y.scalar_type(), [&]<typename T>() {
    Layer<T> l{};
    for (size_t i = 0; i < sources.size(); ++i) {
      const Tensor &x = sources[i], &m = masks[i];
      index32(x.numel()), index32(m.numel());
      l.source[i] = {
          data<T>(x),
          m.const_data_ptr(),
          mask_type("partial_conv2d_direct", m.scalar_type()).bytes,
          m.size(0) == 1,
          static_cast<int>(m.size(1)),
          static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)),
          static_cast<int>(x.size(1)),
          upsample[i] == 2,
          x.size(1) % kQuad == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (kQuad * sizeof(T)) == 0};
    }
    l.sources = static_cast<int>(sources.size());
    l.weight = data<T>(weight);
    l.bias = floats("bias", bias, outputs);
    l.scale = floats("scale", scale, outputs);
    l.y = mutable_data<T>(y);
    l.count = mutable_data<int32_t>(count);
    l.mask = mask.mutable_data_ptr();
    l.mask_type = kind;
    index32(y.numel()), index32(count.numel()), index32(weight.numel());
    l.batch = static_cast<int>(batch);
    l.mask_batch = static_cast<int>(mask_batch);
    l.channels = static_cast<int>(weight.size(1));
    l.outputs = static_cast<int>(outputs);
    l.h = static_cast<int>(size[0]), l.w = static_cast<int>(size[1]);
    l.out_h = static_cast<int>(out[0]), l.out_w = static_cast<int>(out[1]);
    for (int d = 0; d < 2; ++d) {
      l.kernel[d] = static_cast<int>(weight.size(2 + d));
      l.stride[d] = static_cast<int>(stride[d]);
      l.padding[d] = static_cast<int>(padding[d]);
      l.dilation[d] = static_cast<int>(dilation[d]);
    }
    l.activation = parse_activation(activation);
    l.slope = static_cast<float>(slope);
    if (batch == 0 && mask_batch == 0) return;
    if (outputs <= 4)
      launch<4>(l, current_stream(y));
    else
      launch<8>(l, current_stream(y));
  });
  return {y, count, mask};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("partial_conv2d_direct", TORCH_BOX(&partial_conv2d_direct));
}

}  // namespace fused_inpaint::cuda
