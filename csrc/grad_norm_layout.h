// [B, T..., D] tensors of any strides as [B, T, D] ones: how the per-sample gradient norms read what
// a model hands them without copying it.
//
// A normalisation over channels gives [B, S, C] views of memory that is [B, C, S], so either of the
// last two dimensions may be the one that lies side by side.
#pragma once

#include <optional>
#include <utility>

#include "core/grad_norm_arguments.h"
#include "torch_api.h"

namespace fastsel {

// The strides of a tensor [B, T..., D] seen as [B, T, D]; nothing where the middle dimensions are
// not one run of equal steps. A dimension of size 1 has no stride to speak of, and gets 0: a number
// that torch left there must not decide about alignment.
inline std::optional<PositionStrides> merged_strides(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const auto stride = [&](int64_t d) { return tensor.size(d) > 1 ? tensor.stride(d) : 0; };
  PositionStrides strides{stride(0), 0, stride(last)};
  int64_t run = 1;  // positions merged so far
  for (int64_t d = last - 1; d > 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (run == 1) {
      strides.position = tensor.stride(d);
    } else if (tensor.stride(d) != strides.position * run) {
      return std::nullopt;
    }
    run *= tensor.size(d);
  }
  return strides;
}

inline int64_t position_count(const Tensor& tensor) {
  int64_t positions = 1;
  for (int64_t d = 1; d + 1 < tensor.dim(); ++d) positions *= tensor.size(d);
  return positions;
}

inline bool columns_side_by_side(const Tensor& tensor) {
  const auto strides = merged_strides(tensor);
  return strides && (strides->column == 1 || tensor.size(-1) <= 1);
}

inline bool positions_side_by_side(const Tensor& tensor) {
  const auto strides = merged_strides(tensor);
  return strides && (strides->position == 1 || position_count(tensor) <= 1);
}

// One or two tensors of one shape, in one of the layouts that kernels read: all with their columns
// side by side, or all with their positions. Only what has neither, or another than its partner, is
// copied.
struct AffineLayout {
  std::optional<Tensor> normalized;
  Tensor grad_outputs;
  bool along_positions;  // positions lie side by side
};

inline AffineLayout affine_layout(const std::optional<Tensor>& normalized,
                                  const Tensor& grad_outputs) {
  // One column is a run of positions, one position a run of columns.
  const bool one_column = grad_outputs.size(-1) <= 1;
  const bool along_positions = positions_side_by_side(grad_outputs) &&
                               (one_column || !columns_side_by_side(grad_outputs)) &&
                               (!normalized || positions_side_by_side(*normalized));
  if (along_positions) return {normalized, grad_outputs, true};
  const auto with_columns = [](const Tensor& tensor) {
    return columns_side_by_side(tensor) ? tensor : torch::stable::contiguous(tensor);
  };
  if (!normalized) return {normalized, with_columns(grad_outputs), false};
  return {with_columns(*normalized), with_columns(grad_outputs), false};
}

template <class T>
AffineArguments<T> affine_arguments(const AffineLayout& layout) {
  const Tensor& grads = layout.grad_outputs;
  const PositionStrides none{0, 0, 0};
  return {layout.normalized ? data<T>(*layout.normalized) : nullptr,
          data<T>(grads),
          grads.size(0),
          position_count(grads),
          grads.size(-1),
          layout.normalized ? merged_strides(*layout.normalized).value_or(none) : none,
          merged_strides(grads).value_or(none)};
}

// grad_outputs of an embedding as its kernels want them: every position's row in one piece.
inline Tensor with_rows(const Tensor& grad_outputs) {
  return columns_side_by_side(grad_outputs) ? grad_outputs
                                            : torch::stable::contiguous(grad_outputs);
}

template <class T>
EmbeddingArguments<T> embedding_arguments(const Tensor& grad_outputs) {
  return {data<T>(grad_outputs), grad_outputs.size(0), position_count(grad_outputs),
          grad_outputs.size(-1), merged_strides(grad_outputs).value_or(PositionStrides{0, 0, 0})};
}

}  // namespace fastsel
