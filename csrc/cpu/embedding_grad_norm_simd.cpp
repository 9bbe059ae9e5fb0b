// The squared norms of tiles of an embedding's columns, for the instruction set this file is compiled
// for.
//
// Positions are visited in the order they lie in memory. A token that occurs once adds the squares of
// its row; of one that occurs more often, the rows are added first, into sums that stay in the
// first-level cache. Either way each row is read once.

#include "cpu/embedding_grad_norm_simd.h"

#include "cpu/double_sums.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

// One row of a chain: the first fills the sums, those between are added, the last is added and leaves
// squares alone, which are returned. So memory is waited for in every step: filling the sums with
// zeros first and squaring them afterwards would leave it idle. Meanwhile `next`, the row to be read
// next, is fetched: the processor cannot foresee it.
enum class Step { fill, add, finish };

template <Step kStep, class T>
FASTSEL_HD double chain_row(const T* row, const T* next, int64_t width,
                            double* sums) {  // [width], aligned to a vector
  VecD squares[2]{};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    VecD &low = double_vector(sums + j), &high = double_vector(sums + j + kLanes / 2);
    const Doubles values = load_doubles(row + j);
    __builtin_prefetch(next + j);
    if constexpr (kStep == Step::fill) {
      low = values.low;
      high = values.high;
    } else if constexpr (kStep == Step::add) {
      low += values.low;
      high += values.high;
    } else {
      const VecD a = low + values.low, b = high + values.high;
      squares[0] += a * a;
      squares[1] += b * b;
    }
  }
  double total = kStep == Step::finish ? reduce_sum(squares[0] + squares[1]) : 0;
  for (; j < width; ++j) {
    const double value = to_float(row[j]);
    const double sum = kStep == Step::fill ? value : sums[j] + value;
    if (kStep == Step::finish) total += sum * sum;
    sums[j] = sum;
  }
  return total;
}

// The squared norm of the sum of the rows at `position` and at all that follow it in its chain, of
// which there is one at least.
template <class T>
FASTSEL_HD double chain_squares(const T* grads, int64_t row_stride, const int32_t* links,
                                int32_t position, int64_t width, double* sums) {
  const T* row = grads + position * row_stride;
  position = next_position(links[position]);
  const T* next = grads + position * row_stride;
  chain_row<Step::fill>(row, next, width, sums);
  while ((position = next_position(links[position])) != 0) {
    row = next;
    next = grads + position * row_stride;
    chain_row<Step::add>(row, next, width, sums);
  }
  return chain_row<Step::finish>(next, next, width, sums);
}

}  // namespace

template <class T>
void embedding_tiles(const EmbeddingArguments<T>& a, const int32_t* links,  // [B, T]
                     const ColumnTiles& t, int64_t begin, int64_t end) {
  const int64_t row_stride = a.grad_strides.position;
  alignas(kVectorBytes) double sums[kWidestTile];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / t.tiles, first = i % t.tiles * t.width;
    const int64_t width = first + t.width < a.columns ? t.width : a.columns - first;
    const T* grads = a.grad_outputs + sample * a.grad_strides.batch + first;
    const int32_t* chain = links + sample * a.positions;
    double squares = 0;
    for (int64_t p = 0; p < a.positions; ++p) {
      if (!is_first(chain[p])) continue;
      const T* row = grads + p * row_stride;
      squares += next_position(chain[p]) == 0 ? sum_of_products<true>(row, row, width)
                                              : chain_squares(grads, row_stride, chain,
                                                              static_cast<int32_t>(p), width, sums);
    }
    t.squares[i] = squares;
  }
}

#define FASTSEL_INSTANTIATE(T)                                                   \
  template void embedding_tiles<T>(const EmbeddingArguments<T>&, const int32_t*, \
                                   const ColumnTiles&, int64_t, int64_t);

FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)

}  // namespace fastsel::cpu::FASTSEL_ISA
