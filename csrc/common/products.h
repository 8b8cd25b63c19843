// SPDX-License-Identifier: Apache-2.0
// The vendor's products of matrices on a CPU, each on one thread, so that what they give does not depend on how many
// there are.
#pragma once

#include <array>
#include <atomic>
#include <type_traits>

#include "common/dispatch.h"

namespace fused_inpaint::cpu {
namespace {

using torch::stable::parallel_for;

// Runs worker(take) on each thread, where take() gives the items 0, 1, ... once each, and a negative number at the end.
// What an item gives must not depend on where it runs.
template <typename F>
void share(int64_t items, F&& worker) {
  std::atomic<int64_t> next{0};
  parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    worker([&]() -> int64_t {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      return i < items ? i : -1;
    });
  });
}

// A matrix in memory that outlives it.
template <typename T>
Tensor matrix(T* at, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, const Tensor& like) {
  const Ints size{rows, columns}, stride{row_stride, column_stride};
  return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(at), size, stride, like.device(),
                                  like.scalar_type());
}

// The vendor's product, on the calling thread alone if that is one of parallel_for's.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace fused_inpaint::cpu
