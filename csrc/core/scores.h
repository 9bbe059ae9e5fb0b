// Cross-entropy, gradient norm and entropy of one row of logits from one pass: the arithmetic,
// shared by CPU and GPU.
//
// With p = softmax(x) and target y, the row's scores are
//   loss      = -log p_y
//   grad_norm = ||p - onehot(y)||_2    a bound on the gradient norm through the last layer
//                                      (Katharopoulos and Fleuret, "Not All Samples Are Created
//                                      Equal", ICML'18, section 3.2; EL2N in Paul et al., NeurIPS'21)
//   entropy   = -sum_j p_j log p_j     in nats
//   lse       = log sum_j exp(x_j)
//
// The textbook forms need 1 - p_y, which cancels on well-learnt samples, the very ones that
// selection must rank: at a margin of 15 the float32 norm is wrong by 180 %. So the target stays
// out of the running sums. Over the classes j != y, relative to their own maximum m,
//   d = sum e_j,  q = sum e_j^2,  t = sum (x_j - m) e_j,   e_j = exp(x_j - m),
// and the log-odds against the target, s = (m - x_y) + log d, give everything without a subtraction
// of near-equal numbers:
//   loss = log1p(exp(s)),  1 - p_y = sigmoid(s),  grad_norm = (1 - p_y) sqrt(1 + q / d^2),
//   entropy = p_y loss + (1 - p_y) (-log(1 - p_y) + log d - t / d).
// Every term is positive and keeps its relative precision at any margin. Only the last bracket, the
// entropy among the other classes, is a difference; where one wrong class has nearly all the mass
// it is exact to about 1e-7 absolute.
#pragma once

#include <math.h>

#include "core/macros.h"

namespace fastsel {

// A class this far below the maximum of the others weighs exp(-87) < 2e-38 of the sum and is held
// there, so that a masked class (-inf) needs no case of its own: (x - m) * e stays finite.
constexpr float kScoreFloor = -87.0f;

// Running sums over the classes other than the target. Sums are held in Real, one state per thread
// or tile.
template <class Real>
struct ScoreState {
  Real max = -static_cast<Real>(INFINITY);
  Real sum = 0;       // d
  Real sum_sq = 0;    // q
  Real weighted = 0;  // t
};

struct RowScores {
  double loss, grad_norm, entropy, lse;
};

FASTSEL_HD float score_exp(float x) { return expf(x); }
FASTSEL_HD double score_exp(double x) { return exp(x); }

// The state of the union of two disjoint sets of classes.
template <class Real>
FASTSEL_HD ScoreState<Real> merge(ScoreState<Real> a, ScoreState<Real> b) {
  if (b.max > a.max) {
    const ScoreState<Real> swap = a;
    a = b;
    b = swap;
  }
  Real shift = b.max - a.max;
  if (!(shift > kScoreFloor)) shift = kScoreFloor;  // also where both are empty: -inf - -inf
  const Real scale = score_exp(shift);
  a.weighted += scale * (b.weighted + shift * b.sum);
  a.sum += scale * b.sum;
  a.sum_sq += scale * scale * b.sum_sq;
  return a;
}

// The scores of a row, in double: rounding s in float32 alone would cost 2e-6 of the norm at a
// margin of 40, and this runs once a row. Conventions for odd rows are torch's: a NaN or +inf
// logit, or nothing but -inf, gives NaN; a target at -inf gives an infinite loss.
template <class Real>
FASTSEL_HD RowScores finish_scores(const ScoreState<Real>& others, double target_logit) {
  const double m = others.max, d = others.sum, q = others.sum_sq, t = others.weighted;
  const bool none = m == -INFINITY;  // one class, or every other class masked
  if (d != d || !(target_logit < INFINITY) || (none && target_logit == -INFINITY)) {
    return {NAN, NAN, NAN, NAN};
  }
  if (none) return {0.0, 0.0, 0.0, target_logit};
  const double log_d = log(d);
  const double s = (m - target_logit) + log_d;
  const double e = exp(-fabs(s)), small = log1p(e);
  const double loss = (s > 0 ? s : 0) + small;          // -log p_y
  const double loss_others = (s < 0 ? -s : 0) + small;  // -log(1 - p_y)
  const double p_others = (s < 0 ? e : 1) / (1 + e), p_target = (s < 0 ? 1 : e) / (1 + e);
  RowScores scores;
  scores.loss = loss;
  scores.grad_norm = p_others * sqrt(1 + q / (d * d));
  const double entropy_among_others = log_d - t / d;
  scores.entropy = (p_target > 0 ? p_target * loss : 0) +
                   (p_others > 0 ? p_others * (loss_others + fmax(entropy_among_others, 0.0)) : 0);
  scores.lse = s > 0 ? (m + log_d) + small : target_logit + small;
  return scores;
}

// Where the gradient's probabilities come from: p_j = exp((x_j - base) - offset). Both (0, lse) and
// (x_y, loss) say the same; in float32 the one with the smaller offset loses less, so that logits
// of 1e4 keep probabilities exact to 1e-6, not 5e-4.
template <class Real>
struct ProbabilityBase {
  Real base, offset;
};

template <class Real>
FASTSEL_HD ProbabilityBase<Real> probability_base(Real target_logit, Real loss, Real lse) {
  if (loss <= (lse < 0 ? -lse : lse)) return {target_logit, loss};
  return {0, lse};
}

}  // namespace fastsel
