// The arithmetic of AdaSelection, shared by host and device: what each method makes of a sample, how
// the methods' weights move, and what a sample scores.
//
// Minghe Zhang et al., "AdaSelection: Accelerating Deep Learning Training through Data Subsampling",
// sections 3.1 and 3.2, equations 1 to 6. The formulas of the published text are read as
// docs/adaselection.md explains.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace fastsel {

// The codes of the schema's `methods`; codes from kFirstStatistic on are rows of `statistics`.
enum class Method : int {
  uniform = 0,
  big_loss = 1,
  small_loss = 2,
  grad_norm = 3,
  adaboost = 4,
  coreset1 = 5,
  coreset2 = 6,
  rho_loss = 7,
};
inline constexpr int kFirstStatistic = 8;
inline constexpr int kMaxMethods = 16;

// A statistic whose standard deviation is at most this share of its largest magnitude is constant up
// to float32's rounding, and all samples are alike to it.
inline constexpr double kNoSpread = 0x1p-22;

// No weight falls below this: from 0 a method could never come back.
inline constexpr double kSmallestWeight = FLT_MIN;

// A reward's exponent stays below this, so that scores stay finite where losses are negative.
inline constexpr double kLargestRewardExponent = 80;

// Equation 1, on losses scaled into (-1, 1): 1/2 ln((1 + x) / (1 - x)) with x = loss / (1.0001 *
// largest), where `largest` is the largest magnitude of a loss. Written so that 1 - x does not
// cancel for the largest losses.
template <class Real>
FASTSEL_HD Real adaboost_ratio(Real loss, Real largest) {
  if (largest == 0) return Real(1);
  const Real margin = Real(1e-4) * largest;
  return ((largest + loss) + margin) / ((largest - loss) + margin);
}

// How far the rank of a sample lies from the middle of n: large at both ends.
FASTSEL_HD double coreset1_statistic(int64_t rank, int64_t n) {
  const double middle = 0.5 * static_cast<double>(n - 1);
  return fabs(static_cast<double>(rank) - middle);
}

// What the statistic, less its largest value, is divided by: infinity where it is constant, for a
// softmax of rounding errors would choose by them.
FASTSEL_HD double spread_divisor(double std, double largest_magnitude, bool standardize) {
  if (!standardize) return 1;
  return std > kNoSpread * largest_magnitude ? std : static_cast<double>(INFINITY);
}

// Equation 3 in parts, for one thread a method. First the exponent of a method's growth: how far its
// loss moved in a step, relative to what it was.
FASTSEL_HD double weight_exponent(double current, float previous, double beta, bool first) {
  const double before = static_cast<double>(previous), size = fabs(before);
  const double change = fabs(current - before);
  return first ? 0 : beta * (change / (size > FLT_MIN ? size : double{FLT_MIN}));
}

// Then the weight grown, all methods' alike divided by the growth of the largest exponent.
FASTSEL_HD double grown_weight(float weight, double exponent, double largest_exponent) {
  const double grown = static_cast<double>(weight) * exp(exponent - largest_exponent);
  return grown > kSmallestWeight ? grown : kSmallestWeight;
}

// Last, the weights' sum made 1.
FASTSEL_HD float normalized_weight(double grown, double sum) {
  const double weight = grown / sum;
  return static_cast<float>(weight > kSmallestWeight ? weight : kSmallestWeight);
}

// Equation 3: the methods' weights after a step in which their losses went from `previous` to
// `current`. On the first step they stay as they are, normalised.
FASTSEL_HD void update_method_weights(int count, bool first, double beta, const double* current,
                                      const float* previous, float* weights) {
  double exponent[kMaxMethods], largest = -DBL_MAX, sum = 0;
  for (int m = 0; m < count; ++m) {
    exponent[m] = weight_exponent(current[m], previous[m], beta, first);
    largest = exponent[m] > largest ? exponent[m] : largest;
  }
  double grown[kMaxMethods];
  for (int m = 0; m < count; ++m) {
    grown[m] = grown_weight(weights[m], exponent[m], largest);
    sum += grown[m];
  }
  for (int m = 0; m < count; ++m) weights[m] = normalized_weight(grown[m], sum);
}

// What a loss is multiplied by to give the exponent of its reward (equation 4): -1 / (mean loss *
// t^power), t = step + 1; 0, which leaves the reward out, where the power is infinite or all losses
// are 0. The mean is that of the magnitudes, which is the mean loss wherever no loss is negative.
FASTSEL_HD double reward_factor(double mean_magnitude, int64_t step, double power) {
  if (mean_magnitude == 0 || fabs(power) > DBL_MAX) return 0;
  return -1 / (mean_magnitude * pow(static_cast<double>(step + 1), power));
}

}  // namespace fastsel
