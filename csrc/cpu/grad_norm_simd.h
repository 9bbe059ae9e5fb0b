// The vectorised parts of the per-sample gradient norms of linear layers and convolutions, one build
// an instruction set. docs/grad_norms.md says why they look as they do.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastsel::cpu {

// Output channels that are worked on together lie in the lanes of the products: at most a panel, four
// vectors of AVX-512, and always a multiple of kNormLanes, as of any vector's lanes.
constexpr int64_t kNormPanel = 64;
constexpr int64_t kNormLanes = 16;

// Where a sample's operand A [T, d] lies. Position (line, c) of column j is
// columns[j] + lines[line] + c * step: rows of a linear layer, shifted windows of an image.
struct NormOperand {
  const float* const* columns;  // [d] where a column's first position lies
  int64_t column_count;         // d
  const int64_t* lines;         // [line_count] offsets
  int64_t line_count;
  int64_t line_length;  // positions a line
  int64_t step;         // between the positions of a line
};

// What a product A^T G of one sample adds to; null pointers where it is not wanted.
struct NormSums {
  float* product;     // [d, width]: the product so far, where positions come in several calls
  bool first, last;   // of those calls
  float* weight_sum;  // [d, width]: summed over samples
  double* norm_sq;    // one value: grows by the square sum of the finished product
};

#define FASTSEL_DECLARE_GRAD_NORM(ISA)                                                             \
  namespace ISA {                                                                                  \
  void panel_product(const NormOperand& a, const float* g, int64_t g_step, int64_t width,          \
                     const NormSums& sums);                                                        \
  void lane_product(const NormOperand& a, const float* g, float* product);                         \
  template <class T>                                                                               \
  void pack_rows(const T* source, int64_t positions, int64_t stride, int64_t count, int64_t width, \
                 float* packed, float* column_sums);                                               \
  template <class T>                                                                               \
  void pack_columns(const T* source, int64_t positions, int64_t stride, int64_t count,             \
                    int64_t width, float* packed, float* column_sums);                             \
  void unpack_sum(const float* panels, int64_t panel_count, int64_t panel_step, int64_t columns,   \
                  int64_t width, int64_t count, float* weight, int64_t weight_stride);             \
  template <class T>                                                                               \
  void copy_rows(const T* source, int64_t positions, int64_t stride, int64_t count, int64_t step,  \
                 float* copied);                                                                   \
  template <class T>                                                                               \
  void square_sum(const T* values, int64_t count, double* sum);                                    \
  void dot(const float* x, const float* y, int64_t count, double* sum, double* magnitude);         \
  }

// panel_product    A^T G for one panel of output channels, g [T, width] with rows g_step apart.
// lane_product     for groups in the lanes: adds a's element times g's of the same lane, position by
//                  position, to product [d, kNormLanes]; a's elements and g [T] are kNormLanes wide.
// pack_rows        the panel's columns of G from rows that lie along the channels: source [T, count],
//                  rows `stride` apart, to packed [T, width], zeros beyond count.
// pack_columns     the same from source [count, T], where a channel's positions lie side by side.
//                  Both add each column's sum to column_sums [width] unless that is null.
// copy_rows        source [T, count], rows `stride` apart, to float32 with rows `step` apart.
// unpack_sum       the sum of panel_count buffers [columns, width], panel_step apart, transposed to
//                  weight [count, columns] with rows weight_stride apart.
// square_sum       adds the sum of squares to sum.
// dot              adds the sum of x * y to sum, and that of |x * y| to magnitude.
FASTSEL_DECLARE_GRAD_NORM(baseline)
FASTSEL_DECLARE_GRAD_NORM(avx2)
FASTSEL_DECLARE_GRAD_NORM(avx512)
#undef FASTSEL_DECLARE_GRAD_NORM

}  // namespace fastsel::cpu
