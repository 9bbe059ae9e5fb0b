// affine_grad_norm_sq and bias_grad_norm_sq on the GPU: the squared norm of the sum over a sample's
// positions of normalized * grad_outputs, or of grad_outputs alone. Each input is read once.
//
// The gradient of a normalisation's weight is that sum (Gray et al., "Normalization Layer Per-Example
// Gradients are Sufficient to Predict Gradient Noise Scale in Transformers", 2024, arXiv:2411.00999,
// section 3). In plain words:
// 1. A thread adds a few positions in float, and such partial sums in double: a hundred thousand
//    positions sum as exactly as a few. What threads hold of one column is added in a fixed order.
// 2. Where columns lie side by side, neighbouring threads take neighbouring columns; where positions
//    do (a normalisation over channels), a group of lanes takes a column.
// 3. With many samples a block takes one and squares its sums at once. With few, blocks share a
//    sample's columns and positions and leave sums; a second launch adds and squares them.
#pragma once

#include "cuda/norm_sums.cuh"

namespace fastsel::cuda {

// How a sample is shared out.
struct AffinePlan {
  int lanes;          // threads side by side in a row, or that take a column: a power of two
  int64_t tiles;      // blocks that share a sample's columns
  int64_t splits;     // blocks that share its positions
  int64_t per_split;  // positions of a block
  double* sums;       // [B, splits, D], or null: a block takes a whole sample
};

// A block's sample and its share of the positions.
struct AffineShare {
  int64_t sample, tile, split, begin, end;

