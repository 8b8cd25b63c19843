// SPDX-License-Identifier: Apache-2.0
// Masks on the GPU: packed into bytes (their values are not checked: that would wait for the device), and summed over
// the kernel's windows, one launch for a layer or for a run of small ones.
#define FUSED_INPAINT_DEVICE cuda
#include "common/cuda_types.cuh"
#include "common/launch.cuh"
#include "partial_conv/partial_mask.cuh"
#include "partial_conv/partial_window_host.h"

namespace fused_inpaint::cuda {
namespace {

constexpr int kMostSources = 8;  // of a step: its descriptor is passed by value

// By the threads `first`, `first` + `step`, ...
__device__ void pack(const void* mask, int bytes, uint8_t* plane, unsigned n, unsigned first, unsigned step) {
  for (unsigned i = first; i < n; i += step) plane[i] = holds_value(mask, bytes, i);
}

__global__ void pack_kernel(const void* mask, int bytes, uint8_t* plane, unsigned n) {
  pack(mask, bytes, plane, n, global_thread(), all_threads());
}

struct Source {
  const void* mask;
  int planes, h, w, weight;      // weight: channels that a plane stands for
  uint8_t bytes, shared, shift;  // bytes: of an element; shift: 1 if upsampled
};

struct Step {
  Source source[kMostSources];
  int sources, h, w, out_h, out_w;
  int kernel[2], stride[2], padding[2], dilation[2];
  int32_t* counts;
  void* valid;
  __device__ unsigned pixels() const { return static_cast<unsigned>(out_h) * out_w; }
};

// Steps that one launch does: as many as fit into its 4 KB of arguments.
constexpr int kMostSteps = 4000 / sizeof(Step);
static_assert(kMostSteps >= 12, "a U-Net's small steps are to be one launch");
struct Run {
  Step step[kMostSteps];
  int steps;
};

// A window's valid values in one source, whose elements have the bits of U. K: side of a square kernel without
// dilation, whose windows inside the map are summed without a look at each tap; 0 for any other.
template <int K, typename U>
__device__ unsigned sum_source(const Step& g, const Source& m, unsigned n, int top, int left) {
  const bool inside = K > 0 && top >= 0 && left >= 0 && top + K <= g.h && left + K <= g.w;
  unsigned sum = 0;
  for (int p = 0; p < m.planes; ++p) {
    const U* plane = static_cast<const U*>(m.mask) + ((m.shared ? 0 : n) * m.planes + p) * m.h * m.w;
    if (inside) {
#pragma unroll
      for (int u = 0; u < K; ++u) {
        const U* row = plane + ((top + u) >> m.shift) * m.w;
#pragma unroll
        for (int v = 0; v < K; ++v) sum += holds_value(row[(left + v) >> m.shift]);
      }
      continue;
    }
    for (int u = 0; u < g.kernel[0]; ++u) {
      const int row = top + u * g.dilation[0];
      if (row < 0 || row >= g.h) continue;
#pragma unroll 1
      for (int v = 0; v < g.kernel[1]; ++v) {
        const int column = left + v * g.dilation[1];
        if (column >= 0 && column < g.w) sum += holds_value(plane[(row >> m.shift) * m.w + (column >> m.shift)]);
      }
    }
  }
  return sum * m.weight;
}

template <int K>
__device__ void sum_window(const Step& g, MaskType valid, unsigned n, unsigned pixel) {
  const int top = static_cast<int>(pixel / g.out_w) * g.stride[0] - g.padding[0];
  const int left = static_cast<int>(pixel % g.out_w) * g.stride[1] - g.padding[1];
  unsigned total = 0;
  for (int s = 0; s < g.sources; ++s)
    total += with_bits(g.source[s].bytes, [&]<typename U>() { return sum_source<K, U>(g, g.source[s], n, top, left); });
  const unsigned at = n * g.pixels() + pixel;
  g.counts[at] = total;
  write_bits(g.valid, valid.bytes, at, total > 0 ? valid.one : 0);
}

// What a layer on its own has beside a step: the type of its new mask, and where its masks go as bytes, if they do.
struct Packing {
  MaskType valid;
  uint8_t* to[kMostSources];
  unsigned values[kMostSources];
};

template <int K>
__global__ void window_kernel(const __grid_constant__ Step step, const __grid_constant__ Packing packing,
                              unsigned batch) {
  const unsigned pixels = step.pixels();
  for (unsigned n = blockIdx.y; n < batch; n += gridDim.y)
    for (unsigned pixel = global_thread(); pixel < pixels; pixel += all_threads())
      sum_window<K>(step, packing.valid, n, pixel);
  for (int s = 0; s < step.sources; ++s)
    pack(step.source[s].mask, step.source[s].bytes, packing.to[s], packing.values[s],
         blockIdx.y * all_threads() + global_thread(), gridDim.y * all_threads());
}

// A map of at most so many pixels is a step for one block, a pixel for each thread: it takes less than a launch does.
constexpr unsigned kSmall = 1024;

// One block for each sample, whose masks depend on no other.
__global__ void __launch_bounds__(kSmall) window_run_kernel(const __grid_constant__ Run run) {
  for (int s = 0; s < run.steps; ++s) {
    if (threadIdx.x < run.step[s].pixels()) sum_window<0>(run.step[s], MaskType{1, 1}, blockIdx.x, threadIdx.x);
    __syncthreads();  // the next step reads what this one wrote
  }
}

Step describe(WindowStep& step) {
  auto pair = [](int (&to)[2], const Ints& from) {
    to[0] = static_cast<int>(from[0]), to[1] = static_cast<int>(from[1]);
  };
  STD_TORCH_CHECK(step.masks.size() <= kMostSources, "partial_window: masks must be at most ", kMostSources, ", got ",
                  step.masks.size());
  Step g{};
  for (const Tensor& m : step.masks) {
    const int i = g.sources++;
    g.source[i] = {m.const_data_ptr(),
                   static_cast<int>(m.size(1)),
                   static_cast<int>(m.size(2)),
                   static_cast<int>(m.size(3)),
                   static_cast<int>(step.channels[i] / m.size(1)),
                   static_cast<uint8_t>(mask_type("partial_window", m.scalar_type()).bytes),
                   m.size(0) == 1,
                   step.upsample[i] == 2};
  }
  g.h = g.source[0].h << g.source[0].shift;
  g.w = g.source[0].w << g.source[0].shift;
  g.out_h = static_cast<int>(step.counts.size(2));
  g.out_w = static_cast<int>(step.counts.size(3));
  pair(g.kernel, step.kernel), pair(g.stride, step.stride), pair(g.padding, step.padding);
  pair(g.dilation, step.dilation);
  g.counts = mutable_data<int32_t>(step.counts);
  g.valid = step.valid.mutable_data_ptr();
  return g;
}

// Calls body.template operator()<K>() for sum_window.
template <typename F>
void with_side(const Step& g, F&& body) {
  const bool plain = g.kernel[0] == g.kernel[1] && g.dilation[0] == 1 && g.dilation[1] == 1;
  switch (plain ? g.kernel[0] : 0) {
    case 3:
      return body.template operator()<3>();
    case 5:
      return body.template operator()<5>();
    case 7:
      return body.template operator()<7>();
    default:
      return body.template operator()<0>();
  }
}

void sum_windows(std::vector<WindowStep>& steps) {
  if (steps.empty()) return;
  const DeviceGuard guard(steps[0].counts);
  const cudaStream_t stream = current_stream(steps[0].counts);
  Run run{};
  unsigned blocks = 0;
  auto flush = [&] {
    if (run.steps) FUSED_INPAINT_LAUNCH(window_run_kernel, dim3(blocks), dim3(kSmall), 0, stream, run);
    run.steps = 0;
  };
  for (WindowStep& step : steps) {
    const unsigned batch = static_cast<unsigned>(step.counts.size(0));
    const bool alone = !step.planes.empty();
    if (batch == 0 && !alone) continue;
    const int64_t pixels = step.counts.size(2) * step.counts.size(3);
    const bool small = pixels <= kSmall && !alone;
    if (!small || run.steps == kMostSteps || batch != blocks) flush();
    if (small) {
      run.step[run.steps++] = describe(step);
      blocks = batch;
    } else {
      const Step g = describe(step);
      const unsigned samples = std::clamp(batch, 1u, 65535u);
      Packing packing{mask_type("partial_window", step.valid.scalar_type()), {}, {}};
      int64_t items = pixels;  // for each of the grid's samples
      for (size_t i = 0; i < step.planes.size(); ++i) {
        packing.to[i] = mutable_data<uint8_t>(step.planes[i]);
        packing.values[i] = index32(step.planes[i].numel());
        items = std::max(items, ceil_div(step.planes[i].numel(), samples));
      }
      const dim3 grid(blocks_for(items).x, samples);
      with_side(g, [&]<int K>() {
        FUSED_INPAINT_LAUNCH(window_kernel<K>, grid, dim3(kThreads), 0, stream, g, packing, batch);
      });
    }
  }
  flush();
}

}  // namespace

Tensor mask_plane(Tensor mask, std::string) {
  const DeviceGuard guard(mask);
  const int bytes = mask_type("mask_plane", mask.scalar_type()).bytes;
  const Tensor given = dense(mask);
  Tensor plane = empty_of_size(mask, ScalarType::Byte);
  if (plane.numel() == 0) return plane;
  const unsigned n = index32(plane.numel());
  FUSED_INPAINT_LAUNCH(pack_kernel, blocks_for(n), dim3(kThreads), 0, current_stream(mask), given.const_data_ptr(),
                       bytes, mutable_data<uint8_t>(plane), n);
  return plane;
}

// The masks' values are not looked at, so they are packed in the launch that sums them.
MaskWindow window_of_masks(const char* op, const std::vector<Tensor>& masks, const Ints& channels, const Ints& upsample,
                           const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation) {
  std::vector<Tensor> given, planes;
  for (const Tensor& mask : masks) {
    mask_type(op, mask.scalar_type());  // refuses what is none
    given.push_back(dense(mask));
    planes.push_back(empty_of_size(mask, ScalarType::Byte));
  }
  std::vector<WindowStep> steps{
      window_step(op, given, channels, upsample, kernel, stride, padding, dilation, masks[0].scalar_type())};
  steps[0].planes = planes;
  sum_windows(steps);
  return {planes, steps[0].counts, steps[0].valid};
}

STABLE_TORCH_LIBRARY_IMPL(fused_inpaint, FUSED_INPAINT_CUDA_KEY, m) {
  m.impl("mask_plane", TORCH_BOX(&mask_plane));
  m.impl("partial_window", TORCH_BOX(&partial_window));
  m.impl("partial_window_chain", TORCH_BOX(&partial_window_chain));
}

}  // namespace fused_inpaint::cuda
