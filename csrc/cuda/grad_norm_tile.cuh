// Tiles of products X Y^T on tensor cores, for sums over their elements that never leave the chip.
//
// X and Y have rows and a depth; the product sums over the depth. A block accumulates a tile of
// kTile rows of X by kTile rows of Y in registers and takes the depth in stages through shared
// memory, kStages of them in flight (cp.async where rows are aligned). Where the operands come from
// is the loaders' business (grad_norm_operands.cuh, conv_grad_norm.cuh):
//   direct form  X = G^T, Y = A^T: rows are features, the depth is positions
//   Gram form    X = Y = A, then G: rows are positions, the depth is features
// Sixteen-bit values are multiplied as they are. Float32 values are split into two TF32 values each
// (mma.cuh), and a stage's products are added to the sum by ordinary additions: a tensor core cuts
// off what its own additions lose, and over a long depth that shows. An infinite float32 comes out
// as NaN, because its parts meet infinities of both signs.
#pragma once

#include "core/dtypes.h"
#include "cuda/device.cuh"
#include "cuda/mma.cuh"
#include "cuda/tuning.h"

namespace fastsel::cuda {

// A warp's corner of the tile, and the lane.
struct WarpPlace {
  int row, column, lane;
};

__device__ __forceinline__ WarpPlace place_of_warp(int row, int column) {
  return {row, column, static_cast<int>(threadIdx.x) % kWarpSize};
}

// Warps: two along the rows of X, kTile / 32 along the rows of Y.
template <class T_, int kTile_>
struct ProductTile {
  using T = T_;
  static constexpr int kTile = kTile_;
  static constexpr int kWarpColumns = kTile / 32;
  static constexpr int kThreads = 2 * kWarpColumns * kWarpSize;
  static constexpr int kDepth = 64 / sizeof(T);  // of a stage
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kMmaRows = kTile / 32;  // 16 rows each, of a warp
  static constexpr int kMmaColumns = 4;        // 8 rows of Y each
  static_assert(kTile == 64 || kTile == 128);

  static __device__ __forceinline__ WarpPlace place() {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return place_of_warp(warp / kWarpColumns * (kTile / 2), warp % kWarpColumns * 32);
  }
};

// 64 rows of X = Y that are kTile / kRows samples of kRows rows, of which only the products within
// a sample are taken: kRows by 16 of them a warp.
template <class T_, int kRows_>
struct PackedTile {
  using T = T_;
  static constexpr int kTile = 64;
  static constexpr int kRows = kRows_;
  static constexpr int kSamples = kTile / kRows;
  static constexpr int kWarpsPerSample = kRows / 16;
  static constexpr int kWarps = kSamples * kWarpsPerSample;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kMmaRows = kRows / 16;
  static constexpr int kMmaColumns = 2;
  static_assert(kRows == 16 || kRows == 32);

  static __device__ __forceinline__ WarpPlace place() {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return place_of_warp(warp / kWarpsPerSample * kRows, warp * 16);
  }
};

template <class Tile>
using Accumulator = float[Tile::kMmaRows][Tile::kMmaColumns][4];

template <class Tile>
__device__ __forceinline__ void clear(Accumulator<Tile>& sum) {
  FASTSEL_UNROLL
  for (int m = 0; m < Tile::kMmaRows; ++m) {
    FASTSEL_UNROLL
    for (int n = 0; n < Tile::kMmaColumns; ++n) {
      FASTSEL_UNROLL
      for (int i = 0; i < 4; ++i) sum[m][n][i] = 0;
    }
  }
}

// One operand's stage in shared memory, with the same axis contiguous as in global memory. The
// padding of the lines keeps a warp's fragment loads free of bank conflicts.
template <class Tile, bool kDepthContiguous>
struct StageLayout {
  using T = typename Tile::T;
  static constexpr int kLines = kDepthContiguous ? Tile::kTile : Tile::kDepth;
  static constexpr int kLength = kDepthContiguous ? Tile::kDepth : Tile::kTile;
  static constexpr int kPitch = kLength + (kDepthContiguous ? Tile::kVector : 8);
  static constexpr int kElements = kLines * kPitch;
  static_assert(kPitch % Tile::kVector == 0 && kElements % Tile::kVector == 0);

