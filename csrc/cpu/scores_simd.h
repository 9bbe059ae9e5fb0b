// The vectorised part of sample_scores, one build an instruction set. See core/scores.h for the
// arithmetic.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/scores_arguments.h"

namespace fastsel::cpu {

#define FASTSEL_DECLARE_SCORES(ISA)                                                       \
  namespace ISA {                                                                         \
  template <class T>                                                                      \
  void sample_scores_rows(const ScoresArguments<T>& rows, int64_t begin, int64_t end);    \
  template <class T>                                                                      \
  void sample_scores_backward_rows(const ScoresBackwardArguments<T>& rows, int64_t begin, \
                                   int64_t end);                                          \
  }

FASTSEL_DECLARE_SCORES(baseline)
FASTSEL_DECLARE_SCORES(avx2)
FASTSEL_DECLARE_SCORES(avx512)
#undef FASTSEL_DECLARE_SCORES

}  // namespace fastsel::cpu
