// The vectorised parts of weighted_sample, one build an instruction set.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastsel::cpu {

// How many weights one call of filter_weights may see, and how much longer than that its outputs
// must be.
constexpr int64_t kWeightBlock = 4096;
constexpr int64_t kWeightSlack = 16;

// How many weights a sum of sum_weights is of.
constexpr int64_t kWeightTile = 128;

// The items of a block whose key may be below a threshold.
struct WeightCandidates {
  uint32_t* words;    // of the random generator
  uint32_t* offsets;  // in the block, ascending
  int64_t count;
  bool invalid;  // there is a negative, NaN or infinite weight in the block
};

#define FASTSEL_DECLARE_WEIGHTED_SAMPLE(ISA)                                           \
  namespace ISA {                                                                      \
  template <class T>                                                                   \
  void filter_weights(const T* weights, int64_t count, int64_t first, uint64_t seed,   \
                      uint64_t stream, float threshold, WeightCandidates* candidates); \
  template <class T>                                                                   \
  void sum_weights(const T* weights, int64_t count, double* sums, bool* invalid);      \
  }

// filter_weights passes over `count` weights, of which the first is item `first` of its row, a
// multiple of 4. `threshold` is E / w: every item whose quotient is at most that is kept, and few
// others; none of weight zero. sum_weights writes the sum of every kWeightTile weights.
FASTSEL_DECLARE_WEIGHTED_SAMPLE(baseline)
FASTSEL_DECLARE_WEIGHTED_SAMPLE(avx2)
FASTSEL_DECLARE_WEIGHTED_SAMPLE(avx512)
#undef FASTSEL_DECLARE_WEIGHTED_SAMPLE

}  // namespace fastsel::cpu
