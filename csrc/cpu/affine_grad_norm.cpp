// affine_grad_norm_sq and bias_grad_norm_sq on the CPU: checks, layouts, threads, and the choice of
// instruction set. The loops are in affine_grad_norm_simd.cpp.

#include "cpu/affine_grad_norm_simd.h"

#include <algorithm>
#include <optional>

#include "cpu/isa.h"
#include "cpu/sum_tiles.h"
#include "grad_norm.h"
#include "grad_norm_layout.h"

namespace fastsel::cpu {

namespace {

// float64, for checking: one plain loop, columns innermost.
void affine_tiles(const AffineArguments<double>& a, const ColumnTiles& t, bool, int64_t begin,
                  int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / t.tiles, first = i % t.tiles * t.width;
    const int64_t width = std::min(t.width, a.columns - first);
    const PositionStrides &of_x = a.normalized_strides, &of_y = a.grad_strides;
    const double* y = a.grad_outputs + sample * of_y.batch + first * of_y.column;
    const double* x =
        a.normalized ? a.normalized + sample * of_x.batch + first * of_x.column : nullptr;
    double sums[kWidestTile] = {};
    for (int64_t p = 0; p < a.positions; ++p) {
      for (int64_t j = 0; j < width; ++j) {
        const double grad = y[p * of_y.position + j * of_y.column];
        sums[j] += x ? x[p * of_x.position + j * of_x.column] * grad : grad;
      }
    }
    t.squares[i] = 0;
    for (int64_t j = 0; j < width; ++j) t.squares[i] += sums[j] * sums[j];
  }
}

template <class T>
void affine_tiles(const AffineArguments<T>& a, const ColumnTiles& t, bool along_positions,
                  int64_t begin, int64_t end) {
  FASTSEL_DISPATCH_ISA(affine_tiles<T>, a, t, along_positions, begin, end);
}

Tensor column_norms(const char* op, const char* argument, const std::optional<Tensor>& normalized,
                    const Tensor& grad_outputs) {
  const AffineLayout layout = affine_layout(normalized, grad_outputs);
  const Tensor norms = empty_norms(grad_outputs);
  dispatch_floating_and_double(op, argument, grad_outputs.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto a = affine_arguments<T>(layout);
    sum_tiles(a, layout.along_positions ? 1 : kNarrowestTile, mutable_data<NormType<T>>(norms),
              [&](const ColumnTiles& t, int64_t begin, int64_t end) {
                affine_tiles(a, t, layout.along_positions, begin, end);
              });
  });
  return norms;
}

}  // namespace

Tensor affine_grad_norm_sq_cpu(const Tensor& normalized,      // [B, T..., D]
                               const Tensor& grad_outputs) {  // [B, T..., D]
  check_affine_arguments("affine_grad_norm_sq", normalized, grad_outputs);
  return column_norms("affine_grad_norm_sq", "normalized", normalized, grad_outputs);
}

Tensor bias_grad_norm_sq_cpu(const Tensor& grad_outputs) {  // [B, T..., p]
  check_bias_arguments("bias_grad_norm_sq", grad_outputs);
  return column_norms("bias_grad_norm_sq", "grad_outputs", std::nullopt, grad_outputs);
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("affine_grad_norm_sq", TORCH_BOX(&fastsel::cpu::affine_grad_norm_sq_cpu));
  m.impl("bias_grad_norm_sq", TORCH_BOX(&fastsel::cpu::bias_grad_norm_sq_cpu));
}
