// Sums of weights by a warp, and the search for a place in them: what the random operators share.
#pragma once

#include <climits>
#include <cmath>

#include "core/dtypes.h"
#include "core/weighted_sample.h"
#include "cuda/norm_sums.cuh"
#include "cuda/topk_keys.cuh"

namespace fastsel::cuda {

// An index that no tensor has: what wrong arguments give.
inline constexpr int64_t kNoItem = INT64_MIN;

__device__ __forceinline__ double summand(double v) { return v; }
template <class T>
__device__ __forceinline__ double summand(T weight) {
  const float w = to_float(weight);
  return valid_weight(w) ? w : NAN;  // which no sum above it loses
}

// The first of values[begin, end) at which their sum, from `before` on, exceeds the target, and the
// sum before it; where rounding leaves none, the last that is positive. Never one that is zero.
template <class T>
__device__ int64_t find_place(const T* values, int64_t begin, int64_t end, double& before,
                              double target) {
  int64_t last = begin;
  double before_last = before;
  for (int64_t base = begin; base < end; base += kWarpSize) {
    const int64_t i = base + lane_index();
    const double value = i < end ? summand(values[i]) : 0.0;
    double inclusive = value;
    FASTSEL_UNROLL
    for (unsigned offset = 1; offset < kWarpSize; offset *= 2) {
      const double below = __shfl_up_sync(kFullMask, inclusive, offset);
      if (lane_index() >= offset) inclusive += below;
    }
    const unsigned positive = __ballot_sync(kFullMask, value > 0);
    const unsigned beyond = positive & __ballot_sync(kFullMask, before + inclusive > target);
    if (positive) {
      const unsigned lane =
          beyond ? static_cast<unsigned>(__ffs(static_cast<int>(beyond))) - 1
                 : kWarpSize - 1 - static_cast<unsigned>(__clz(static_cast<int>(positive)));
      last = base + lane;
      before_last = before + __shfl_sync(kFullMask, inclusive - value, lane);
    }
    if (beyond) break;
    before += __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
  }
  before = before_last;
  return last;
}

}  // namespace fastsel::cuda
