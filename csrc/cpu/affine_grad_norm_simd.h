// The vectorised part of affine_grad_norm_sq and bias_grad_norm_sq, one build an instruction set.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/grad_norm_arguments.h"
#include "cpu/column_tiles.h"

namespace fastsel::cpu {

#define FASTSEL_DECLARE_AFFINE_GRAD_NORM(ISA)                                                \
  namespace ISA {                                                                            \
  template <class T>                                                                         \
  void affine_tiles(const AffineArguments<T>& a, const ColumnTiles& t, bool along_positions, \
                    int64_t begin, int64_t end);                                             \
  }

FASTSEL_DECLARE_AFFINE_GRAD_NORM(baseline)
FASTSEL_DECLARE_AFFINE_GRAD_NORM(avx2)
FASTSEL_DECLARE_AFFINE_GRAD_NORM(avx512)
#undef FASTSEL_DECLARE_AFFINE_GRAD_NORM

}  // namespace fastsel::cpu
