// SPDX-License-Identifier: Apache-2.0
// Element types and vector accesses in device code.
#pragma once

#include <cuda_fp16.h>

#include <initializer_list>

#include "common/dispatch.h"

namespace fused_inpaint {

__device__ inline float load(__half v) { return __half2float(v); }
__device__ inline void store(__half* p, float v) { *p = __float2half(v); }

// Index arithmetic is 32-bit, since a 64-bit division takes tens of instructions. An index of below 2^31 plus all
// threads of a grid stays below 2^32.
inline unsigned index32(int64_t n) {
  STD_TORCH_CHECK(n < int64_t{1} << 31, "fused_inpaint: tensors must have fewer than 2^31 elements, got ", n);
  return static_cast<unsigned>(n);
}

// a * b, rounded: nvcc would join it with a sum that follows into one operation that doesn't round it. Where equal
// values must cancel, that leaves the product's rounding error, which a gain of one over a small deviation makes large.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

__device__ inline unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline unsigned all_threads() { return gridDim.x * blockDim.x; }
// Of a grid by pixel_blocks.
__device__ inline unsigned first_pixel() { return blockIdx.x * blockDim.y + threadIdx.y; }
__device__ inline unsigned all_pixels() { return gridDim.x * blockDim.y; }

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, typename T>
__device__ Pack<T, V> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, typename T>
__device__ void store_pack(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Calls body.template operator()<V>() with as many elements as 16 bytes hold, or one where channels or addresses do not
// divide. Tensors may be null.
template <typename T, typename Tensors = std::initializer_list<const Tensor*>, typename F>
void with_pack(int64_t channels, const Tensors& tensors, F&& body) {
  constexpr int wide = 16 / sizeof(T);
  bool fits = channels % wide == 0;
  for (const Tensor* t : tensors) fits = fits && (!t || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0);
  if (fits)
    body.template operator()<wide>();
  else
    body.template operator()<1>();
}

template <typename F>
void dispatch_cuda(ScalarType dtype, F&& body) {
  if (dtype == ScalarType::Half) return body.template operator()<__half>();
  dispatch_float("partial_conv2d", dtype, body);
}

}  // namespace fused_inpaint
