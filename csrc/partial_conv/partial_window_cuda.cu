// SPDX-License-Identifier: Apache-2.0
// Masks on the GPU: packed into bytes (their values are not checked: that would wait for the device), and summed over
// the kernel's windows, one launch for a layer.
#define FUSED_INPAINT_DEVICE cuda
#include <array>

#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_conv.h"

namespace fused_inpaint::cuda {
namespace {

constexpr int kMostSources = 8;

template <typename T>
__global__ void pack_kernel(const T* mask, uint8_t* plane, int64_t n) {
  for (int64_t i = global_thread(); i < n; i += all_threads()) plane[i] = load(mask[i]) != 0;
}

__global__ void pack_bytes_kernel(const uint8_t* mask, uint8_t* plane, int64_t n) {
  for (int64_t i = global_thread(); i < n; i += all_threads()) plane[i] = mask[i] != 0;
}

struct Source {
  const uint8_t* mask;
  int64_t n, planes, h, w, up, weight;  // weight: channels that a plane stands for
};

struct Sources {
  Source source[kMostSources];
  int count;
};

struct Window {
  int64_t batch, h, w, out_h, out_w;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

__global__ void window_kernel(Sources sources, Window g, int32_t* counts, uint8_t* valid) {
  for (int64_t i = global_thread(); i < g.batch * g.out_h * g.out_w; i += all_threads()) {
    const int64_t x = i % g.out_w, y = i / g.out_w % g.out_h, n = i / g.out_w / g.out_h;
    int64_t total = 0;
    for (int s = 0; s < sources.count; ++s) {
      const Source& m = sources.source[s];
      const uint8_t* planes = m.mask + (m.n == 1 ? 0 : n * m.planes * m.h * m.w);
      int64_t sum = 0;
      for (int64_t u = 0; u < g.kernel[0]; ++u) {
        const int64_t row = y * g.stride[0] - g.padding[0] + u * g.dilation[0];
        if (row < 0 || row >= g.h) continue;
        for (int64_t v = 0; v < g.kernel[1]; ++v) {
          const int64_t column = x * g.stride[1] - g.padding[1] + v * g.dilation[1];
          if (column < 0 || column >= g.w) continue;
          for (int64_t p = 0; p < m.planes; ++p) sum += planes[(p * m.h + row / m.up) * m.w + column / m.up];
        }
      }
      total += sum * m.weight;
    }
    counts[i] = static_cast<int32_t>(total);
    valid[i] = total > 0;
  }
}

}  // namespace

Tensor mask_plane(Tensor mask, std::string) {
  const DeviceGuard guard(mask);
  const Tensor dense = torch::stable::contiguous(mask);
  Tensor plane = empty({mask.size(0), mask.size(1), mask.size(2), mask.size(3)}, ScalarType::Byte, mask);
  if (plane.numel() == 0) return plane;
  const int64_t n = plane.numel();
  if (mask.scalar_type() == ScalarType::Bool || mask.scalar_type() == ScalarType::Byte)
    FUSED_INPAINT_LAUNCH(pack_bytes_kernel, blocks_for(n), dim3(kThreads), 0, current_stream(mask),
                         data<uint8_t>(dense), mutable_data<uint8_t>(plane), n);
  else
    dispatch_cuda(mask.scalar_type(), [&]<typename T>() {
      FUSED_INPAINT_LAUNCH(pack_kernel<T>, blocks_for(n), dim3(kThreads), 0, current_stream(mask), data<T>(dense),
                           mutable_data<uint8_t>(plane), n);
    });
  return plane;
}

std::tuple<Tensor, Tensor> partial_window(std::vector<Tensor> masks, Ints channels, Ints upsample, Ints kernel,
                                          Ints stride, Ints padding, Ints dilation) {
  check_masks(masks, channels, upsample);
  STD_TORCH_CHECK(masks.size() <= kMostSources, "partial_window: masks must be at most ", kMostSources, ", got ",
                  masks.size());
  const DeviceGuard guard(masks[0]);
  Sources sources{};
  Window g{};
  g.batch = batch_of(masks);
  for (const Tensor& m : masks) {
    const size_t i = sources.count++;
    sources.source[i] = {data<uint8_t>(m),       m.size(0), m.size(1), m.size(2), m.size(3), upsample[i],
                         channels[i] / m.size(1)};
  }
  g.h = masks[0].size(2) * upsample[0];
  g.w = masks[0].size(3) * upsample[0];
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = kernel[d];
    g.stride[d] = stride[d];
    g.padding[d] = padding[d];
    g.dilation[d] = dilation[d];
  }
  g.out_h = window_output(g.h, kernel[0], stride[0], padding[0], dilation[0]);
  g.out_w = window_output(g.w, kernel[1], stride[1], padding[1], dilation[1]);
  Tensor counts = empty({g.batch, 1, g.out_h, g.out_w}, ScalarType::Int, masks[0]);
  Tensor valid = empty({g.batch, 1, g.out_h, g.out_w}, ScalarType::Byte, masks[0]);
  if (counts.numel() > 0)
    FUSED_INPAINT_LAUNCH(window_kernel, blocks_for(counts.numel()), dim3(kThreads), 0, current_stream(masks[0]),
                         sources, g, mutable_data<int32_t>(counts), mutable_data<uint8_t>(valid));
  return {counts, valid};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("mask_plane", TORCH_BOX(&mask_plane));
  m.impl("partial_window", TORCH_BOX(&partial_window));
}

}  // namespace fused_inpaint::cuda
