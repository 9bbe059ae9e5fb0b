// What adaselection_ works on, the same for the CPU's loops and the GPU's kernels.
#pragma once

#include <cstdint>

#include "core/adaselection.h"
#include "core/scores_arguments.h"

namespace fastsel {

// One decision. The inputs that no method of the decision needs are null.
template <class T>
struct AdaSelectionArguments {
  const T* losses;            // [B]
  const T* grad_norms;        // [B]
  const T* reference_losses;  // [B]
  const T* statistics;        // [S, B], rows statistics_stride apart, unit stride along B
  int64_t statistics_stride;  // in elements
  int64_t batch;              // B
  int64_t k;                  // 0 <= k <= B
  int method_count;           // M
  int methods[kMaxMethods];   // [M], each a Method or kFirstStatistic + a row of statistics
  double beta;
  double curriculum_power;
  bool standardize;
  float* method_weights;  // [M]
  float* method_losses;   // [M]
  int64_t* step;          // [1]
  int64_t* excluded;      // [1], may be null
  int64_t* indices;       // [k]
  ScoreType<T>* scores;   // [B]
};

}  // namespace fastsel
