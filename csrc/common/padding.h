// SPDX-License-Identifier: Apache-2.0
// Padding as index arithmetic.
#pragma once

#include <string>

#include "common/aten.h"
#include "common/simd.h"

namespace fused_inpaint {

enum class Padding { zeros, reflect, replicate };

inline Padding parse_padding(const char* op, const std::string& name) {
  STD_TORCH_CHECK(name == "zeros" || name == "reflect" || name == "replicate", op,
                  ": padding_mode must be zeros, reflect or replicate, got ", name);
  return name == "zeros" ? Padding::zeros : name == "reflect" ? Padding::reflect : Padding::replicate;
}

// The coordinate of a map that is read at i, which is at most size - 1 outside it with reflect; -1 in zero padding.
FUSED_INPAINT_INLINE int64_t padded(int64_t i, int64_t size, Padding mode) {
  if (i >= 0 && i < size) return i;
  if (mode == Padding::zeros) return -1;
  if (mode == Padding::replicate) return i < 0 ? 0 : size - 1;
  return i < 0 ? -i : 2 * (size - 1) - i;
}

}  // namespace fused_inpaint
