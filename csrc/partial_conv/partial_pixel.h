// SPDX-License-Identifier: Apache-2.0
// What happens at one pixel, alike on the CPU and the GPU.
#pragma once

#include "partial_conv/partial_conv.h"

namespace fused_inpaint {

template <Activation kind, typename A>
FUSED_INPAINT_INLINE A activate(A v, A slope) {
  if constexpr (kind == Activation::relu) return v < 0 ? A(0) : v;
  // Both sides are computed, then one is chosen: a select is what the compiler can turn into vectors.
  const A scaled = v * slope;
  if constexpr (kind == Activation::leaky_relu) return v < 0 ? scaled : v;
  return v;
}

// The gradient g behind the activation, in front of it: selected, as torch does; `v` is the activation's input or
// output (their signs agree).
template <Activation kind, typename A>
FUSED_INPAINT_INLINE A through(A g, A v, A slope) {
  if constexpr (kind == Activation::relu) return v <= 0 ? A(0) : g;
  const A scaled = g * slope;
  if constexpr (kind == Activation::leaky_relu) return v > 0 ? g : scaled;
  return g;
}

// The low-resolution convolution of the folded upsample: (n, h/2 + shift, w/2 + shift, 4, c) in memory.
struct Phases {
  int64_t h, w, c, shift;
  // First element of the pair of phases that output row `row` of all (n * out_h) reads.
  FUSED_INPAINT_INLINE int64_t row(int64_t row, int64_t out_h) const {
    const int64_t n = row / out_h, y = row % out_h, a = y % 2;
    return ((n * h + y / 2 + a * shift) * w * 4 + a * 2) * c;
  }
  // From there, the channels of column x.
  FUSED_INPAINT_INLINE int64_t column(int64_t x) const {
    const int64_t b = x % 2;
    return ((x / 2 + b * shift) * 4 + b) * c;
  }
};

inline Phases phases_of(const Output& out, int64_t shift) {
  return {out.h / 2 + shift, out.w / 2 + shift, out.c, shift};
}

template <typename F>
void with_activation(Activation kind, F&& body) {
  switch (kind) {
    case Activation::none:
      return body.template operator()<Activation::none>();
    case Activation::relu:
      return body.template operator()<Activation::relu>();
    case Activation::leaky_relu:
      return body.template operator()<Activation::leaky_relu>();
  }
}

}  // namespace fused_inpaint
