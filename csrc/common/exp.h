// SPDX-License-Identifier: Apache-2.0
// The exponential; in float on a CPU as arithmetic that compiles into vectors.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace fused_inpaint {

#if defined(__CUDACC__) || defined(FUSED_INPAINT_EMULATE)

FUSED_INPAINT_INLINE float exponential(float x) { return std::exp(x); }

#else

// exp(x) = power * (1 + rest), to a unit in the last place where |x| is at most 87; a NaN makes rest one.
struct Exponential {
  float power, rest;

  FUSED_INPAINT_INLINE explicit Exponential(float x) {
    // x = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer, which then is in the low bits.
    const float rounded = x * 1.44269504f + 12582912.0f, n = rounded - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * (1.0f / 5040) + 1.0f / 720;
    p = ((p * r + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6;
    rest = (p * r + 0.5f) * r * r + r;
    power = std::bit_cast<float>((std::bit_cast<uint32_t>(rounded) + 127u) << 23);
  }
};

// |x| at most 87
FUSED_INPAINT_INLINE float exponential(float x) {
  const Exponential e(x);
  return e.power * e.rest + e.power;
}

// exp(x) - 1 for x <= 0
FUSED_INPAINT_INLINE float exp_minus_one(float x) {
  const Exponential e(x < -30.0f ? -30.0f : x);  // -1 in float
  return e.power * e.rest + (e.power - 1.0f);
}
FUSED_INPAINT_INLINE double exp_minus_one(double x) { return std::expm1(x); }

#endif

FUSED_INPAINT_INLINE double exponential(double x) { return std::exp(x); }

}  // namespace fused_inpaint
