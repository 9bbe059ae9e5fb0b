// The vectorised part of sample_scores, one build an instruction set. See core/scores.h for the
// arithmetic.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastsel::cpu {

// One call's arguments. `logits` and `grad_logits` are row-major with unit column stride.
template <class T>
struct ScoreRows {
  const T* logits;        // [B, C], rows row_stride apart
  const int64_t* target;  // [B]
  int64_t classes;        // C
  int64_t row_stride;     // in elements
  int64_t ignore_index;
  float* loss;  // [B], likewise the next three
  float* grad_norm;
  float* entropy;
  float* lse;
};

template <class T>
struct ScoreGradRows {
  const float* grad_loss;  // [B]
  const T* logits;         // [B, C], rows row_stride apart
  const int64_t* target;   // [B]
  const float* loss;       // [B]
  const float* lse;        // [B]
  int64_t classes;         // C
  int64_t row_stride;      // in elements
  int64_t ignore_index;
  T* grad_logits;  // [B, C], contiguous
};

#define FASTSEL_DECLARE_SCORES(ISA)                                                           \
  namespace ISA {                                                                             \
  template <class T>                                                                          \
  void sample_scores_rows(const ScoreRows<T>& rows, int64_t begin, int64_t end);              \
  template <class T>                                                                          \
  void sample_scores_backward_rows(const ScoreGradRows<T>& rows, int64_t begin, int64_t end); \
  }

FASTSEL_DECLARE_SCORES(baseline)
FASTSEL_DECLARE_SCORES(avx2)
FASTSEL_DECLARE_SCORES(avx512)
#undef FASTSEL_DECLARE_SCORES

}  // namespace fastsel::cpu
