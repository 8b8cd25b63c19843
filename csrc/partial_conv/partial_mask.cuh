// SPDX-License-Identifier: Apache-2.0
// Masks in device code, in whatever type they come: read and written as bits.
#pragma once

#include "partial_conv/partial_conv.h"

namespace fused_inpaint::cuda {
namespace {

// False for 0 and -0.
__device__ inline bool holds_value(uint8_t bits) { return bits != 0; }
__device__ inline bool holds_value(uint16_t bits) { return (bits & 0x7fffu) != 0; }
__device__ inline bool holds_value(uint32_t bits) { return (bits & 0x7fffffffu) != 0; }
__device__ inline bool holds_value(uint64_t bits) { return bits << 1 != 0; }

// Calls body.template operator()<U>() for the unsigned type of so many bytes.
template <typename F>
__device__ auto with_bits(int bytes, F&& body) {
  switch (bytes) {
    case 1:
      return body.template operator()<uint8_t>();
    case 2:
      return body.template operator()<uint16_t>();
    case 4:
      return body.template operator()<uint32_t>();
    default:
      return body.template operator()<uint64_t>();
  }
}

__device__ inline bool holds_value(const void* mask, int bytes, unsigned i) {
  return with_bits(bytes, [&]<typename U>() { return holds_value(static_cast<const U*>(mask)[i]); });
}

__device__ inline void write_bits(void* mask, int bytes, unsigned i, uint64_t bits) {
  with_bits(bytes, [&]<typename U>() { static_cast<U*>(mask)[i] = static_cast<U>(bits); });
}

}  // namespace
}  // namespace fused_inpaint::cuda
