// Sums that the kernels of the per-sample gradient norms share. All are taken in a fixed order.
#pragma once

#include "core/dtypes.h"
#include "core/grad_norm_arguments.h"
#include "cuda/device.cuh"
#include "cuda/tuning.h"

namespace fastsel::cuda {

__device__ __forceinline__ double warp_sum(double v, int lanes = kWarpSize) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

// The sum over a block of kThreads threads, in thread 0. Holds a barrier on either side of its use of
// shared memory.
template <int kThreads>
__device__ __forceinline__ double block_sum(double v) {
  struct Storage {
    double warps[kThreads / kWarpSize];
  };
  auto& s = block_shared<Storage>();
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) s.warps[threadIdx.x / kWarpSize] = v;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) total += s.warps[warp];
  }
  return total;
}

// The sum of a few float values, pairwise.
template <int kCount>
__device__ __forceinline__ float pairwise_sum(const float (&v)[kCount]) {
  float sums[kCount];
  FASTSEL_UNROLL
  for (int i = 0; i < kCount; ++i) sums[i] = v[i];
  FASTSEL_UNROLL
  for (int step = 1; step < kCount; step *= 2) {
    FASTSEL_UNROLL
    for (int i = 0; i + step < kCount; i += 2 * step) sums[i] += sums[i + step];
  }
  return sums[0];
}

// kVector neighbouring values as float, in one load.
template <int kVector, class T>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[kVector]) {
  if constexpr (kVector == 1) {
    out[0] = to_float(*p);
  } else {
    const auto loaded = load_streaming<kVector>(p);
    FASTSEL_UNROLL
    for (int i = 0; i < kVector; ++i) out[i] = to_float(loaded[i]);
  }
}

}  // namespace fastsel::cuda
