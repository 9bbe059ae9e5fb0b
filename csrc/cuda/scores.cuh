// sample_scores on the GPU: one read of the logits, online, for rows of any length. The arithmetic
// is core/scores.h.
//
// 1. The threads of a row stride over its 16-byte vectors. A thread holds four numbers: the maximum
//    of what it has seen and the three sums relative to it (the online softmax of Milakov and
//    Gimelshein, 2018, arXiv:1805.02867, with two more sums).
// 2. For each vector it takes the vector's maximum, rescales its sums once if that is a new one,
//    and adds the terms: eight instructions a class, so that the exponentials stay hidden behind
//    the loads.
// 3. The target's logit is replaced by -inf as it passes; it never enters the sums.
// 4. States merge over the lanes, over the warps of a block, and over blocks where a row has
//    several.
// 5. The last step of a row, in double, is long and needs one lane. Where a warp has rows to itself
//    it runs up to 32 of them at a time, a row a lane.
// A target outside [0, C) gives NaN, since an op does not wait for the device to raise an error.
#pragma once

#include "core/dtypes.h"
#include "core/scores.h"
#include "core/scores_arguments.h"
#include "cuda/device.cuh"
#include "cuda/tuning.h"

namespace fastsel::cuda {

// Values of one 16-byte load.
template <class T>
inline constexpr int kScoresVector = 16 / sizeof(T);

// Adds `count` values of a row to a state. One rescaling for all of them.
template <int count>
__device__ __forceinline__ void add_values(const float (&x)[count], ScoreState<float>& state) {
  constexpr float kLog2E = 1.44269504088896341f;
  float max = x[0];
  FASTSEL_UNROLL
  for (int i = 1; i < count; ++i) max = fmaxf(max, x[i]);
  if (max > state.max) {
    // The first maximum comes from -inf: exp2(-inf) = 0 times sums that are 0. The shift stays
    // finite for the product.
    const float shift = fmaxf(state.max - max, kScoreFloor);
    const float scale = fast_exp2((state.max - max) * kLog2E);
    state.weighted = scale * (state.weighted + shift * state.sum);
    state.sum *= scale;
    state.sum_sq *= scale * scale;
    state.max = max;
  }
  const float base = state.max == -INFINITY ? 0.0f : state.max;
  FASTSEL_UNROLL
  for (int i = 0; i < count; ++i) {
    const float shifted = x[i] - base;
    const float e = fast_exp2(shifted * kLog2E);  // NaN stays NaN
    state.sum += e;
    state.sum_sq = fmaf(e, e, state.sum_sq);
    state.weighted =
        fmaf(fmaxf(shifted, kScoreFloor), e, state.weighted);  // a masked class adds -87 * 0
  }
}

// The state of a row's classes [begin, end) other than the target, as far as this thread's share
// goes. Threads 0 ... stride-1 share them.
template <class T>
__device__ __forceinline__ ScoreState<float> thread_state(const T* row, int64_t begin, int64_t end,
                                                          int64_t target, int thread, int stride) {
  constexpr int kVector = kScoresVector<T>;
  ScoreState<float> state;
  const auto add_one = [&](int64_t j) {
    const float x[1] = {j == target ? -INFINITY : to_float(row[j])};
    add_values(x, state);
  };
  // Up to the first 16-byte boundary, one value a thread.
  const int64_t misaligned = (reinterpret_cast<uintptr_t>(row + begin) / sizeof(T)) % kVector;
  int64_t body = begin + (misaligned == 0 ? 0 : kVector - misaligned);
  if (body > end) body = end;
  for (int64_t j = begin + thread; j < body; j += stride) add_one(j);
  const int64_t vectors = (end - body) / kVector;
  FASTSEL_UNROLL_BY(4)
  for (int64_t v = thread; v < vectors; v += stride) {
    const int64_t first = body + v * kVector;
    const auto loaded = load_streaming<kVector>(row + first);
    float x[kVector];
    FASTSEL_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] = to_float(loaded[i]);
    if (target >= first && target < first + kVector) {
      FASTSEL_UNROLL
      for (int i = 0; i < kVector; ++i) x[i] = first + i == target ? -INFINITY : x[i];
    }
    add_values(x, state);
  }
  for (int64_t j = body + vectors * kVector + thread; j < end; j += stride) add_one(j);
  return state;
}

