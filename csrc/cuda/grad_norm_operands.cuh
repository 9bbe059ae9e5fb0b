// The dense operand of a product tile, and sums over the threads of a block.
#pragma once

#include "core/dtypes.h"
#include "cuda/device.cuh"
#include "cuda/grad_norm_tile.cuh"

namespace fastsel::cuda {

// A matrix as lines of contiguous values, any distance apart: positions by features of a linear
// layer, channels by positions of a convolution.
template <class T>
struct Lines {
  const T* first;
  int64_t pitch;   // elements between lines
  int64_t count;   // of lines
  int64_t length;  // of a line
  bool aligned;    // every line starts at a multiple of 16 bytes
};

// Fills a stage with lines, of each of which `left` values and no more exist; source(line) is the
// first of them, or null where there is no such line. `valid` is any address that a copy may name.
template <class Tile, class Layout, class Source>
__device__ __forceinline__ void load_lines(typename Tile::T* stage, const typename Tile::T* valid,
                                           bool aligned, int64_t left, Source&& source) {
  using T = typename Tile::T;
  constexpr int kPerLine = Layout::kLength / Tile::kVector;
  constexpr int kRounds = Layout::kLines * kPerLine / Tile::kThreads;
  static_assert(Layout::kLines * kPerLine % Tile::kThreads == 0);
  const int length = static_cast<int>(min(left, int64_t{Layout::kLength}));
  struct Chunk {
    T* to;
    const T* from;
    int count;  // of Tile::kVector values
  };
  const auto chunk = [&](int round) {
    const int i = round * Tile::kThreads + static_cast<int>(threadIdx.x);
    const int line = i / kPerLine, column = i % kPerLine * Tile::kVector;
    const T* from = source(line);
    const int count = from ? max(min(length - column, Tile::kVector), 0) : 0;
    return Chunk{stage + line * Layout::kPitch + column, count > 0 ? from + column : valid, count};
  };
  if (aligned) {
    FASTSEL_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const Chunk c = chunk(round);
      cp_async_16(c.to, c.from, c.count * static_cast<int>(sizeof(T)));
    }
    return;
  }
  // All loads before the first store, so that their latencies overlap.
  Vector<T, Tile::kVector> values[kRounds];
  FASTSEL_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const Chunk c = chunk(round);
    FASTSEL_UNROLL
    for (int i = 0; i < Tile::kVector; ++i) values[round][i] = i < c.count ? c.from[i] : T{};
  }
  FASTSEL_UNROLL
  for (int round = 0; round < kRounds; ++round) store_vector(chunk(round).to, values[round]);
}

template <class Tile, bool kDepthContiguous_>
struct DenseLoader {
  using T = typename Tile::T;
  using Layout = StageLayout<Tile, kDepthContiguous_>;
  static constexpr bool kDepthContiguous = kDepthContiguous_;
  static constexpr bool kPrepares = false;

  Lines<T> lines;

  // Rows row ... and depths depth ... into a stage.
  __device__ __forceinline__ void load(T* stage, int64_t row, int64_t depth, int64_t) const {
    const int64_t first_line = kDepthContiguous ? row : depth;
    const int64_t first = kDepthContiguous ? depth : row;
    load_lines<Tile, Layout>(stage, lines.first, lines.aligned, lines.length - first,
                             [&](int line) -> const T* {
                               if (first_line + line >= lines.count) return nullptr;
                               return lines.first + (first_line + line) * lines.pitch + first;
                             });
  }
};

// ---- sums ----

// The sum of `v` over groups of kLanes threads of the block, in each first thread of a group, in an
// order that does not depend on who runs first. All threads of the block take part; a second call
// needs a barrier in between.
template <int kLanes, int kThreads>
__device__ __forceinline__ float group_sum(float v) {
  constexpr int kInWarp = kLanes < kWarpSize ? kLanes : kWarpSize;
  FASTSEL_UNROLL
  for (int offset = kInWarp / 2; offset > 0; offset /= 2)
    v += __shfl_xor_sync(kFullMask, v, offset);
  if constexpr (kLanes <= kWarpSize) return v;
  static_assert(kLanes <= kWarpSize || kLanes == kThreads);
  struct Storage {
    float sums[kThreads / kWarpSize];
  };
  auto& shared = block_shared<Storage>();
  if (threadIdx.x % kWarpSize == 0) shared.sums[threadIdx.x / kWarpSize] = v;
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
    FASTSEL_UNROLL
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) sum += shared.sums[warp];
  }
  return sum;
}

// A squared norm: rounding can make the Gram form's sum of signed terms slightly negative. NaN
// stays NaN.
__device__ __forceinline__ float squared_norm(float sum) { return sum < 0 ? 0.0f : sum; }

// out[b] = the sum of partial[b, 0 ... count - 1], kLanes threads a sample; with kFactors = 2 the
// sum of the even ones times that of the odd ones.
template <int kLanes, int kFactors>
__global__ void __launch_bounds__(kGradNormThreads)
    finish_norms_kernel(const float* partial,  // [B, count, kFactors]
                        int64_t count, int64_t batch,
                        float* out) {  // [B]
  constexpr int kGroups = kGradNormThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t sample = int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
  float factors[kFactors];
  FASTSEL_UNROLL
  for (int f = 0; f < kFactors; ++f) {
    float sum = 0;
    if (sample < batch) {
      const float* row = partial + sample * count * kFactors;
      FASTSEL_UNROLL_BY(4)
      for (int64_t i = lane; i < count; i += kLanes) sum += row[i * kFactors + f];
    }
    if (f > 0 && kLanes > kWarpSize) __syncthreads();
    factors[f] = group_sum<kLanes, kGradNormThreads>(sum);
  }
  if (lane != 0 || sample >= batch) return;
  float norm = factors[0];
  if constexpr (kFactors == 2) norm *= factors[1];
  out[sample] = squared_norm(norm);
}

}  // namespace fastsel::cuda
