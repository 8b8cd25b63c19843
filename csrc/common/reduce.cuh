// SPDX-License-Identifier: Apache-2.0
// Reductions over the pixels of channels_last maps on a GPU, for each channel: by chunks of pixels fixed by the shape,
// each in one block, merged in their order.
#pragma once

#include "common/cuda_types.cuh"
#include "common/launch.cuh"

namespace fused_inpaint::cuda {
namespace {

// A chunk's pixels are all of one group.
struct Chunks {
  unsigned pixels, size, per_group, n;
  Chunks(int64_t group_pixels, int64_t groups, int64_t size_)
      : pixels(index32(group_pixels)),
        size(index32(size_)),
        per_group(index32(ceil_div(pixels, size_))),
        n(index32(per_group * groups)) {}
  __device__ unsigned group(unsigned chunk) const { return chunk / per_group; }
  __device__ unsigned begin(unsigned chunk) const { return group(chunk) * pixels + chunk % per_group * size; }
  __device__ unsigned end(unsigned chunk) const {
    const unsigned all = (group(chunk) + 1) * pixels, end = begin(chunk) + size;
    return end < all ? end : all;
  }
};

// For a pass that a block's threads make over neighbouring pixels: few of them while there are too few blocks to fill a
// GPU, then more, 16 for each thread.
Chunks pass_chunks(int64_t group_pixels, int64_t groups, dim3 threads) {
  const int64_t rows = threads.y;
  return Chunks(group_pixels, groups, rows * std::clamp<int64_t>(group_pixels * groups / (rows * 2048), 1, 16));
}

// For a reduction.
Chunks tile_chunks(int64_t group_pixels, int64_t groups) {
  return Chunks(group_pixels, groups, std::max<int64_t>(64, ceil_div(group_pixels * groups, 512)));
}

// One block reduces one chunk of pixels for a tile of channels: thread (x, y) takes pack x of every pixel y of kRows.
template <int V>
struct Tile {
  static constexpr int kPacks = V == 1 ? 32 : 8, kRows = kThreads / kPacks, kChannels = kPacks * V;
};

template <int V>
unsigned tiles(int64_t channels) {
  return static_cast<unsigned>(ceil_div(channels, Tile<V>::kChannels));
}
template <int V>
dim3 tile_threads() {
  return dim3(Tile<V>::kPacks, Tile<V>::kRows);
}

// Joins what the rows of a block have, by a tree: join(value, of_other_row). Row 0 has the result. `scratch` has room
// for half the block's.
template <int V, typename Value, typename F>
__device__ void join_rows(Value& value, Value* scratch, F join) {
  const unsigned x = threadIdx.x, y = threadIdx.y;
  for (unsigned rows = Tile<V>::kRows / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (y >= rows && y < 2 * rows) scratch[(y - rows) * Tile<V>::kPacks + x] = value;
    __syncthreads();
    if (y < rows) join(value, scratch[y * Tile<V>::kPacks + x]);
  }
}

// Moments of V channels: n values around base + mean, and their squared deviations from that. All stays
// small where values are large but near each other.
template <typename A, int V>
struct Moments {
  Pack<A, V> n, base, mean, m2;
};

// While values come in, mean is their sum and m2 that of their squares, from the first as base.
template <typename A, int V>
__device__ void add(Moments<A, V>& m, int i, A x) {
  if (m.n.v[i] == 0) m.base.v[i] = x;
  const A d = x - m.base.v[i];
  m.n.v[i] += 1;
  m.mean.v[i] += d;
  m.m2.v[i] += d * d;
}

template <typename A, int V>
__device__ void finish(Moments<A, V>& m) {
  for (int i = 0; i < V; ++i) {
    const A sum = m.mean.v[i];
    if (m.n.v[i] == 0) continue;
    m.mean.v[i] = sum / m.n.v[i];
    const A m2 = m.m2.v[i] - sum * m.mean.v[i];
    m.m2.v[i] = m2 < 0 ? A(0) : m2;
  }
}

// Chan's rule.
template <typename A, int V>
__device__ void join(Moments<A, V>& m, const Moments<A, V>& other) {
  for (int i = 0; i < V; ++i) {
    const A n = other.n.v[i], both = m.n.v[i] + n;
    if (n == 0) continue;
    if (m.n.v[i] == 0) m.base.v[i] = other.base.v[i];
    const A apart = (other.base.v[i] - m.base.v[i]) + (other.mean.v[i] - m.mean.v[i]);
    const A share = n / both;
    m.m2.v[i] += other.m2.v[i] + apart * apart * m.n.v[i] * share;
    m.mean.v[i] += apart * share;
    m.n.v[i] = both;
  }
}

// A block merges the chunks of 32 of all columns (a group's channels): each of its rows a range of chunks in their
// order, then the rows in theirs.
constexpr unsigned kMergeColumns = 32, kMergeRows = 16;

dim3 merge_blocks(int64_t columns) { return dim3(index32(ceil_div(columns, kMergeColumns))); }
dim3 merge_threads() { return dim3(kMergeColumns, kMergeRows); }

// Sum of value(chunk) over the chunks of a group; every thread gets its column's. `rows` is shared.
template <typename F>
__device__ double merged(unsigned chunks, bool active, double* rows, F value) {
  const unsigned share = (chunks + kMergeRows - 1) / kMergeRows, begin = threadIdx.y * share;
  double sum = 0;
  if (active)
    for (unsigned b = begin; b < begin + share && b < chunks; ++b) sum += value(b);
  __syncthreads();
  rows[threadIdx.y * kMergeColumns + threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned r = 0; r < kMergeRows; ++r) sum += rows[r * kMergeColumns + threadIdx.x];
  return sum;
}

// Moments of a column's chunks; part(chunk, which) of n, base, mean and m2.
struct MergedMoments {
  double n, mean, m2;
};
template <typename F>
__device__ MergedMoments merged_moments(unsigned chunks, bool active, double* rows, F part) {
  const double n = merged(chunks, active, rows, [&](unsigned b) { return part(b, 0); });
  // From the first chunk's base, so that the mean of equal values is their value.
  const double first = active ? part(0, 1) : 0;
  const double sum =
      merged(chunks, active, rows, [&](unsigned b) { return part(b, 0) * (part(b, 1) - first + part(b, 2)); });
  const double mean = n > 0 ? first + sum / n : 0;
  const double m2 = merged(chunks, active, rows, [&](unsigned b) {
    const double apart = part(b, 1) + part(b, 2) - mean;
    return part(b, 0) > 0 ? part(b, 3) + part(b, 0) * apart * apart : 0;
  });
  return {n, mean, m2};
}

}  // namespace
}  // namespace fused_inpaint::cuda