// The merged state of a group of `lanes` lanes, in every one of them. merge() is exactly
// commutative, so all agree bit for bit.
__device__ __forceinline__ ScoreState<float> merge_lanes(ScoreState<float> state, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    ScoreState<float> other;
    other.max = __shfl_xor_sync(kFullMask, state.max, offset);
    other.sum = __shfl_xor_sync(kFullMask, state.sum, offset);
    other.sum_sq = __shfl_xor_sync(kFullMask, state.sum_sq, offset);
    other.weighted = __shfl_xor_sync(kFullMask, state.weighted, offset);
    state = merge(state, other);
  }
  return state;
}

template <class T>
__device__ __forceinline__ void write_scores(const ScoresArguments<T>& a, int64_t row,
                                             const ScoreState<float>& others) {
  const int64_t target = a.target[row];
  RowScores scores{0, 0, 0, 0};
  if (target != a.ignore_index) {
    const bool valid = target >= 0 && target < a.classes;
    const double logit = valid ? to_float(a.logits[row * a.row_stride + target]) : NAN;
    scores = finish_scores(others, logit);
  }
  a.loss[row] = static_cast<float>(scores.loss);
  a.grad_norm[row] = static_cast<float>(scores.grad_norm);
  a.entropy[row] = static_cast<float>(scores.entropy);
  a.lse[row] = static_cast<float>(scores.lse);
}

// A group of kLanes lanes a row; each group takes `rows_per_group` rows (at most kLanes) that lie
// side by side.
template <class T, int kLanes>
__global__ void __launch_bounds__(kScoresThreads)
    scores_short_rows_kernel(ScoresArguments<T> a, int rows_per_group) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t group = (int64_t{blockIdx.x} * kScoresThreads + threadIdx.x) / kLanes;
  const int64_t first = group * rows_per_group;
  ScoreState<float> mine;
  for (int r = 0; r < rows_per_group; ++r) {
    const int64_t row = first + r;
    ScoreState<float> state;
    if (row < a.rows && a.target[row] != a.ignore_index) {
      state =
          thread_state(a.logits + row * a.row_stride, 0, a.classes, a.target[row], lane, kLanes);
    }
    state = merge_lanes(state, kLanes);
    if (lane == r) mine = state;
  }
  if (lane < rows_per_group && first + lane < a.rows) write_scores(a, first + lane, mine);
}

// `splits` blocks a row. With one, the block finishes its row; with more, it leaves its state in
// partial[row * splits + split].
template <class T>
__global__ void __launch_bounds__(kScoresThreads)
    scores_long_rows_kernel(ScoresArguments<T> a, int splits,
                            ScoreState<float>* partial) {  // [B, splits]
  constexpr int kWarps = kScoresThreads / kWarpSize;
  struct Storage {
    float max[kWarps], sum[kWarps], sum_sq[kWarps], weighted[kWarps];
  };
  auto& shared = block_shared<Storage>();
  const int64_t row = blockIdx.x / splits, split = blockIdx.x % splits;
  const int64_t target = a.target[row];
  ScoreState<float> state;
  if (target != a.ignore_index) {
    const int64_t share = (a.classes + splits - 1) / splits, begin = min(split * share, a.classes);
    const int64_t end = min(begin + share, a.classes);
    state = thread_state(a.logits + row * a.row_stride, begin, end, target,
                         static_cast<int>(threadIdx.x), kScoresThreads);
  }
  state = merge_lanes(state, kWarpSize);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) {
    shared.max[warp] = state.max;
    shared.sum[warp] = state.sum;
    shared.sum_sq[warp] = state.sum_sq;
    shared.weighted[warp] = state.weighted;
  }
  __syncthreads();
  if (warp > 0) return;
  const int w = lane % kWarps;
  state.max = shared.max[w];
  state.sum = shared.sum[w];
  state.sum_sq = shared.sum_sq[w];
  state.weighted = shared.weighted[w];
  state = merge_lanes(state, kWarps);
  if (lane > 0) return;
  if (splits > 1) {
    partial[row * splits + split] = state;
  } else {
    write_scores(a, row, state);
  }
}

