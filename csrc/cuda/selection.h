// What the launchers of selections share.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "cuda/device.cuh"
#include "cuda/tuning.h"
#include "torch_api.h"

namespace fastsel {

// Positions inside a row are 32 bits wide, and must not wrap when rounded up to a whole chunk.
inline constexpr int64_t kMostColumns = 4'000'000'000;

inline Tensor gather_last(const Tensor& source, const Tensor& index) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(source), torch::stable::detail::from(int64_t{-1}),
      torch::stable::detail::from(index), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::gather", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? mutable_data<T>(*tensor) : nullptr;
}

// Blocks for so many warps' work, each of which takes several pieces where there are many.
inline cuda::LaunchConfig warps_config(int64_t warps, void* stream) {
  constexpr int64_t kWarpsPerBlock = cuda::kWeightedThreads / cuda::kWarpSize;
  const int64_t most =
      int64_t{cuda::multiprocessor_count()} * cuda::kWeightedBlocksPerMultiprocessor;
  const int64_t blocks =
      std::clamp<int64_t>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock, 1, most);
  return {dim3(static_cast<unsigned>(blocks)), dim3(cuda::kWeightedThreads), 0, stream};
}

}  // namespace fastsel