  template <class T>
  __device__ __forceinline__ AffineShare(const AffineArguments<T>& a, const AffinePlan& plan) {
    const int64_t blocks = plan.tiles * plan.splits, block = blockIdx.x;
    sample = block / blocks;
    split = block % blocks / plan.tiles;
    tile = block % plan.tiles;
    begin = split * plan.per_split;
    end = min(begin + plan.per_split, a.positions);
  }
};

// Adds kVector products that start at x and y.
template <bool kWeighted, int kVector, class T>
__device__ __forceinline__ void add_products(const T* x, const T* y, float (&sums)[kVector]) {
  float b[kVector];
  load_floats(y, b);
  if constexpr (kWeighted) {
    float a[kVector];
    load_floats(x, a);
    FASTSEL_UNROLL
    for (int i = 0; i < kVector; ++i) sums[i] = fmaf(a[i], b[i], sums[i]);
  } else {
    FASTSEL_UNROLL
    for (int i = 0; i < kVector; ++i) sums[i] += b[i];
  }
}

// Calls take(sums) for the products of a few of `count` vectors at a time, whose loads are under way
// together; vectors lie a step apart.
template <bool kWeighted, int kVector, class T, class Take>
__device__ __forceinline__ void for_each_partial_sum(const T* x, int64_t x_step, const T* y,
                                                     int64_t y_step, int64_t count, Take&& take) {
  for (; count >= kAffineUnroll; count -= kAffineUnroll) {
    float sums[kVector] = {};
    FASTSEL_UNROLL
    for (int i = 0; i < kAffineUnroll; ++i)
      add_products<kWeighted>(x + i * x_step, y + i * y_step, sums);
    take(sums);
    x += kAffineUnroll * x_step;
    y += kAffineUnroll * y_step;
  }
  float sums[kVector] = {};
  for (; count > 0; --count, x += x_step, y += y_step) add_products<kWeighted>(x, y, sums);
  take(sums);
}

// What is done with a column's sum: left for the second launch, or squared at once.
template <class T>
__device__ __forceinline__ void take_column(const AffineArguments<T>& a, const AffinePlan& plan,
                                            const AffineShare& share, int64_t column, double sum,
                                            double& squares) {
  if (plan.sums) {
    plan.sums[(share.sample * plan.splits + share.split) * a.columns + column] = sum;
  } else {
    squares += sum * sum;
  }
}

// Columns side by side. The block is `lanes` threads wide, each with kVector columns, and the rest of
// its threads deep: rows of threads take turns at the positions.
template <class T, int kVector, bool kWeighted>
__global__ void __launch_bounds__(kAffineThreads, kAffineResident)
    affine_columns_kernel(AffineArguments<T> a, AffinePlan plan,
                          float* norms) {  // [B]
  struct Storage {
    double sums[kVector][kAffineThreads];
  };
  auto& s = block_shared<Storage>();
  const AffineShare share(a, plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % plan.lanes, row = thread / plan.lanes;
  const int rows = kAffineThreads / plan.lanes;
  const T* y = a.grad_outputs + share.sample * a.grad_strides.batch;
  const T* x = kWeighted ? a.normalized + share.sample * a.normalized_strides.batch : y;
  const int64_t width = int64_t{plan.lanes} * kVector;
  double squares = 0;
  for (int64_t tile = share.tile; tile * width < a.columns; tile += plan.tiles) {
    const int64_t column = tile * width + lane * kVector;
    double total[kVector] = {};
    if (column < a.columns) {
      const int64_t first = share.begin + row, x_step = a.normalized_strides.position,
                    y_step = a.grad_strides.position;
      for_each_partial_sum<kWeighted, kVector>(
          x + first * x_step + column, rows * x_step, y + first * y_step + column, rows * y_step,
          (share.end - first + rows - 1) / rows, [&](const float (&sums)[kVector]) {
            FASTSEL_UNROLL
            for (int v = 0; v < kVector; ++v) total[v] += sums[v];
          });
    }
    __syncthreads();  // the tile before has been read
    FASTSEL_UNROLL
    for (int v = 0; v < kVector; ++v) s.sums[v][thread] = total[v];
    for (int half = rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (row >= half) continue;
      FASTSEL_UNROLL
      for (int v = 0; v < kVector; ++v) s.sums[v][thread] += s.sums[v][thread + half * plan.lanes];
    }
    if (row > 0 || column >= a.columns) continue;
    FASTSEL_UNROLL
    for (int v = 0; v < kVector; ++v)
      take_column(a, plan, share, column + v, s.sums[v][thread], squares);
  }
  if (plan.sums) return;
  squares = block_sum<kAffineThreads>(squares);
  if (thread == 0) norms[share.sample] = static_cast<float>(squares);
}

// Positions side by side. A group of `lanes` lanes takes a column, each kVector positions at a time.
template <class T, int kVector, bool kWeighted>
__global__ void __launch_bounds__(kAffineThreads, kAffineResident)
    affine_positions_kernel(AffineArguments<T> a, AffinePlan plan,
                            float* norms) {  // [B]
  const AffineShare share(a, plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % plan.lanes, groups = kAffineThreads / plan.lanes;
  const T* y = a.grad_outputs + share.sample * a.grad_strides.batch;
  const T* x = kWeighted ? a.normalized + share.sample * a.normalized_strides.batch : y;
  const int64_t step = int64_t{plan.lanes} * kVector;
  const int64_t whole = share.begin + (share.end - share.begin) / kVector * kVector;
  double squares = 0;
  // Whole warps stay in the loop together, because lanes exchange sums at its end.
  for (int64_t first = share.tile * groups; first < a.columns; first += plan.tiles * groups) {
    const int64_t column = first + thread / plan.lanes;
    double total = 0;
    if (column < a.columns) {
      const T* xs = x + column * a.normalized_strides.column;
      const T* ys = y + column * a.grad_strides.column;
      const int64_t first = share.begin + lane * kVector;
      for_each_partial_sum<kWeighted, kVector>(
          xs + first, step, ys + first, step, (whole - first + step - 1) / step,
          [&](const float (&sums)[kVector]) { total += pairwise_sum(sums); });
      for (int64_t t = whole + lane; t < share.end; t += plan.lanes) {
        float part[1] = {};
        add_products<kWeighted>(xs + t, ys + t, part);
        total += part[0];
      }
    }
    total = warp_sum(total, plan.lanes);
    if (lane == 0 && column < a.columns) take_column(a, plan, share, column, total, squares);
  }
  if (plan.sums) return;
  squares = block_sum<kAffineThreads>(squares);
  if (thread == 0) norms[share.sample] = static_cast<float>(squares);
}

// Adds the sums that several blocks left of each column, in order, and squares them; a block a
// sample.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    affine_squares_kernel(const double* sums,  // [B, splits, D]
                          int64_t columns, int64_t splits,
                          float* norms) {  // [B]
  const int64_t sample = blockIdx.x;
  double squares = 0;
  for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
    double sum = 0;
    FASTSEL_UNROLL_BY(8)
    for (int64_t split = 0; split < splits; ++split)
      sum += sums[(sample * splits + split) * columns + column];
    squares += sum * sum;
  }
  squares = block_sum<kThreads>(squares);
  if (threadIdx.x == 0) norms[sample] = static_cast<float>(squares);
}

}  // namespace fastsel::cuda