// Merges the states that several blocks left of each row, in order; a thread a row.
template <class T>
__global__ void __launch_bounds__(kScoresThreads)
    scores_merge_kernel(ScoresArguments<T> a, int splits,
                        const ScoreState<float>* partial) {  // [B, splits]
  const int64_t row = int64_t{blockIdx.x} * kScoresThreads + threadIdx.x;
  if (row >= a.rows) return;
  ScoreState<float> state;
  for (int split = 0; split < splits; ++split) state = merge(state, partial[row * splits + split]);
  write_scores(a, row, state);
}

// grad_logits = grad_loss * (softmax - onehot): a warp for each piece of kScoresBackwardChunk
// classes of a row.
template <class T>
__global__ void __launch_bounds__(kScoresThreads)
    scores_backward_kernel(ScoresBackwardArguments<T> a, int64_t chunks) {
  constexpr int kVector = kScoresVector<T>;
  constexpr float kLog2E = 1.44269504088896341f;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t item = (int64_t{blockIdx.x} * kScoresThreads + threadIdx.x) / kWarpSize;
  const int64_t row = item / chunks, begin = item % chunks * kScoresBackwardChunk;
  if (row >= a.rows) return;
  const int64_t end = min(begin + kScoresBackwardChunk, a.classes), target = a.target[row];
  const T* x = a.logits + row * a.row_stride;
  T* grad = a.grad_logits + row * a.classes;
  const bool ignored = target == a.ignore_index, valid = target >= 0 && target < a.classes;
  const float loss = a.loss[row];
  const float scale = ignored ? 0.0f : valid ? a.grad_loss[row] : NAN;
  const auto p = ignored || !valid ? ProbabilityBase<float>{0, 0}
                                   : probability_base(to_float(x[target]), loss, a.lse[row]);
  const auto gradient = [&](int64_t j, float logit) {
    if (ignored) return 0.0f;
    // p_y - 1 without the cancellation: p_y = exp(-loss).
    if (j == target) return scale * expm1f(-loss);
    return scale * fast_exp2(((logit - p.base) - p.offset) * kLog2E);
  };
  const auto misaligned = [](const T* pointer) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % kVector);
  };
  // Whole vectors where input and output lie alike; else value by value.
  int64_t body = end, vectors = 0;
  if (misaligned(x + begin) == misaligned(grad + begin)) {
    body = min(begin + (kVector - misaligned(x + begin)) % kVector, end);
    vectors = (end - body) / kVector;
  }
  for (int64_t j = begin + lane; j < body; j += kWarpSize) {
    grad[j] = from_float<T>(gradient(j, to_float(x[j])));
  }
  for (int64_t v = lane; v < vectors; v += kWarpSize) {
    const int64_t first = body + v * kVector;
    const auto in = load_streaming<kVector>(x + first);
    Vector<T, kVector> out;
    FASTSEL_UNROLL
    for (int i = 0; i < kVector; ++i) out[i] = from_float<T>(gradient(first + i, to_float(in[i])));
    store_vector(grad + first, out);
  }
  for (int64_t j = body + vectors * kVector + lane; j < end; j += kWarpSize) {
    grad[j] = from_float<T>(gradient(j, to_float(x[j])));
  }
}

}  // namespace fastsel::cuda
