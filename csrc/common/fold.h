// SPDX-License-Identifier: Apache-2.0
// A nearest x2 upsample folded into the convolution that follows it.
#pragma once

#include "common/aten.h"
#include "common/simd.h"

namespace fused_inpaint {

// A nearest x2 upsample followed by an odd k x k convolution with padding k/2 is one convolution at the low resolution
// with (k+1)/2 taps a side and four times the output channels, one set for each phase (row parity, column parity):
// phase a of output row 2i + a is row i + a * shift of that convolution, padded by `padding`.
struct Fold {
  int64_t kernel, taps, padding, shift;
  FUSED_INPAINT_INLINE explicit Fold(int64_t k)
      : kernel(k), taps((k + 1) / 2), padding((k / 2 + 1) / 2), shift((k / 2) % 2) {}
  // Tap of the folded kernel that holds tap u of the kernel, for phase a.
  FUSED_INPAINT_INLINE int64_t tap(int64_t a, int64_t u) const {
    const int64_t offset = a - kernel / 2 + u;                           // of the upsampled row, from 2i
    const int64_t low = offset >= 0 ? offset / 2 : -((1 - offset) / 2);  // floor
    return low + padding - a * shift;
  }
};

// Defined with the operands of partial convolution (csrc/partial_conv/partial_operands_*).
namespace FUSED_INPAINT_DEVICE {

// (O, C, k, k) -> (4 O, channels, taps, taps), phase-major, of the channels from `first` on.
Tensor fold_weight(const Tensor& weight, int64_t first, int64_t channels);
// Its adjoint, into channels [first, first + C) of the channels_last gradient of the whole weight. On a GPU the phases
// may have more outputs than the weight; the gradients of those are left out.
void unfold_gradient(const Tensor& grad_folded, int64_t first, Tensor& grad_weight);

}  // namespace FUSED_INPAINT_DEVICE

}  // namespace fused_inpaint
