// The vectorised passes of adaselection_, one build an instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/adaselection.h"
#include "core/dtypes.h"

namespace fastsel::cpu {

// How to read a statistic s, up to its sign.
struct Statistic {
  enum class Form { value, difference, deviation };
  Form form = Form::value;
  const float* values = nullptr;     // [n]
  const float* reference = nullptr;  // [n], of a difference: values - reference
  float mean = 0, mean_low = 0;      // of a deviation: |values - mean|, the mean in two parts
};

// Of a statistic, in part or whole.
struct Moments {
  float min = INFINITY, max = -INFINITY;
  double sum = 0, sum_sq = 0;  // of s - shift and of its square
  bool finite = true;          // whether every value read was
};

// Of e_i = exp(factor * (s_i - anchor)), in part or whole.
struct SoftmaxSums {
  double sum = 0;            // of e
  double weighted_loss = 0;  // of e times the loss
};

// score_i = exp(min(80, reward_factor * loss_i)) * (constant + sum over t of shares[t] * terms[t][i])
struct Mixture {
  const float* losses;  // [n]
  float* scores;        // [n]
  float reward_factor;
  float constant;
  int count;
  const float* terms[kMaxMethods];  // [n] each
  float shares[kMaxMethods];
};

// The bits of losses, less those of the smallest, in digits from the last.
struct RankDigits {
  uint16_t* digits;  // [passes, stride]
  int64_t stride;    // n, rounded up to a multiple of 16
  int passes;
  int bits;      // a digit's
  uint32_t low;  // topk_key of the smallest loss
};

// All work on the samples [begin, end), where begin is a multiple of 16; what they write into
// scratch memory (`out`) may reach to the next multiple of 16 beyond the end.
#define FASTSEL_DECLARE_ADASELECTION(ISA)                                                          \
  namespace ISA {                                                                                  \
  template <class T>                                                                               \
  void widen(const T* values, int64_t begin, int64_t end, float* out);                             \
  void add_moments(const Statistic& s, int64_t begin, int64_t end, float shift, Moments& moments); \
  void add_magnitudes(const float* values, int64_t begin, int64_t end, double& sum);               \
  void adaboost_statistic(const float* losses, int64_t begin, int64_t end, float largest,          \
                          float* out);                                                             \
  void exponentials(const Statistic& s, const float* losses, int64_t begin, int64_t end,           \
                    float anchor, float factor, float* out, SoftmaxSums& sums);                    \
  void mix(const Mixture& mixture, int64_t begin, int64_t end);                                    \
  void coreset1_by_counting(const float* losses, int64_t n, float* out);                           \
  void rank_digits(const float* losses, int64_t n, const RankDigits& out);                         \
  }

FASTSEL_DECLARE_ADASELECTION(baseline)
FASTSEL_DECLARE_ADASELECTION(avx2)
FASTSEL_DECLARE_ADASELECTION(avx512)
#undef FASTSEL_DECLARE_ADASELECTION

}  // namespace fastsel::cpu
