// What sample_scores and its backward work on, the same for the CPU's loops and the GPU's kernels.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastsel {

// Scores of float64 logits are float64, of all others float32.
template <class T>
using ScoreType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct ScoresArguments {
  const T* logits;        // [B, C], rows row_stride apart, unit stride along the classes
  const int64_t* target;  // [B]
  int64_t rows;           // B
  int64_t classes;        // C
  int64_t row_stride;     // in elements
  int64_t ignore_index;
  ScoreType<T>* loss;  // [B], likewise the next three
  ScoreType<T>* grad_norm;
  ScoreType<T>* entropy;
  ScoreType<T>* lse;
};

template <class T>
struct ScoresBackwardArguments {
  const ScoreType<T>* grad_loss;  // [B]
  const T* logits;                // [B, C], rows row_stride apart, unit stride along the classes
  const int64_t* target;          // [B]
  const ScoreType<T>* loss;       // [B]
  const ScoreType<T>* lse;        // [B]
  int64_t rows;                   // B
  int64_t classes;                // C
  int64_t row_stride;             // in elements
  int64_t ignore_index;
  T* grad_logits;  // [B, C], contiguous
};

}  // namespace fastsel
