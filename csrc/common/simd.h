// SPDX-License-Identifier: Apache-2.0
// Element types, and one source for several instruction sets.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

// A plain -O3 build stops at SSE2. Functions marked so are compiled once more for AVX2, and the loader picks. FMA is
// left out: without it both clones give the same bits. Only ELF systems with a compiler that knows function
// multiversioning have the mechanism.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(FUSED_INPAINT_NO_CLONES)
#define FUSED_INPAINT_CLONES __attribute__((target_clones("default", "avx2")))
#else
#define FUSED_INPAINT_CLONES
#endif
#if defined(__CUDACC__) || defined(FUSED_INPAINT_EMULATE)
#define FUSED_INPAINT_INLINE __host__ __device__ inline
#elif defined(__GNUC__)
#define FUSED_INPAINT_INLINE inline __attribute__((always_inline))
#else
#define FUSED_INPAINT_INLINE inline
#endif

namespace fused_inpaint {

struct bf16 {
  uint16_t bits;
};

// Arithmetic runs in float for float and bfloat16, in double for double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulator<T>::type;

FUSED_INPAINT_INLINE float load(float v) { return v; }
FUSED_INPAINT_INLINE double load(double v) { return v; }
FUSED_INPAINT_INLINE uint8_t load(uint8_t v) { return v; }
FUSED_INPAINT_INLINE float load(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

FUSED_INPAINT_INLINE void store(float* p, float v) { *p = v; }
FUSED_INPAINT_INLINE void store(double* p, double v) { *p = v; }
FUSED_INPAINT_INLINE void store(bf16* p, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  // Round to nearest even; a NaN keeps a payload bit so that rounding can't turn it into an infinity.
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  p->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

}  // namespace fused_inpaint
