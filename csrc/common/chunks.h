// SPDX-License-Identifier: Apache-2.0
// How passes over channels_last maps are cut on a CPU: into chunks of pixels fixed by the shape, so that what is summed
// chunk by chunk and merged in their order does not depend on the number of threads.
#pragma once

#include <algorithm>

#include "common/dispatch.h"

namespace fused_inpaint::cpu {
namespace {

// Values that are worth a thread: those of a chunk, which stay in the second-level cache.
constexpr int64_t kGrain = 32768;

// All pixels of a chunk are of one group.
struct Chunks {
  int64_t pixels, size, per_group, n, grain;
  Chunks(int64_t group_pixels, int64_t groups, int64_t channels)
      : pixels(group_pixels),
        size(std::clamp<int64_t>(kGrain / channels, 32, 4096)),
        per_group(ceil_div(pixels, size)),
        n(per_group * groups),
        grain(std::max<int64_t>(1, kGrain / (channels * std::min(size, pixels)))) {}
  int64_t group(int64_t chunk) const { return chunk / per_group; }
  int64_t begin(int64_t chunk) const { return group(chunk) * pixels + chunk % per_group * size; }
  int64_t end(int64_t chunk) const { return std::min(begin(chunk) + size, (group(chunk) + 1) * pixels); }
};

// Asks for what lies 8 KB behind n elements about to be read: the processor's own guesses stop at the page, or lose
// their way where several pixels are read at once.
template <typename T>
FUSED_INPAINT_INLINE void fetch_ahead(const T* p, int64_t n) {
#ifdef __GNUC__
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + 8192;
  for (uintptr_t byte = 0; byte < n * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at + byte), 0, 2);
#endif
}

// Pixels that are summed in the accumulator's type before the sum goes to one in double.
constexpr int kTogether = 4;

// (chunks, n) to n
FUSED_INPAINT_CLONES void merge_sums(const double* __restrict partial, int64_t chunks, int64_t n,
                                     double* __restrict sums) {
  std::fill(sums, sums + n, 0.0);
  for (int64_t b = 0; b < chunks; ++b)
    for (int64_t i = 0; i < n; ++i) sums[i] += partial[b * n + i];
}

}  // namespace
}  // namespace fused_inpaint::cpu
