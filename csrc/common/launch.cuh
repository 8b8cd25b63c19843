// SPDX-License-Identifier: Apache-2.0
// Launching kernels: on the current stream of the tensor's device, checked, and through macros that the emulation on
// the CPU (tests/cuda_emulation) defines in its own way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/aten.h"

#ifdef FUSED_INPAINT_EMULATE

namespace fused_inpaint {
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
}  // namespace fused_inpaint

#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define FUSED_INPAINT_CUDA_KEY CUDA
#define FUSED_INPAINT_SHARED(type, name, count) __shared__ type name[count]
#define FUSED_INPAINT_DYNAMIC_SHARED(type, name)                \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define FUSED_INPAINT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                          \
  do {                                                                                                                \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);                                               \
    const cudaError_t launched = cudaGetLastError();                                                                  \
    STD_TORCH_CHECK(launched == cudaSuccess, "fused_inpaint: launch of " #kernel ": ", cudaGetErrorString(launched)); \
  } while (false)

namespace fused_inpaint {
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
struct DeviceGuard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceGuard(const Tensor& t) : guard(t.get_device_index()) {}
};
}  // namespace fused_inpaint

#endif

namespace fused_inpaint {

constexpr int kThreads = 256;

// Blocks for a grid-stride loop over n items: enough to fill any GPU, few enough that the launch costs nothing.
inline dim3 blocks_for(int64_t n) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>((n + kThreads - 1) / kThreads, 1, 65535)));
}

// For maps with channels last: threads x over packs of channels, y and blocks over pixels, so that no index is divided.
// The grid still fills any GPU, and is small enough that what a thread loads for its channels serves many pixels.
inline dim3 pixel_threads(int64_t packs) {
  const unsigned x = static_cast<unsigned>(std::clamp<int64_t>(packs, 1, kThreads));
  return dim3(x, kThreads / x);
}
inline dim3 pixel_blocks(int64_t pixels, dim3 threads) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>((pixels + threads.y - 1) / threads.y, 1, 4096)));
}

}  // namespace fused_inpaint