  FASTSEL_HD static int at(int row, int depth) {
    return kDepthContiguous ? row * kPitch + depth : depth * kPitch + row;
  }
};

template <class Tile, bool kDepthContiguous>
inline constexpr size_t kProductSharedBytes =
    2 * kProductStages * StageLayout<Tile, kDepthContiguous>::kElements * sizeof(typename Tile::T);

// ---- fragments ----

// Adds a stage's products of 16-bit values.
template <class Tile, bool kDepthContiguous>
__device__ __forceinline__ void multiply_narrow(Accumulator<Tile>& sum,
                                                const typename Tile::T* x,  // a stage
                                                const typename Tile::T* y) {
  using T = typename Tile::T;
  using Layout = StageLayout<Tile, kDepthContiguous>;
  const WarpPlace place = Tile::place();
  const int r = place.lane % 8, low = place.lane / 8 % 2 * 8, high = place.lane / 16 * 8;
  const auto load = [](uint32_t (&out)[4], const T* row) {
    if constexpr (kDepthContiguous)
      ldmatrix_x4(out, row);
    else
      ldmatrix_x4_trans(out, row);
  };
  FASTSEL_UNROLL
  for (int depth = 0; depth < Tile::kDepth; depth += 16) {
    uint32_t b[Tile::kMmaColumns][2];
    FASTSEL_UNROLL
    for (int n = 0; n < Tile::kMmaColumns; n += 2) {
      // Matrices: columns 0-7 and depths 0-7, depths 8-15; columns 8-15 and the same. A lane names
      // a line: of the rows where the depth is contiguous, else of the depth.
      const int row = place.column + n * 8 + high;
      uint32_t both[4];
      load(both, y + (kDepthContiguous ? Layout::at(row + r, depth + low)
                                       : Layout::at(row, depth + low + r)));
      b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
    FASTSEL_UNROLL
    for (int m = 0; m < Tile::kMmaRows; ++m) {
      // Matrices: rows 0-7 and 8-15 of depths 0-7, then of depths 8-15.
      const int row = place.row + m * 16 + low;
      uint32_t a[4];
      load(a, x + (kDepthContiguous ? Layout::at(row + r, depth + high)
                                    : Layout::at(row, depth + high + r)));
      FASTSEL_UNROLL
      for (int n = 0; n < Tile::kMmaColumns; ++n) mma_m16n8k16<T>(sum[m][n], a, b[n]);
    }
  }
}

// The same of float32 values. The product of the two small parts is left out: it is below the last
// bit of float32.
template <class Tile, bool kDepthContiguous>
__device__ __forceinline__ void multiply_float(Accumulator<Tile>& sum,
                                               const float* x,  // a stage
                                               const float* y) {
  using Layout = StageLayout<Tile, kDepthContiguous>;
  const WarpPlace place = Tile::place();
  const int g = place.lane / 4, t = place.lane % 4;
  const auto load = [](const float* stage, int row, int depth, uint32_t& big, uint32_t& small) {
    const Tf32Pair pair = split_tf32(stage[Layout::at(row, depth)]);
    big = pair.big;
    small = pair.small;
  };
  FASTSEL_UNROLL
  for (int depth = 0; depth < Tile::kDepth; depth += 8) {
    uint32_t b[Tile::kMmaColumns][2], b_small[Tile::kMmaColumns][2];
    FASTSEL_UNROLL
    for (int n = 0; n < Tile::kMmaColumns; ++n) {
      FASTSEL_UNROLL
      for (int i = 0; i < 2; ++i)
        load(y, place.column + n * 8 + g, depth + i * 4 + t, b[n][i], b_small[n][i]);
    }
    FASTSEL_UNROLL
    for (int m = 0; m < Tile::kMmaRows; ++m) {
      uint32_t a[4], a_small[4];
      FASTSEL_UNROLL
      for (int i = 0; i < 4; ++i)
        load(x, place.row + m * 16 + i % 2 * 8 + g, depth + i / 2 * 4 + t, a[i], a_small[i]);
      FASTSEL_UNROLL
      for (int n = 0; n < Tile::kMmaColumns; ++n) {
        float product[4] = {0, 0, 0, 0};
        mma_m16n8k8_tf32(product, a_small, b[n]);
        mma_m16n8k8_tf32(product, a, b_small[n]);
        mma_m16n8k8_tf32(product, a, b[n]);
        FASTSEL_UNROLL
        for (int i = 0; i < 4; ++i) sum[m][n][i] += product[i];
      }
    }
  }
}

// ---- the depth loop ----

// Rows of one of the two operands: their loader, and where the tile begins.
template <class Loader>
struct TileRows {
  const Loader& loader;
  int64_t first;
};

// sum += the tile's product over `depth`. A loader has
//   kDepthContiguous               which axis of the operand is contiguous
//   load(stage, row, depth, step)  its part of a step's stage; zeros beyond the operand
//   kPrepares, prepare(row, depth, step)
//                                  what load of that step needs from all threads; called at least
//                                  one barrier earlier, and kProductStages steps overwrite nothing
// With `same`, y's rows are x's, and are neither loaded nor kept twice. Ends with a barrier, so
// that the stages can be used for something else.
template <class Tile, class X, class Y>
__device__ __forceinline__ void accumulate_product(Accumulator<Tile>& sum, const TileRows<X>& x,
                                                   const TileRows<Y>& y, bool same, int64_t depth,
                                                   typename Tile::T* stages) {
  static_assert(X::kDepthContiguous == Y::kDepthContiguous && !(X::kPrepares && !Y::kPrepares));
  using T = typename Tile::T;
  using Layout = StageLayout<Tile, X::kDepthContiguous>;
  const int64_t steps = (depth + Tile::kDepth - 1) / Tile::kDepth;
  const auto x_stage = [&](int i) { return stages + i * 2 * Layout::kElements; };
  const auto y_stage = [&](int i) { return x_stage(i) + (same ? 0 : Layout::kElements); };
  const auto prepare = [&](int64_t step) {
    // Where both operands prepare they are rows of one loader, and share what is prepared.
    if constexpr (Y::kPrepares)
      if (step < steps) y.loader.prepare(y.first, step * Tile::kDepth, step);
  };
  const auto load = [&](int64_t step, int stage) {
    if (step < steps) {
      x.loader.load(x_stage(stage), x.first, step * Tile::kDepth, step);
      if (!same) y.loader.load(y_stage(stage), y.first, step * Tile::kDepth, step);
    }
    cp_async_commit();  // an empty group too, so that groups count steps
  };
  if constexpr (Y::kPrepares) {
    for (int step = 0; step < kProductStages; ++step) prepare(step);
    __syncthreads();
  }
  FASTSEL_UNROLL
  for (int step = 0; step < kProductStages - 1; ++step) load(step, step);
  int stage = 0, next = kProductStages - 1;
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kProductStages - 2>();
    // The step's values are everybody's now, and the stage that is loaded next is read no more.
    __syncthreads();
    load(step + kProductStages - 1, next);
    prepare(step + kProductStages);
    if constexpr (sizeof(T) == 2)
      multiply_narrow<Tile, X::kDepthContiguous>(sum, x_stage(stage), y_stage(stage));
    else
      multiply_float<Tile, X::kDepthContiguous>(sum, x_stage(stage), y_stage(stage));
    stage = stage + 1 == kProductStages ? 0 : stage + 1;
    next = next + 1 == kProductStages ? 0 : next + 1;
  }
  __syncthreads();  // the groups still pending are empty
}

// The sum of the products of two tiles' elements over this thread's share of them, as far as
// inside(row, column) says; elsewhere are sums of padding, and an infinity times padding is no
// number.
template <class Tile, class F>
__device__ __forceinline__ float sum_of_products(const Accumulator<Tile>& first,
                                                 const Accumulator<Tile>& second, F&& inside) {
  const WarpPlace place = Tile::place();
  float sum = 0;
  FASTSEL_UNROLL
  for (int m = 0; m < Tile::kMmaRows; ++m) {
    FASTSEL_UNROLL
    for (int n = 0; n < Tile::kMmaColumns; ++n) {
      FASTSEL_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = place.row + m * 16 + i / 2 * 8 + place.lane / 4;
        const int column = place.column + n * 8 + place.lane % 4 * 2 + i % 2;
        if (inside(row, column)) sum = fmaf(first[m][n][i], second[m][n][i], sum);
      }
    }
  }
  return sum;
}

}  // namespace fastsel::cuda
