// The squared norms of tiles of columns, for the instruction set this file is compiled for: each
// column's sum over the positions of normalized * grad_outputs (of grad_outputs, for a bias), then
// the sum of their squares.
//
// Where columns lie side by side, positions are read one after the other, in the order of memory, into
// sums that stay in the first-level cache. (Several at once spare the sums a few trips, and cost
// more than that in streams to prefetch.) Where positions do, each column is one product.

#include "cpu/affine_grad_norm_simd.h"

#include "cpu/double_sums.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

// sums[j] += x[j] * y[j], or y[j] where kWeighted is false; j in [0, width).
template <bool kWeighted, class T>
FASTSEL_HD void add_row(const T* x, const T* y, int64_t width,
                        double* sums) {  // [width], aligned to a vector
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    VecD &low = double_vector(sums + j), &high = double_vector(sums + j + kLanes / 2);
    const Doubles b = load_doubles(y + j);
    if constexpr (kWeighted) {
      const Doubles a = load_doubles(x + j);
      low += a.low * b.low;
      high += a.high * b.high;
    } else {
      low += b.low;
      high += b.high;
    }
  }
  for (; j < width; ++j) {
    const double b = to_float(y[j]);
    sums[j] += kWeighted ? static_cast<double>(to_float(x[j])) * b : b;
  }
}

// Columns side by side. x and y point at the tile's first column of the sample's first position.
template <bool kWeighted, class T>
FASTSEL_HD double tile_of_columns(const AffineArguments<T>& a, const T* x, const T* y,
                                  int64_t width) {
  alignas(kVectorBytes) double sums[kWidestTile];
  for (int64_t j = 0; j < width; ++j) sums[j] = 0;
  for (int64_t t = 0; t < a.positions; ++t) {
    add_row<kWeighted>(x, y, width, sums);
    if (kWeighted) x += a.normalized_strides.position;
    y += a.grad_strides.position;
  }
  return sum_of_squares(sums, width);
}

// Positions side by side.
template <bool kWeighted, class T>
FASTSEL_HD double tile_of_positions(const AffineArguments<T>& a, const T* x, const T* y,
                                    int64_t width) {
  double squares = 0;
  for (int64_t j = 0; j < width; ++j) {
    const T* column = kWeighted ? x + j * a.normalized_strides.column : nullptr;
    const double sum =
        sum_of_products<kWeighted>(column, y + j * a.grad_strides.column, a.positions);
    squares += sum * sum;
  }
  return squares;
}

template <bool kWeighted, class T>
FASTSEL_HD double tile(const AffineArguments<T>& a, int64_t sample, int64_t first, int64_t width,
                       bool along_positions) {
  const PositionStrides &of_x = a.normalized_strides, &of_y = a.grad_strides;
  const T* x = kWeighted ? a.normalized + sample * of_x.batch + first * of_x.column : nullptr;
  const T* y = a.grad_outputs + sample * of_y.batch + first * of_y.column;
  return along_positions ? tile_of_positions<kWeighted>(a, x, y, width)
                         : tile_of_columns<kWeighted>(a, x, y, width);
}

}  // namespace

template <class T>
void affine_tiles(const AffineArguments<T>& a, const ColumnTiles& t, bool along_positions,
                  int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / t.tiles, first = i % t.tiles * t.width;
    const int64_t width = first + t.width < a.columns ? t.width : a.columns - first;
    t.squares[i] = a.normalized != nullptr ? tile<true>(a, sample, first, width, along_positions)
                                           : tile<false>(a, sample, first, width, along_positions);
  }
}

#define FASTSEL_INSTANTIATE(T)                                                                \
  template void affine_tiles<T>(const AffineArguments<T>&, const ColumnTiles&, bool, int64_t, \
                                int64_t);

FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)

}  // namespace fastsel::cpu::FASTSEL_ISA
