// What adaselection_ needs besides its own arithmetic: totals over a block and a grid, and the ranks
// of a block's losses.
#pragma once

#include <cmath>

#include "core/adaselection.h"
#include "cuda/topk_block.cuh"
#include "cuda/tuning.h"

namespace fastsel::cuda {

// ---- totals ----

// CUDA's max takes four times the instructions, to be right for NaN.
__device__ __forceinline__ double larger(double a, double b) { return a < b ? b : a; }

__device__ __forceinline__ double sum_or_max(bool sum, double a, double b) {
  return sum ? a + b : larger(a, b);
}

// Combines what the lanes l, l + kLanes, l + 2 kLanes, ... hold, for value l % V: sums for the first
// kSums values, maxima for the others. All of these lanes get the result.
template <int kSums, int V, int kLanes>
__device__ __forceinline__ double combine_lanes(double total) {
  const bool sum = kSums == V || static_cast<int>(lane_index() % V) < kSums;
  FASTSEL_UNROLL
  for (unsigned offset = kLanes; offset < kWarpSize; offset *= 2)
    total = sum_or_max(sum, total, __shfl_xor_sync(kFullMask, total, offset));
  return total;
}

// Combines V values a lane, V a power of two, to one, of value l % V, in lanes l < kLanes. In each
// round a lane hands half of its values to a neighbour and takes the other half from it: V - 1
// shuffles, where a sum of each for itself would take V log2(V). With kLanes > V the rest of the way
// is left to totals_of_parts.
template <int kSums, int kLanes, int V>
__device__ __forceinline__ double combine_values(double (&values)[V]) {
  static_assert((V & (V - 1)) == 0 && V <= kLanes && kLanes <= kWarpSize);
  const unsigned lane = lane_index();
  FASTSEL_UNROLL
  for (unsigned half = V / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
    FASTSEL_UNROLL
    for (unsigned i = 0; i < half; ++i) {
      const bool sum = static_cast<int>((lane & (V - half)) | i) < kSums;  // of what the lane keeps
      const double kept = upper ? values[i + half] : values[i];
      const double sent = upper ? values[i] : values[i + half];
      values[i] = sum_or_max(sum || kSums == V, kept, __shfl_xor_sync(kFullMask, sent, half));
    }
  }
  return combine_lanes<kSums, V, kLanes>(values[0]);
}

// The totals of parts [count, V], by one warp; lane l returns that of value l % V.
template <int kSums, int V>
__device__ __forceinline__ double totals_of_parts(const double* parts, unsigned count) {
  const unsigned lane = lane_index();
  const bool sum = kSums == V || static_cast<int>(lane % V) < kSums;
  double total = sum ? 0.0 : -INFINITY;
  FASTSEL_UNROLL_BY(1)
  for (unsigned i = lane; i < count * V; i += kWarpSize) total = sum_or_max(sum, total, parts[i]);
  return combine_lanes<kSums, V, V>(total);
}

// Totals over a block, and over a grid where kGrid, for each of `groups` groups of V values, which
// the block's threads have stored as parts [groups, count, V]. Calls use(group, total) in all lanes
// of a warp, total being that of value lane % V; what it writes to shared memory the whole block
// sees afterwards. grid_parts [groups, blocks, V] must not have been used since the last grid
// barrier. All additions have a fixed order.
template <int kSums, int V, bool kGrid, class Use>
__device__ __forceinline__ void block_totals(unsigned groups, const double* parts, unsigned count,
                                             double* grid_parts, Use&& use) {
  const unsigned lane = lane_index(), warps = blockDim.x / kWarpSize;
  __syncthreads();
  if constexpr (kGrid) {
    FASTSEL_UNROLL_BY(1)
    for (unsigned group = warp_index(); group < groups; group += warps) {
      const double total = totals_of_parts<kSums, V>(parts + group * count * V, count);
      if (lane < V) grid_parts[(group * gridDim.x + blockIdx.x) * V + lane] = total;
    }
    grid_sync();
    parts = grid_parts;
    count = gridDim.x;
  }
  FASTSEL_UNROLL_BY(1)
  for (unsigned group = warp_index(); group < groups; group += warps)
    use(group, totals_of_parts<kSums, V>(parts + group * count * V, count));
  __syncthreads();
}

// ---- ranks ----

inline constexpr unsigned kRankDigitBits = 8;
inline constexpr unsigned kRankBins = 1u << kRankDigitBits;

// ranks[i]: how many losses are less than losses[i], or equal and before it; NaN is the largest.
// A least-significant-digit radix sort of the samples: a warp takes a stretch of the order so far,
// 32 at a time, and counts in a column of its own which digits it has met, so that equal digits keep
// their order. `ranks` holds the order until the last pass; `counts` [warps, kRankBins] is scratch.
// T is the type the losses came in: its digits alone are sorted. The caller puts a barrier before;
// one comes last.
template <class T, int kItems>
__device__ inline void rank_losses(const float* losses, unsigned batch, unsigned* ranks,
                                   unsigned* counts, unsigned* warp_totals_of_bins) {
  constexpr unsigned kKeyBits = 8 * sizeof(typename TopkKey<T>::type);
  const unsigned lane = lane_index(), warps = blockDim.x / kWarpSize;
  const unsigned rounds = (batch + blockDim.x - 1) / blockDim.x;  // up to kItems
  const unsigned begin = warp_index() * rounds * kWarpSize;
  unsigned* mine = counts + warp_index() * kRankBins;

  FASTSEL_UNROLL_BY(1)
  for (unsigned shift = 0; shift < kKeyBits; shift += kRankDigitBits) {
    unsigned sample[kItems], digit_and_place[kItems];
    for (unsigned bin = lane; bin < kRankBins; bin += kWarpSize) mine[bin] = 0;
    __syncwarp();
    FASTSEL_UNROLL
    for (unsigned i = 0; i < kItems; ++i) {
      if (i >= rounds) break;
      const unsigned position = begin + i * kWarpSize + lane;
      unsigned digit = kRankBins;  // past the end
      if (position < batch) {
        sample[i] = shift == 0 ? position : ranks[position];
        digit = topk_key(from_float<T>(losses[sample[i]]), true) >> shift & (kRankBins - 1);
      }
      const unsigned peers = __match_any_sync(kFullMask, digit);
      const unsigned before = __popc(peers & ((1u << lane) - 1));
      unsigned met = 0;
      if (position < batch) met = mine[digit];
      digit_and_place[i] = digit << 16 | (met + before);
      __syncwarp();
      if (position < batch && before == 0) mine[digit] = met + __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    // From counts to first positions: by digit, of equal digits by warp.
    const unsigned bin = threadIdx.x;
    unsigned sum = 0;
    for (unsigned w = 0; bin < kRankBins && w < warps; ++w) sum += counts[w * kRankBins + bin];
    const unsigned inclusive = warp_inclusive_sum(sum);
    if (lane == kWarpSize - 1) warp_totals_of_bins[warp_index()] = inclusive;
    __syncthreads();
    unsigned first = sum_of_warps_before(warp_totals_of_bins, warp_index()) + inclusive - sum;
    for (unsigned w = 0; bin < kRankBins && w < warps; ++w) {
      const unsigned count = counts[w * kRankBins + bin];
      counts[w * kRankBins + bin] = first;
      first += count;
    }
    __syncthreads();
    const bool last = shift + kRankDigitBits >= kKeyBits;
    FASTSEL_UNROLL
    for (unsigned i = 0; i < kItems; ++i) {
      if (i >= rounds || begin + i * kWarpSize + lane >= batch) break;
      const unsigned position = mine[digit_and_place[i] >> 16] + (digit_and_place[i] & 0xffffu);
      if (last)
        ranks[sample[i]] = position;
      else
        ranks[position] = sample[i];
    }
    __syncthreads();
  }
}

}  // namespace fastsel::cuda
