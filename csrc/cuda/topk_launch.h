// Which kernel serves a topk call, on which grid, with how much memory. No torch: the caller
// allocates what the plan asks for.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/topk.cuh"

namespace fastsel::cuda {

struct TopkDevice {
  int multiprocessors;
  int shared_bytes;  // the most a block can have
};

struct TopkPlan {
  enum class Kernel { small, registers, shared, grid };
  Kernel kernel;
  unsigned grid;
  unsigned sort_size = 0;
  size_t shared_bytes;
  TopkGridShape shape{};        // of Kernel::grid
  int64_t workspace_words = 0;  // of 4 bytes
  int64_t entries = 0;          // of 8 bytes
};

template <class Integer>
Integer round_up(Integer value, Integer multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The grid, by kernel:
//   small, registers  a block a row up to as many blocks as can be resident, which then take one
//                     row after another
//   shared            the same with one block a multiprocessor; for rows that fit, if there are
//                     enough of them to keep the multiprocessors busy, or if a row is too short to
//                     be worth grid barriers
//   grid              the multiprocessors shared out evenly among the rows. __launch_bounds__(1024,
//                     1) makes one block of any shared memory size resident on each, which is what
//                     a cooperative launch asks for
template <class Row>
TopkPlan choose_topk_plan(int64_t rows, unsigned columns, unsigned k, bool sort,
                          const TopkDevice& device) {
  using Key = typename Row::Key;
  TopkPlan plan{};
  plan.sort_size = sort && k > 1 ? std::bit_ceil(k) : 0;  // one result is sorted as it is
  const size_t sort_bytes = plan.sort_size * sizeof(unsigned long long);
  const auto blocks = [&](int resident) {
    return static_cast<unsigned>(
        std::min<int64_t>(rows, int64_t{device.multiprocessors} * resident));
  };

  if (columns <= kTopkSmallThreads * kTopkRegisterKeys) {
    plan.kernel = TopkPlan::Kernel::small;
    plan.grid = blocks(kTopkSmallResident);
    plan.shared_bytes = sort_bytes;
    return plan;
  }
  if (columns <= kTopkRegisterThreads * kTopkRegisterKeys) {
    plan.kernel = TopkPlan::Kernel::registers;
    plan.grid = blocks(kTopkRegisterResident);
    plan.shared_bytes = sort_bytes;
    return plan;
  }

  const size_t room = device.shared_bytes - sizeof(TopkStorage<kTopkDigitBits>);
  const size_t key_bytes = round_up<size_t>(columns, kTopkSharedThreads * Row::V) * sizeof(Key);
  if (key_bytes + sort_bytes <= room &&
      (2 * rows > device.multiprocessors || columns <= kTopkOneBlockColumns)) {
    plan.kernel = TopkPlan::Kernel::shared;
    plan.grid = blocks(1);
    plan.shared_bytes = key_bytes + sort_bytes;
    return plan;
  }

  plan.kernel = TopkPlan::Kernel::grid;
  const auto capacity = static_cast<int64_t>(device.multiprocessors);
  const int64_t useful = (int64_t{columns} + kTopkMinChunk - 1) / kTopkMinChunk;
  const int64_t share = std::clamp<int64_t>(capacity / rows, 1, useful);
  TopkGridShape& shape = plan.shape;
  const auto chunk = round_up<int64_t>((columns + share - 1) / share, kTopkGridThreads * Row::V);
  shape.chunk = static_cast<unsigned>(chunk);
  shape.blocks_per_row = static_cast<unsigned>((columns + chunk - 1) / chunk);
  shape.chunk_in_shared = shape.chunk * sizeof(Key) <= room;
  shape.listed =
      static_cast<unsigned>(room / (kTopkGridThreads / kWarpSize) / sizeof(KeyAndColumn));
  plan.grid =
      static_cast<unsigned>(shape.blocks_per_row * std::min(rows, capacity / shape.blocks_per_row));
  plan.shared_bytes = std::max<size_t>(
      sort_bytes, shape.chunk_in_shared
                      ? shape.chunk * sizeof(Key)
                      : shape.listed * sizeof(KeyAndColumn) * (kTopkGridThreads / kWarpSize));
  const bool many = shape.blocks_per_row > 1;
  if (many) plan.workspace_words = rows * topk_workspace_words(shape.blocks_per_row);
  if (plan.sort_size) plan.entries = (many ? rows : int64_t{plan.grid}) * k;
  return plan;
}

// `workspace` and `entries` are as large as the plan says; nothing has to be in them.
template <class Arguments>
void launch_topk(Arguments a, TopkPlan plan, unsigned* workspace, unsigned long long* entries,
                 void* stream) {
  a.sort_size = plan.sort_size;
  const auto config = [&](int threads) {
    return LaunchConfig{dim3(plan.grid), dim3(threads), plan.shared_bytes, stream};
  };
  switch (plan.kernel) {
    case TopkPlan::Kernel::small:
      return launch(topk_small_kernel<Arguments>, config(kTopkSmallThreads), a);
    case TopkPlan::Kernel::registers:
      return launch(topk_register_kernel<Arguments>, config(kTopkRegisterThreads), a);
    case TopkPlan::Kernel::shared:
      return launch(topk_shared_kernel<Arguments>, config(kTopkSharedThreads), a);
    case TopkPlan::Kernel::grid:
      plan.shape.workspace = workspace;
      plan.shape.entries = entries;
      if (plan.shape.blocks_per_row == 1)
        return launch(topk_grid_kernel<Arguments>, config(kTopkGridThreads), a, plan.shape);
      return launch_cooperative(topk_grid_kernel<Arguments>, config(kTopkGridThreads), a,
                                plan.shape);
  }
}

}  // namespace fastsel::cuda
