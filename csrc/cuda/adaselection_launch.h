// Which kernels serve an adaselection_ call, on which grid, with how much memory. No torch: the
// caller allocates what the plan asks for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/adaselection.cuh"
#include "cuda/topk_launch.h"

namespace fastsel::cuda {

struct AdaSelectionPlan {
  enum class Kernel { small, block, grid };
  Kernel kernel;
  unsigned grid = 1;
  size_t shared_bytes = 0;
  // Of Kernel::grid. The workspace holds, in this order, parts, adaboost's row, ranks.
  unsigned chunk = 0;
  int64_t padded = 0;           // [B], filled up to whole rounds
  int64_t workspace_words = 0;  // of 8 bytes
};

// What the one block has of shared memory besides the plan's.
inline constexpr size_t adaselection_static_bytes(bool small) {
  return small ? sizeof(AdaSelectionShared<kAdaSelectionSmallThreads>) +
                     sizeof(TopkStorage<kTopkSmallDigitBits>)
               : sizeof(AdaSelectionShared<kAdaSelectionThreads>) +
                     sizeof(TopkStorage<kTopkDigitBits>);
}

// The grid, by kernel:
//   small, block  one block, where the batch is not too large and its rows fit into shared memory
//   grid          a block for every round of samples, at most one a multiprocessor, which
//                 __launch_bounds__(, 1) makes resident
inline AdaSelectionPlan choose_adaselection_plan(int64_t batch, bool with_ranks, bool with_adaboost,
                                                 const TopkDevice& device) {
  AdaSelectionPlan plan{};
  if (batch <= kAdaSelectionBlockBatch) {
    const bool small = batch <= kAdaSelectionSmallBatch;
    plan.kernel = small ? AdaSelectionPlan::Kernel::small : AdaSelectionPlan::Kernel::block;
    plan.shared_bytes = AdaSelectionLayout(static_cast<unsigned>(batch),
                                           small ? kAdaSelectionSmallThreads : kAdaSelectionThreads,
                                           with_ranks, with_adaboost)
                            .size;
    if (plan.shared_bytes + adaselection_static_bytes(small) <=
        static_cast<size_t>(device.shared_bytes))
      return plan;
  }
  plan.kernel = AdaSelectionPlan::Kernel::grid;
  plan.shared_bytes = 0;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t rounds = ceil_div(batch, kAdaSelectionRound);
  plan.chunk = static_cast<unsigned>(ceil_div(rounds, device.multiprocessors) * kAdaSelectionRound);
  plan.grid = static_cast<unsigned>(ceil_div(batch, plan.chunk));
  plan.padded = rounds * kAdaSelectionRound;
  plan.workspace_words = int64_t{plan.grid} * kAdaSelectionParts +
                         (with_adaboost ? plan.padded : 0) + (with_ranks ? plan.padded / 2 : 0);
  return plan;
}

// Gives the rows their places: losses [padded], and a workspace as large as the plan says.
inline AdaSelectionGrid adaselection_grid(const AdaSelectionPlan& plan, bool with_ranks,
                                          bool with_adaboost, float* losses, double* workspace,
                                          const int64_t* order) {
  AdaSelectionGrid grid{plan.chunk, {losses, nullptr, nullptr}, workspace, order};
  double* next = workspace + int64_t{plan.grid} * kAdaSelectionParts;
  if (with_adaboost) grid.rows.adaboost = next;
  if (with_ranks)
    grid.rows.ranks = reinterpret_cast<unsigned*>(with_adaboost ? next + plan.padded : next);
  return grid;
}

// The kernels of one block: the whole decision.
template <class T>
void launch_adaselection_block(const AdaSelectionArguments<T>& a, const AdaSelectionPlan& plan,
                               bool with_ranks, bool with_adaboost, void* stream) {
  const auto start = [&](auto kernel, int threads) {
    launch(kernel, LaunchConfig{dim3(1), dim3(threads), plan.shared_bytes, stream}, a, with_ranks,
           with_adaboost);
  };
  constexpr int kSmallItems = kAdaSelectionSmallBatch / kAdaSelectionSmallThreads;
  constexpr int kItems = kAdaSelectionBlockBatch / kAdaSelectionThreads;
  if (plan.kernel == AdaSelectionPlan::Kernel::small)
    start(adaselection_block_kernel<T, kAdaSelectionSmallThreads, kSmallItems, kTopkSmallDigitBits>,
          kAdaSelectionSmallThreads);
  else
    start(adaselection_block_kernel<T, kAdaSelectionThreads, kItems, kTopkDigitBits>,
          kAdaSelectionThreads);
}

// The scores and the state; grid.rows.losses are then what topk chooses by.
template <class T>
void launch_adaselection_grid(const AdaSelectionArguments<T>& a, const AdaSelectionPlan& plan,
                              const AdaSelectionGrid& grid, void* stream) {
  launch_cooperative(adaselection_grid_kernel<T>,
                     LaunchConfig{dim3(plan.grid), dim3(kAdaSelectionThreads), 0, stream}, a, grid);
}

// keys [B]: a thread a sample.
template <class T>
void launch_adaselection_sort_keys(const AdaSelectionArguments<T>& a, int* keys, void* stream) {
  const auto blocks =
      static_cast<unsigned>((a.batch + kAdaSelectionThreads - 1) / kAdaSelectionThreads);
  launch(adaselection_sort_keys_kernel<T>,
         LaunchConfig{dim3(blocks), dim3(kAdaSelectionThreads), 0, stream}, a, keys);
}

}  // namespace fastsel::cuda
