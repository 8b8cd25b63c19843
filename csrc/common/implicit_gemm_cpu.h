// SPDX-License-Identifier: Apache-2.0
// A convolution over few pixels on a CPU, as a product of matrices neither of which is laid out. The vendor brings the
// whole weight into its own layout in each call, which over few pixels takes longer than the products; here it is read
// once, as it lies: (O, kh, kw, C), with what a tap reads lying along its rows, too. For AVX-512: with AVX2, whose
// registers hold a quarter of the sums, the vendor is as quick.
#pragma once

#include <algorithm>
#include <vector>

#include "common/products.h"

namespace fused_inpaint::cpu {
namespace {

// What the taps of a convolution of x (N, C, H, W) to (N, O, h, w) read.
struct Taps {
  int64_t height, width, h, w, rows, across;  // rows: output pixels, batch included; across: taps along a row
  const ConvGeometry& g;

  Taps(const Tensor& x, const Tensor& weight, const ConvGeometry& geometry, int64_t out_h, int64_t out_w)
      : height(x.size(2)),
        width(x.size(3)),
        h(out_h),
        w(out_w),
        rows(x.size(0) * out_h * out_w),
        across(weight.size(3)),
        g(geometry) {}

  // The pixel of x, batch included, or -1 in the padding.
  int64_t source(int64_t tap, int64_t row) const {
    const int64_t i = row / w % h * g.stride[0] - g.padding[0] + tap / across * g.dilation[0];
    const int64_t j = row % w * g.stride[1] - g.padding[1] + tap % across * g.dilation[1];
    return i >= 0 && i < height && j >= 0 && j < width ? (row / w / h * height + i) * width + j : -1;
  }
};

constexpr int kLanes = 16;
constexpr int kFilters = 4, kPixels = 4;  // multiplied at a time; maps are filled up to a multiple of kPixels
constexpr int64_t kDepth = 1024;          // values of the filters that all pixels meet while the nearest cache has them

struct ImplicitGemm {
  std::vector<const float*> read;  // (taps, pixels): where the channels lie that a tap reads, or zeros
  int64_t taps, pixels, channels;

  int64_t pitch() const { return taps * channels; }  // of a filter
};

#if defined(__x86_64__) && defined(__GNUC__)

inline bool has_implicit_gemm() { return __builtin_cpu_supports("avx512f"); }

typedef float Wide __attribute__((vector_size(4 * kLanes)));
typedef float Stored __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Adds to the sums (kPixels, kFilters, kLanes), or begins them, n values that lie `offset` further on.
__attribute__((target("avx512f"))) void multiply_pixels(const float* const* read, int64_t offset, const float* filters,
                                                        int64_t pitch, int64_t n, bool first, float* sums) {
  Wide sum[kPixels][kFilters];
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int f = 0; f < kFilters; ++f)
      sum[p][f] = first ? Wide{} : *reinterpret_cast<const Stored*>(sums + (p * kFilters + f) * kLanes);
  const float* from[kPixels];
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) from[p] = read[p] + offset;
  for (int64_t k = 0; k < n; k += kLanes) {
    Wide x[kPixels];
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) x[p] = *reinterpret_cast<const Stored*>(from[p] + k);
#pragma GCC unroll 4
    for (int f = 0; f < kFilters; ++f) {
      const Wide w = *reinterpret_cast<const Stored*>(filters + f * pitch + k);
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p) sum[p][f] += x[p] * w;
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int f = 0; f < kFilters; ++f) *reinterpret_cast<Stored*>(sums + (p * kFilters + f) * kLanes) = sum[p][f];
}

// kFilters filters over all pixels, of which the first `rows` go to y (rows, stride).
__attribute__((target("avx512f"))) void multiply_filters(const ImplicitGemm& g, const float* filters, float* sums,
                                                         float* y, int64_t stride, int64_t rows) {
  for (int64_t tap = 0; tap < g.taps; ++tap)
    for (int64_t at = 0; at < g.channels; at += kDepth) {
      const int64_t n = std::min(kDepth, g.channels - at);
      const float* block = filters + tap * g.channels + at;
      for (int64_t p = 0; p < g.pixels; p += kPixels)
        multiply_pixels(g.read.data() + tap * g.pixels + p, at, block, g.pitch(), n, tap == 0 && at == 0,
                        sums + p * kFilters * kLanes);
    }
  for (int64_t i = 0; i < rows * kFilters; ++i) {
    float* sum = sums + i * kLanes;
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
    y[i / kFilters * stride + i % kFilters] = sum[0];
  }
}

#else

inline bool has_implicit_gemm() { return false; }
inline void multiply_filters(const ImplicitGemm&, const float*, float*, float*, int64_t, int64_t) {}

#endif

// x (N, C, H, W), weight (O, C, kh, kw), both channels last, to (N, O, h, w). C is a multiple of kLanes, O of kFilters.
inline Tensor implicit_gemm(const Tensor& x, const Tensor& weight, const Taps& taps) {
  ImplicitGemm gemm{{}, weight.size(2) * weight.size(3), ceil_div(taps.rows, kPixels) * kPixels, x.size(1)};
  const std::vector<float> zeros(gemm.channels, 0.0f);
  gemm.read.assign(gemm.taps * gemm.pixels, zeros.data());
  for (int64_t tap = 0; tap < gemm.taps; ++tap)
    for (int64_t row = 0; row < taps.rows; ++row)
      if (const int64_t from = taps.source(tap, row); from >= 0)
        gemm.read[tap * gemm.pixels + row] = data<float>(x) + from * gemm.channels;
  const int64_t outputs = weight.size(0);
  Tensor out = empty_channels_last({x.size(0), outputs, taps.h, taps.w}, ScalarType::Float, x);
  const float* filters = data<float>(weight);
  float* y = mutable_data<float>(out);
  share(outputs / kFilters, [&](auto&& take) {
    Tensor sums = empty({gemm.pixels * kFilters * kLanes}, ScalarType::Float, x);
    for (int64_t item; (item = take()) >= 0;)
      multiply_filters(gemm, filters + item * kFilters * gemm.pitch(), mutable_data<float>(sums), y + item * kFilters,
                       outputs, taps.rows);
  });
  return out;
}

}  // namespace
}  // namespace fused_inpaint::cpu
