// How the samples of a batch score in adaselection_ on the CPU: in float32, vectorised, and in
// double, for float64 losses and for magnitudes that float32 sums could not hold.
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/adaselection.h"

namespace fastsel::cpu {

// Samples that all take part: everything is finite. At least one.
template <class Real>
struct AdaSelectionBatch {
  int64_t size;        // n
  const Real* losses;  // [n]
  // What else each method reads: gradient norms, reference losses, a row of statistics, or nothing.
  const Real* inputs[kMaxMethods];  // [n] each
};

// The methods, how they are weighed, and what is carried from step to step.
struct AdaSelectionMethods {
  int count;
  const int* codes;  // [count]
  double beta;
  double curriculum_power;
  bool standardize;
  float* weights;  // [count]
  float* losses;   // [count]
  int64_t* step;

  bool is(int m, Method method) const { return codes[m] == static_cast<int>(method); }

  double reward_factor(double mean_magnitude) const {
    return fastsel::reward_factor(mean_magnitude, *step, curriculum_power);
  }

  // Takes the step, given the methods' losses in it.
  void advance(const double* current) const {
    update_method_weights(count, *step == 0, beta, current, losses, weights);
    for (int m = 0; m < count; ++m) {
      const double bounded = current[m] < FLT_MAX ? current[m] : FLT_MAX;
      losses[m] = static_cast<float>(bounded > -FLT_MAX ? bounded : -FLT_MAX);
    }
    ++*step;
  }
};

// The scores, with the methods' state advanced; or, before anything is changed, why not.
enum class Scored { done, not_finite, too_extreme };
Scored score_samples(const AdaSelectionBatch<float>& batch, const AdaSelectionMethods& methods,
                     float* scores);  // [n]

// The same in double, for any finite numbers.
void score_samples(const AdaSelectionBatch<double>& batch, const AdaSelectionMethods& methods,
                   double* scores);  // [n]

}  // namespace fastsel::cpu
