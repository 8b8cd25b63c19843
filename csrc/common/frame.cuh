// SPDX-License-Identifier: Apache-2.0
// A padded copy of feature maps on a GPU, and the way back from its gradient.
#pragma once

#include "common/cuda_types.cuh"
#include "common/padding.h"

namespace fused_inpaint::cuda {
namespace {

// Maps (n, h, w), upsampled by nearest neighbour and then padded by `rows` and `columns` on each side, not by zeros.
struct Frame {
  unsigned n, h, w, up, rows, columns, padded_h, padded_w;
  Padding mode;

  Frame(const Tensor& x, int64_t up_, int64_t rows_, int64_t columns_, Padding mode_)
      : n(index32(x.size(0))),
        h(index32(x.size(2))),
        w(index32(x.size(3))),
        up(index32(up_)),
        rows(index32(rows_)),
        columns(index32(columns_)),
        padded_h(h * up + 2 * rows),
        padded_w(w * up + 2 * columns),
        mode(mode_) {}
  __device__ Frame padded_by(unsigned pad) const {
    Frame frame = *this;
    frame.rows = frame.columns = pad;
    frame.padded_h = h * up + 2 * pad;
    frame.padded_w = w * up + 2 * pad;
    return frame;
  }
  bool plain() const { return up == 1 && rows == 0 && columns == 0; }
  // The pixel of the maps that a pixel of the padded batch copies.
  __device__ unsigned source(unsigned pixel) const {
    const unsigned row = pixel / padded_w, j = along(pixel % padded_w, w, columns);
    return (row / padded_h * h + along(row % padded_h, h, rows)) * w + j;
  }
  // Calls visit(padded pixel) for the copies of a pixel of the maps, in a fixed order.
  template <typename F>
  __device__ void copies(unsigned pixel, F&& visit) const {
    const unsigned row = pixel / w, first = row / h * padded_h;
    each(row % h, h, rows,
         [&](unsigned i) { each(pixel % w, w, columns, [&](unsigned j) { visit((first + i) * padded_w + j); }); });
  }

 private:
  __device__ unsigned along(unsigned i, unsigned size, unsigned pad) const {
    const int64_t at = padded(static_cast<int64_t>(i) - pad, size * up, mode);
    return static_cast<unsigned>(at) / up;
  }
  template <typename F>
  __device__ void each(unsigned i, unsigned size, unsigned pad, F&& visit) const {
    const unsigned last = size * up - 1;
    for (unsigned u = i * up; u < (i + 1) * up; ++u) {
      visit(pad + u);
      if (mode == Padding::reflect) {
        if (u > 0 && u <= pad) visit(pad - u);
        if (u < last && last - u <= pad) visit(pad + 2 * last - u);
      } else {
        if (u == 0)
          for (unsigned p = 0; p < pad; ++p) visit(p);
        if (u == last)
          for (unsigned p = 0; p < pad; ++p) visit(pad + last + 1 + p);
      }
    }
  }
};

}  // namespace
}  // namespace fused_inpaint::cuda
