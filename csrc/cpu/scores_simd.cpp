// sample_scores over a range of rows, for the instruction set this file is compiled for.
//
// A row is read from memory once, a tile at a time, into a buffer that stays in the first-level
// cache; there the tile's maximum is found and then the three sums relative to it. Tiles are merged
// in double, so a row of 262,144 classes sums as exactly as a short one. In the buffer the target
// and the padding up to whole vectors stand at -inf, where a class weighs less than 2e-38 of the
// sum: the loops need neither a tail nor a case for the target.

#include "cpu/scores_simd.h"

#include "core/scores.h"
#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

constexpr int64_t kTile = 4096;  // 16 KB of float32: a third to a half of a first-level cache

// Copies a tile into `buffer` as float32, with `skip` (a position, if inside the tile) and the
// padding at -inf. Returns the padded length.
template <class T>
int64_t fill_tile(const T* values, int64_t count, int64_t skip, float* buffer) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(buffer + i, load(values + i));
  for (; i < count; ++i) buffer[i] = to_float(values[i]);
  if (skip >= 0 && skip < count) buffer[skip] = -INFINITY;
  for (; i % kLanes != 0; ++i) buffer[i] = -INFINITY;
  return i;
}

float tile_max(const float* values, int64_t count) {
  VecF running = load(values);
  for (int64_t i = kLanes; i < count; i += kLanes)
    running = max_or_second(load(values + i), running);
  return reduce_max(running);
}

// The state of one tile in float32, whose maximum is its own.
ScoreState<float> tile_state(const float* values, int64_t count) {
  const float max = tile_max(values, count);
  const VecF shift = splat(max == -INFINITY ? 0.0f : max), floor = splat(kScoreFloor);
  VecF sum{}, sum_sq{}, weighted{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF shifted = max_or_second(floor, load(values + i) - shift);
    const VecF e = exp_in_range(shifted);
    sum += e;
    sum_sq += e * e;
    weighted += shifted * e;
  }
  return {max, reduce_sum(sum), reduce_sum(sum_sq), reduce_sum(weighted)};
}

// The state of a row's classes other than `target`.
template <class T>
ScoreState<double> row_state(const T* logits, int64_t classes, int64_t target) {
  alignas(64) float buffer[kTile];
  ScoreState<double> state;
  for (int64_t begin = 0; begin < classes; begin += kTile) {
    const int64_t count = classes - begin < kTile ? classes - begin : kTile;
    const ScoreState<float> tile =
        tile_state(buffer, fill_tile(logits + begin, count, target - begin, buffer));
    state = merge(state, ScoreState<double>{tile.max, tile.sum, tile.sum_sq, tile.weighted});
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
void sample_scores_rows(const ScoreRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = rows.target[row];
    if (target == rows.ignore_index) {
      rows.loss[row] = rows.grad_norm[row] = rows.entropy[row] = rows.lse[row] = 0;
      continue;
    }
    const T* logits = rows.logits + row * rows.row_stride;
    const RowScores<double> scores =
        finish_scores(row_state(logits, rows.classes, target), to_float(logits[target]));
    rows.loss[row] = static_cast<float>(scores.loss);
    rows.grad_norm[row] = static_cast<float>(scores.grad_norm);
    rows.entropy[row] = static_cast<float>(scores.entropy);
    rows.lse[row] = static_cast<float>(scores.lse);
  }
}

template <class T>
void sample_scores_backward_rows(const ScoreGradRows<T>& rows, int64_t begin, int64_t end) {
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

#define FASTSEL_INSTANTIATE(T)                                                \
  template void sample_scores_rows<T>(const ScoreRows<T>&, int64_t, int64_t); \
  template void sample_scores_backward_rows<T>(const ScoreGradRows<T>&, int64_t, int64_t);

FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)

}  // namespace fastsel::cpu::FASTSEL_ISA
