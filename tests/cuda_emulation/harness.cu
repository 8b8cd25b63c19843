// SPDX-License-Identifier: Apache-2.0
// Kernels that work, and kernels with one fault each that the emulation must show.
#include <algorithm>
#include <iterator>
#include <string>

#include "common/aten.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Known at run time only, so that no compiler sees the fault.
enum class Fault {
  none,
  no_barrier,
  off_by_one,
  shared_off_by_one,
  local_off_by_one,
  unwritten,
  exits,
  diverges,
  partial_mask,
  too_much_shared
};
constexpr const char* kFaults[] = {"",          "no_barrier", "off_by_one", "shared_off_by_one", "local_off_by_one",
                                   "unwritten", "exits",      "diverges",   "partial_mask",      "too_much_shared"};

__global__ void __launch_bounds__(256) add(const float4* __restrict__ x, float4* __restrict__ out, int n, Fault fault) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n + (fault == Fault::off_by_one) - (fault == Fault::unwritten)) return;
  const float4 v = __ldg(x + (i < n ? i : 0));
  out[i] = make_float4(v.x + v.x, v.y + v.y, v.z + v.z, v.w + v.w);
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_down_sync(0xffffffffu, v, delta);
  return v;
}

template <typename T, int kThreads>
__global__ void block_sum(const T* __restrict__ x, float* __restrict__ out, int n, Fault fault) {
  FUSED_INPAINT_SHARED(float, part, kThreads / 32);
  const int i = blockIdx.x * kThreads + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (fault == Fault::exits && i >= n) return;
  if (fault == Fault::partial_mask) __syncwarp(0xffffu);
  const float sum = warp_sum(i < n ? __bfloat162float(x[i]) : 0.f);
  float local[2] = {0.f, 0.f}, *volatile at = local;
  at[fault == Fault::local_off_by_one ? 2 : 1] = sum;
  if (lane == 0 && !(fault == Fault::unwritten && warp == 1))
    part[warp + (fault == Fault::shared_off_by_one)] = local[0] + local[1];
  if (fault == Fault::diverges && warp == 0)
    __syncthreads();
  else if (fault != Fault::no_barrier)
    __syncthreads();
  if (warp == 0) {
    const float total = warp_sum(lane < kThreads / 32 ? part[lane] : 0.f);
    if (lane == 0) out[blockIdx.x] = total;
  }
}

// Each block turns two tiles round; the second barrier keeps one tile's writes behind the other's reads.
__global__ void reverse_tiles(const float* __restrict__ x, float* __restrict__ out, Fault fault) {
  FUSED_INPAINT_DYNAMIC_SHARED(float, tile);
  const int threads = blockDim.x, t = threadIdx.x;
  for (int i = 2 * blockIdx.x * threads; i < 2 * (static_cast<int>(blockIdx.x) + 1) * threads; i += threads) {
    tile[t + (fault == Fault::shared_off_by_one)] = x[i + t];
    __syncthreads();
    out[i + t] = tile[threads - 1 - t];
    if (fault != Fault::no_barrier) __syncthreads();
  }
}

__global__ void warp_calls(float* out) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  float* o = out + 8 * threadIdx.x;
  o[0] = __shfl_sync(all, static_cast<float>(lane), lane + 1, 8);
  o[1] = __shfl_up_sync(all, static_cast<double>(lane), 1, 8);
  o[2] = __shfl_down_sync(all, lane, 3, 16);
  o[3] = __bfloat162float(__shfl_xor_sync(all, __float2bfloat16(lane), 5));
  o[4] = __popc(__ballot_sync(all, lane % 3 == 0));
  o[5] = __any_sync(all, lane == 31) + 2 * __any_sync(all, lane == 32);
  o[6] = __all_sync(all, lane < 32) + 2 * __all_sync(all, lane < 31);
  o[7] = __half2float(__float2half(lane)) + threadIdx.y;
}

Tensor run(const std::string& kernel, const std::string& name, int64_t threads, const Tensor& x) {
  const auto found = std::find(std::begin(kFaults), std::end(kFaults), name);
  STD_TORCH_CHECK(found != std::end(kFaults), "run: unknown fault ", name);
  const Fault fault = static_cast<Fault>(found - std::begin(kFaults));
  const int n = static_cast<int>(x.numel());
  const cudaStream_t stream = nullptr;
  const auto empty = [&](int64_t size) { return fused_inpaint::empty({size}, ScalarType::Float, x); };
  if (kernel == "add") {
    Tensor out = empty(n);
    FUSED_INPAINT_LAUNCH(add, (n / 4 + threads - 1) / threads, threads, 0, stream,
                         static_cast<const float4*>(x.const_data_ptr()), static_cast<float4*>(out.mutable_data_ptr()),
                         n / 4, fault);
    return out;
  }
  if (kernel == "block_sum") {
    Tensor out = empty((n + 255) / 256);
    FUSED_INPAINT_LAUNCH((block_sum<__nv_bfloat16, 256>), dim3((n + 255) / 256), threads, 0, stream,
                         static_cast<const __nv_bfloat16*>(x.const_data_ptr()),
                         static_cast<float*>(out.mutable_data_ptr()), n, fault);
    return out;
  }
  if (kernel == "reverse_tiles") {
    Tensor out = empty(n);
    FUSED_INPAINT_LAUNCH(
        reverse_tiles, n / (2 * threads), threads, fault == Fault::too_much_shared ? 51200 : threads * sizeof(float),
        stream, static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), fault);
    return out;
  }
  Tensor out = empty(8 * threads);
  FUSED_INPAINT_LAUNCH(warp_calls, 1, threads, 0, stream, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(cuda_emulation, m) { m.def("run(str kernel, str fault, int threads, Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(cuda_emulation, FUSED_INPAINT_CUDA_KEY, m) { m.impl("run", TORCH_BOX(&run)); }
