// sample_scores over a range of rows, for the instruction set this file is compiled for.
//
// A row is read from memory once, a tile at a time: first the tile's maximum, then, while it is
// still in the first-level cache, the three sums relative to it. Tiles are merged in double, so a
// row of 262,144 classes sums as exactly as a short one. The target's lane and the padding of the
// last vector are read as -inf, where a class weighs less than 2e-38 of the sum.

#include "cpu/scores_simd.h"

#include "core/scores.h"
#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

constexpr int64_t kTile = 4096;  // 16 KB of float32: a third to a half of a first-level cache

// Calls f(vector, 0 or 1) for the vectors of values[0, count), with position `skip`, where it lies
// inside, and the padding of the last one at -inf. The second argument alternates, so that two
// accumulators can hide the latency of one.
template <class T, class F>
FASTSEL_HD void each_vector(const T* values, int64_t count, int64_t skip, F&& f) {
  const auto run = [&](int64_t i, int64_t end) __attribute__((always_inline)) {
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      f(load(values + i), 0);
      f(load(values + i + kLanes), 1);
    }
    if (i + kLanes <= end) f(load(values + i), 0);
  };
  const int64_t whole = count / kLanes * kLanes;
  const bool inside = skip >= 0 && skip < count;
  const int64_t special = inside ? skip / kLanes * kLanes : whole;
  run(0, special);
  if (inside) {
    const int64_t left = count - special;
    f(drop_lane(load_padded(values + special, left < kLanes ? left : kLanes), skip - special), 0);
    run(special + kLanes, whole);
    if (special == whole) return;
  }
  if (whole < count) f(load_padded(values + whole, count - whole), 1);
}

// The state of one tile in float32, whose maximum is its own, without the class at `skip`.
template <class T>
ScoreState<float> tile_state(const T* values, int64_t count, int64_t skip) {
  VecF maxima[2] = {splat(-INFINITY), splat(-INFINITY)};
  each_vector(values, count, skip, [&](VecF x, int k) __attribute__((always_inline)) {
    maxima[k] = max_or_second(x, maxima[k]);
  });
  const float max = reduce_max(max_or_second(maxima[0], maxima[1]));
  const VecF shift = splat(max == -INFINITY ? 0.0f : max), floor = splat(kScoreFloor);
  VecF sum[2]{}, sum_sq[2]{}, weighted[2]{};
  each_vector(values, count, skip, [&](VecF x, int k) __attribute__((always_inline)) {
    const VecF shifted = max_or_second(floor, x - shift);
    const VecF e = exp_in_range(shifted);
    sum[k] += e;
    sum_sq[k] += e * e;
    weighted[k] += shifted * e;
  });
  return {max, reduce_sum(sum[0] + sum[1]), reduce_sum(sum_sq[0] + sum_sq[1]),
          reduce_sum(weighted[0] + weighted[1])};
}

// The state of a row's classes other than `target`.
template <class T>
ScoreState<double> row_state(const T* logits, int64_t classes, int64_t target) {
  ScoreState<double> state;
  for (int64_t begin = 0; begin < classes; begin += kTile) {
    const int64_t count = classes - begin < kTile ? classes - begin : kTile;
    const ScoreState<float> tile = tile_state(logits + begin, count, target - begin);
    const ScoreState<double> wide{tile.max, tile.sum, tile.sum_sq, tile.weighted};
    state = begin == 0 ? wide : merge(state, wide);
  }
  return state;
}

// out[i] = scale * exp((x_i - base) - offset): one run of classes of a row's gradient.
template <class T>
void scaled_probabilities(const T* x, int64_t count, ProbabilityBase<float> p, float scale,
                          T* out) {
  const VecF base = splat(p.base), offset = splat(p.offset), floor = splat(kScoreFloor);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VecF log_p = (load(x + i) - base) - offset;
    const VecF e = exp_in_range(max_or_second(floor, log_p));
    store(out + i, (log_p < floor ? VecF{} : e) * scale);
  }
  for (; i < count; ++i) {
    const float log_p = (to_float(x[i]) - p.base) - p.offset;
    const VecF e = exp_in_range(max_or_second(floor, splat(log_p)));
    out[i] = from_float<T>((log_p < kScoreFloor ? 0.0f : e[0]) * scale);
  }
}

}  // namespace

template <class T>
void sample_scores_rows(const ScoresArguments<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = rows.target[row];
    if (target == rows.ignore_index) {
      rows.loss[row] = rows.grad_norm[row] = rows.entropy[row] = rows.lse[row] = 0;
      continue;
    }
    const T* logits = rows.logits + row * rows.row_stride;
    const RowScores scores =
        finish_scores(row_state(logits, rows.classes, target), to_float(logits[target]));
    rows.loss[row] = static_cast<float>(scores.loss);
    rows.grad_norm[row] = static_cast<float>(scores.grad_norm);
    rows.entropy[row] = static_cast<float>(scores.entropy);
    rows.lse[row] = static_cast<float>(scores.lse);
  }
}

template <class T>
void sample_scores_backward_rows(const ScoresBackwardArguments<T>& rows, int64_t begin,
                                 int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* grad = rows.grad_logits + row * rows.classes;
    const int64_t target = rows.target[row];
    if (target == rows.ignore_index) {
      for (int64_t j = 0; j < rows.classes; ++j) grad[j] = from_float<T>(0.0f);
      continue;
    }
    const T* logits = rows.logits + row * rows.row_stride;
    const float loss = rows.loss[row], scale = rows.grad_loss[row];
    const auto base = probability_base(to_float(logits[target]), loss, rows.lse[row]);
    scaled_probabilities(logits, rows.classes, base, scale, grad);
    // p_y - 1 without the cancellation: p_y = exp(-loss).
    grad[target] = from_float<T>(scale * expm1f(-loss));
  }
}

#define FASTSEL_INSTANTIATE(T)                                                      \
  template void sample_scores_rows<T>(const ScoresArguments<T>&, int64_t, int64_t); \
  template void sample_scores_backward_rows<T>(const ScoresBackwardArguments<T>&, int64_t, int64_t);

FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)

}  // namespace fastsel::cpu::FASTSEL_ISA
