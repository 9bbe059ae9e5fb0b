// Argument checks and outputs of the per-sample gradient norms, the same for every backend.
//
// All of them take the batch first and give [B]: the squared L2 norm of each sample's gradient of
// one parameter, float32 (float64 where the inputs are).
#pragma once

#include <string_view>

#include "core/conv_geometry.h"
#include "torch_api.h"

namespace fastsel {

// How a squared norm ||A^T G||^2 is computed: the product itself, or the two Gram matrices
// <A A^T, G G^T>; automatic takes whichever costs less.
enum class NormForm { automatic, direct, gram };

inline NormForm norm_form(const char* op, std::string_view form) {
  if (form == "auto") return NormForm::automatic;
  if (form == "direct") return NormForm::direct;
  if (form == "gram") return NormForm::gram;
  throw std::runtime_error(message(op, ": form must be auto, direct or gram, got ", form));
}

inline Tensor empty_norms(const Tensor& like) {
  return empty({like.size(0)},
               like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
               like);
}

// Two tensors [B, T..., *] that agree in all but the last dimension, in dtype and device.
inline void check_paired(const char* op, const char* first_name, const Tensor& first,
                         const Tensor& grad_outputs) {
  FASTSEL_CHECK(first.dim() >= 2, op, ": ", first_name,
                " must have the batch first and at least two dimensions, got ", shape(first));
  bool agree = grad_outputs.dim() == first.dim();
  for (int64_t i = 0; agree && i + 1 < first.dim(); ++i)
    agree = first.size(i) == grad_outputs.size(i);
  FASTSEL_CHECK(agree, op, ": grad_outputs must agree with ", first_name, " ", shape(first),
                " in all but the last dimension, got ", shape(grad_outputs));
  FASTSEL_CHECK(first.scalar_type() == grad_outputs.scalar_type(), op,
                ": grad_outputs must have the dtype of ", first_name, ", ",
                dtype_name(first.scalar_type()), ", got ", dtype_name(grad_outputs.scalar_type()));
  FASTSEL_CHECK(same_device(first, grad_outputs), op, ": ", first_name,
                " and grad_outputs must be on one device");
}

inline void check_linear_arguments(const char* op, const Tensor& activations,
                                   const Tensor& grad_outputs) {
  check_paired(op, "activations", activations, grad_outputs);
}

inline void check_affine_arguments(const char* op, const Tensor& normalized,
                                   const Tensor& grad_outputs) {
  check_paired(op, "normalized", normalized, grad_outputs);
  FASTSEL_CHECK(normalized.size(normalized.dim() - 1) == grad_outputs.size(grad_outputs.dim() - 1),
                op, ": grad_outputs must have the shape of normalized, ", shape(normalized),
                ", got ", shape(grad_outputs));
}

inline void check_bias_arguments(const char* op, const Tensor& grad_outputs) {
  FASTSEL_CHECK(grad_outputs.dim() >= 2, op,
                ": grad_outputs must have the batch first and at least two dimensions, got ",
                shape(grad_outputs));
}

inline void check_embedding_arguments(const char* op, const Tensor& indices,
                                      const Tensor& grad_outputs) {
  FASTSEL_CHECK(indices.dim() >= 1, op, ": indices must be [B, T...], got ", shape(indices));
  FASTSEL_CHECK(
      indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int, op,
      ": indices must be int64 or int32, got ", dtype_name(indices.scalar_type()));
  bool agree = grad_outputs.dim() == indices.dim() + 1;
  for (int64_t i = 0; agree && i < indices.dim(); ++i)
    agree = indices.size(i) == grad_outputs.size(i);
  FASTSEL_CHECK(agree, op, ": grad_outputs must be [B, T..., D] for indices ", shape(indices),
                ", got ", shape(grad_outputs));
  FASTSEL_CHECK(same_device(indices, grad_outputs), op,
                ": indices and grad_outputs must be on one device");
}

// The geometry of a convolution of one to three spatial dimensions, given as three: dimensions that
// are not there have size 1.
inline ConvGeometry conv_geometry(const char* op, const Tensor& input, const Tensor& grad_outputs,
                                  const std::vector<int64_t>& kernel_size,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t dims = input.dim() - 2;
  FASTSEL_CHECK(dims >= 1 && dims <= 3, op,
                ": input must be [B, C, L], [B, C, H, W] or [B, C, D, H, W], got ", shape(input));
  FASTSEL_CHECK(grad_outputs.dim() == input.dim() && grad_outputs.size(0) == input.size(0), op,
                ": grad_outputs must have the batch size and the number of dimensions of input ",
                shape(input), ", got ", shape(grad_outputs));
  FASTSEL_CHECK(input.scalar_type() == grad_outputs.scalar_type(), op,
                ": grad_outputs must have the dtype of input, ", dtype_name(input.scalar_type()),
                ", got ", dtype_name(grad_outputs.scalar_type()));
  FASTSEL_CHECK(same_device(input, grad_outputs), op,
                ": input and grad_outputs must be on one device");
  FASTSEL_CHECK(groups >= 1 && input.size(1) % groups == 0 && grad_outputs.size(1) % groups == 0,
                op, ": groups must divide the ", input.size(1), " channels of input and the ",
                grad_outputs.size(1), " of grad_outputs, got ", groups);
  const struct {
    const char* name;
    const std::vector<int64_t>& values;
    int64_t least;
  } lists[] = {{"kernel_size", kernel_size, 1},
               {"stride", stride, 1},
               {"padding", padding, 0},
               {"dilation", dilation, 1}};
  for (const auto& list : lists) {
    bool good = static_cast<int64_t>(list.values.size()) == dims;
    for (const int64_t value : list.values) good = good && value >= list.least;
    FASTSEL_CHECK(good, op, ": ", list.name, " must be ", dims, " integers of at least ",
                  list.least);
  }
  ConvGeometry g;
  g.batch = input.size(0);
  g.groups = groups;
  g.in_channels = input.size(1) / groups;
  g.out_channels = grad_outputs.size(1) / groups;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t axis = 3 - dims + i;
    g.in[axis] = input.size(2 + i);
    g.out[axis] = grad_outputs.size(2 + i);
    g.kernel[axis] = kernel_size[i];
    g.stride[axis] = stride[i];
    g.padding[axis] = padding[i];
    g.dilation[axis] = dilation[i];
    const int64_t reach = g.in[axis] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    const int64_t expected = reach < 0 ? 0 : reach / stride[i] + 1;
    FASTSEL_CHECK(g.out[axis] == expected, op, ": grad_outputs must have ", expected,
                  " positions along spatial dimension ", i, " of input ", shape(input), ", got ",
                  shape(grad_outputs));
  }
  return g;
}

}  // namespace fastsel
