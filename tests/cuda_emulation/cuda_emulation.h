// SPDX-License-Identifier: Apache-2.0
// Compiles CUDA C++ with g++: g++ -x c++ -include cuda_emulation.h -DFUSED_INPAINT_EMULATE; runner.h runs it.
#pragma once

// Headers that define the words redefined below come first.
#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "runner.h"

namespace fused_inpaint_emulation {

template <typename T>
T* shared(const void* declaration) {
  using Element = std::remove_all_extents_t<T>;
  static_assert(std::is_trivially_default_constructible_v<Element> && std::is_trivially_destructible_v<Element>);
  return static_cast<T*>(runner->shared_memory(declaration, sizeof(T)));
}

// Every lane gives a value and gets that of lane `source`.
template <typename T>
T exchange(const char* call, unsigned mask, T value, int source, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if (mask != 0xffffffffu) runner->fail(std::string(call) + " at " + text(site) + ": only full masks are emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = runner->wait(State::at_warp_call, call, site, bits, source);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

}  // namespace fused_inpaint_emulation

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static_assert(false, "use FUSED_INPAINT_SHARED or FUSED_INPAINT_DYNAMIC_SHARED");
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (std::as_const(::fused_inpaint_emulation::runner->running->index))
#define blockIdx (std::as_const(::fused_inpaint_emulation::runner->index))
#define blockDim (std::as_const(::fused_inpaint_emulation::runner->size))
#define gridDim (std::as_const(::fused_inpaint_emulation::runner->grid))
#define warpSize 32

// kernel<<<grid, block, shared_bytes, stream>>>(...); a kernel whose name has commas in it needs parentheses.
#define FUSED_INPAINT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)          \
  do {                                                                                \
    const auto launch_arguments = std::make_tuple(__VA_ARGS__);                       \
    (void)(stream);                                                                   \
    fused_inpaint_emulation::launch(grid, block, shared_bytes, [&] {                  \
      std::apply([&](auto... arguments) { kernel(arguments...); }, launch_arguments); \
    });                                                                               \
  } while (false)
// __shared__ type name[count];
#define FUSED_INPAINT_SHARED(type, name, count) \
  static char name##_declaration;               \
  auto& name = *::fused_inpaint_emulation::shared<type[count]>(&name##_declaration)
// extern __shared__ type name[]; aligned for every vector type
#define FUSED_INPAINT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::fused_inpaint_emulation::runner->dynamic_shared_memory())

using FusedInpaintSite = std::source_location;  // of the call, for a default argument

inline void __syncthreads(FusedInpaintSite site = FusedInpaintSite::current()) {
  using namespace fused_inpaint_emulation;
  runner->wait(State::at_barrier, "__syncthreads", site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FusedInpaintSite site = FusedInpaintSite::current()) {
  fused_inpaint_emulation::exchange("__syncwarp", mask, 0, 0, site);
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, FusedInpaintSite site = FusedInpaintSite::current()) {
  const int lane = fused_inpaint_emulation::runner->lane();
  return fused_inpaint_emulation::exchange("__shfl_sync", mask, v, (lane & -width) | (from & (width - 1)), site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                   FusedInpaintSite site = FusedInpaintSite::current()) {
  const int lane = fused_inpaint_emulation::runner->lane(), from = lane + static_cast<int>(delta);
  return fused_inpaint_emulation::exchange("__shfl_down_sync", mask, v, from < (lane & -width) + width ? from : lane,
                                           site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                 FusedInpaintSite site = FusedInpaintSite::current()) {
  const int lane = fused_inpaint_emulation::runner->lane(), from = lane - static_cast<int>(delta);
  return fused_inpaint_emulation::exchange("__shfl_up_sync", mask, v, from >= (lane & -width) ? from : lane, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, FusedInpaintSite site = FusedInpaintSite::current()) {
  const int lane = fused_inpaint_emulation::runner->lane(), from = lane ^ bits;
  return fused_inpaint_emulation::exchange("__shfl_xor_sync", mask, v, from < (lane & -width) + width ? from : lane,
                                           site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FusedInpaintSite site = FusedInpaintSite::current()) {
  using namespace fused_inpaint_emulation;
  return static_cast<unsigned>(exchange<uint64_t>("__ballot_sync", mask, predicate != 0, kBallot, site));
}
inline int __any_sync(unsigned mask, int predicate, FusedInpaintSite site = FusedInpaintSite::current()) {
  using namespace fused_inpaint_emulation;
  return exchange<uint64_t>("__any_sync", mask, predicate != 0, kBallot, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FusedInpaintSite site = FusedInpaintSite::current()) {
  using namespace fused_inpaint_emulation;
  return exchange<uint64_t>("__all_sync", mask, predicate == 0, kBallot, site) == 0;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  static_assert(std::is_integral_v<T>, "sums of floats must have a fixed order");
  return std::exchange(*p, *p + v);
}
inline void __threadfence() {}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
// Products that the compiler must not join with a sum.
template <typename T>
T rounded_product(T a, T b) {
  const volatile T product = a * b;
  return product;
}
inline float __fmul_rn(float a, float b) { return rounded_product(a, b); }
inline double __dmul_rn(double a, double b) { return rounded_product(a, b); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
using std::max;
using std::min;

// The runtime calls that host functions may make; the library that would have them is not linked.
extern "C" inline cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
extern "C" inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute attribute, int value) {
  auto& limit = fused_inpaint_emulation::shared_limit;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) limit = std::max(limit, static_cast<size_t>(value));
  return cudaSuccess;
}
