// What the per-sample norms of embeddings, normalisations and biases work on, the same for the CPU's
// loops and the GPU's kernels.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastsel {

// Norms of float64 gradients are float64, of all others float32.
template <class T>
using NormType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where the elements of a [B, T, D] tensor lie, in elements.
struct PositionStrides {
  int64_t batch, position, column;
};

template <class T>
struct AffineArguments {
  const T* normalized;    // [B, T, D], or null: the norm of a bias
  const T* grad_outputs;  // [B, T, D]
  int64_t batch;          // B
  int64_t positions;      // T, all middle dimensions
  int64_t columns;        // D
  PositionStrides normalized_strides;
  PositionStrides grad_strides;
};

template <class T>
struct EmbeddingArguments {
  const T* grad_outputs;  // [B, T, D], unit stride along the columns
  int64_t batch;          // B
  int64_t positions;      // T, all middle dimensions
  int64_t columns;        // D
  PositionStrides grad_strides;
};

}  // namespace fastsel
