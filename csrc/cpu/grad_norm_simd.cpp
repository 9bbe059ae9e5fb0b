// Products A^T G of one sample, whose squares are summed while they are still in registers.
//
// The output channels lie in the lanes, so an operand's element is broadcast from wherever it is: a
// row of a linear layer or a pixel of an image needs no rearranging, and an image is never unfolded.
// Only G is packed, once for all columns of A.

#include "cpu/grad_norm_simd.h"

#include <algorithm>
#include <type_traits>

#include "core/macros.h"
#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

// Sums that registers hold at once: columns of A times vectors of channels, and one vector of G a
// channel vector beside them.
constexpr int kTileColumns = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// The tile's sums, over all positions of the operand.
template <int J, int V>
FASTSEL_HD void multiply(const float* const* columns, const NormOperand& a, const float* g,
                         int64_t g_step, VecF (&sums)[J][V]) {
  const float* base[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) base[j] = columns[j];
  for (int64_t line = 0; line < a.line_count; ++line) {
    int64_t at = a.lines[line];
    for (int64_t c = 0; c < a.line_length; ++c, at += a.step, g += g_step) {
      VecF channel[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) channel[v] = load(g + v * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const VecF element = splat(base[j][at]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[j][v] += element * channel[v];
      }
    }
  }
}

template <int J, int V>
void tile_product(const NormOperand& a, int64_t column, const float* g, int64_t g_step,
                  int64_t width, int64_t lane, const NormSums& out, VecF& square) {
  VecF sums[J][V];
  for (auto& row : sums)
    for (VecF& sum : row) sum = VecF{};
  multiply<J, V>(a.columns + column, a, g + lane, g_step, sums);
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) {
      const int64_t place = (column + j) * width + lane + v * kLanes;
      if (!out.first) sums[j][v] += load(out.product + place);
      if (!out.last) {
        store(out.product + place, sums[j][v]);
        continue;
      }
      if (out.product != nullptr && out.norm_sq == nullptr) store(out.product + place, sums[j][v]);
      square += sums[j][v] * sums[j][v];
      if (out.weight_sum != nullptr)
        store(out.weight_sum + place, load(out.weight_sum + place) + sums[j][v]);
    }
  }
}

template <int V>
void column_tiles(const NormOperand& a, const float* g, int64_t g_step, int64_t width, int64_t lane,
                  const NormSums& out, VecF& square) {
  int64_t j = 0;
  for (; j + kTileColumns <= a.column_count; j += kTileColumns)
    tile_product<kTileColumns, V>(a, j, g, g_step, width, lane, out, square);
  switch (a.column_count - j) {
    case 5: tile_product<5, V>(a, j, g, g_step, width, lane, out, square); break;
    case 4: tile_product<4, V>(a, j, g, g_step, width, lane, out, square); break;
    case 3: tile_product<3, V>(a, j, g, g_step, width, lane, out, square); break;
    case 2: tile_product<2, V>(a, j, g, g_step, width, lane, out, square); break;
    case 1: tile_product<1, V>(a, j, g, g_step, width, lane, out, square); break;
    default: break;
  }
}

// Columns of narrow groups whose sums registers hold at once.
constexpr int kLaneColumns = 12 / (kNormLanes / kLanes > 2 ? 2 : 1);
constexpr int kLaneVectors = kNormLanes / kLanes;

template <int J>
void lane_tile(const NormOperand& a, int64_t column, const float* g, float* product) {
  for (int v = 0; v < kLaneVectors; ++v) {
    const float* base[J];
    VecF sums[J];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      base[j] = a.columns[column + j] + v * kLanes;
      sums[j] = load(product + (column + j) * kNormLanes + v * kLanes);
    }
    const float* channel = g + v * kLanes;
    for (int64_t line = 0; line < a.line_count; ++line) {
      int64_t at = a.lines[line] * kNormLanes;
      for (int64_t c = 0; c < a.line_length; ++c) {
        const VecF grad = load(channel);
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) sums[j] += load(base[j] + at) * grad;
        at += a.step * kNormLanes;
        channel += kNormLanes;
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) store(product + (column + j) * kNormLanes + v * kLanes, sums[j]);
  }
}

template <int J>
void lane_tail(const NormOperand& a, int64_t column, const float* g, float* product) {
  if constexpr (J > 0) {
    if (a.column_count - column == J) return lane_tile<J>(a, column, g, product);
    lane_tail<J - 1>(a, column, g, product);
  }
}

// Rows become columns: lane l of block[i] goes to lane i of block[l].
FASTSEL_HD void transpose(VecF (&block)[kLanes]) {
#pragma GCC unroll 8
  for (int step = 1; step < kLanes; step *= 2) {
    VecI low, high;  // which lanes of the pair (first, second) make its new first and second
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool moved = lane & step;
      low[lane] = moved ? kLanes + lane - step : lane;
      high[lane] = moved ? kLanes + lane : lane + step;
    }
#pragma GCC unroll 32
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const VecF first = block[i], second = block[i + step];
      block[i] = __builtin_shuffle(first, second, low);
      block[i + step] = __builtin_shuffle(first, second, high);
    }
  }
}

template <class T>
FASTSEL_HD VecF load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  if constexpr (std::is_same_v<T, float>) return load_some(p, count);
  VecF v{};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

}  // namespace

void panel_product(const NormOperand& a, const float* g, int64_t g_step, int64_t width,
                   const NormSums& sums) {
  // Short-lived partial sums: a tile's squares are added in float, tiles in double.
  double total = 0;
  for (int64_t lane = 0; lane < width;) {
    const int64_t vectors = std::min<int64_t>((width - lane) / kLanes, kTileVectors);
    VecF square{};
    switch (vectors) {
#if defined(__AVX512F__)
      case 4: column_tiles<4>(a, g, g_step, width, lane, sums, square); break;
      case 3: column_tiles<3>(a, g, g_step, width, lane, sums, square); break;
#endif
      case 2: column_tiles<2>(a, g, g_step, width, lane, sums, square); break;
      default: column_tiles<1>(a, g, g_step, width, lane, sums, square); break;
    }
    total += reduce_sum(first_half(square)) + reduce_sum(second_half(square));
    lane += vectors * kLanes;
  }
  if (sums.last && sums.norm_sq != nullptr) *sums.norm_sq += total;
}

void lane_product(const NormOperand& a, const float* g, float* product) {
  int64_t j = 0;
  for (; j + kLaneColumns <= a.column_count; j += kLaneColumns)
    lane_tile<kLaneColumns>(a, j, g, product);
  lane_tail<kLaneColumns - 1>(a, j, g, product);
}

template <class T>
void pack_rows(const T* source, int64_t positions, int64_t stride, int64_t count, int64_t width,
               float* packed, float* column_sums) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const int64_t here = std::min<int64_t>(count - lane, kLanes);
    VecF sum{};
    for (int64_t t = 0; t < positions; ++t) {
      const VecF v = load_part(source + t * stride + lane, here);
      store(packed + t * width + lane, v);
      sum += v;
    }
    if (column_sums != nullptr) store(column_sums + lane, load(column_sums + lane) + sum);
  }
}

template <class T>
void pack_columns(const T* source, int64_t positions, int64_t stride, int64_t count, int64_t width,
                  float* packed, float* column_sums) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    VecF sum{};
    for (int64_t t = 0; t < positions; t += kLanes) {
      VecF block[kLanes];
      const int64_t here = std::min<int64_t>(positions - t, kLanes);
      for (int i = 0; i < kLanes; ++i)
        block[i] = lane + i < count ? load_part(source + (lane + i) * stride + t, here) : VecF{};
      transpose(block);
      for (int64_t i = 0; i < here; ++i) {
        store(packed + (t + i) * width + lane, block[i]);
        sum += block[i];
      }
    }
    if (column_sums != nullptr) store(column_sums + lane, load(column_sums + lane) + sum);
  }
}

template <class T>
void copy_rows(const T* source, int64_t positions, int64_t stride, int64_t count, int64_t step,
               float* copied) {
  for (int64_t t = 0; t < positions; ++t, source += stride, copied += step) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(copied + i, load(source + i));
    for (; i < count; ++i) copied[i] = to_float(source[i]);
  }
}

void unpack_sum(const float* panels, int64_t panel_count, int64_t panel_step, int64_t columns,
                int64_t width, int64_t count, float* weight, int64_t weight_stride) {
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      VecF block[kLanes];
      const int64_t here = std::min<int64_t>(columns - column, kLanes);
      for (int64_t i = 0; i < kLanes; ++i) {
        VecF sum{};
        for (int64_t p = 0; i < here && p < panel_count; ++p)
          sum += load(panels + p * panel_step + (column + i) * width + lane);
        block[i] = sum;
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(count - lane, kLanes); ++i)
        store_some(weight + (lane + i) * weight_stride + column, block[i], here);
    }
  }
}

template <class T>
void square_sum(const T* values, int64_t count, double* sum) {
  for (int64_t begin = 0; begin < count;) {
    // Blocks keep the float sums short.
    const int64_t end = std::min<int64_t>(begin + 64 * kLanes, count);
    VecF even{}, odd{};
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const VecF first = load(values + i), second = load(values + i + kLanes);
      even += first * first;
      odd += second * second;
    }
    for (; i < end; i += kLanes) {
      const VecF rest = load_part(values + i, end - i);
      even += rest * rest;
    }
    *sum += reduce_sum(first_half(even + odd)) + reduce_sum(second_half(even + odd));
    begin = end;
  }
}

void dot(const float* x, const float* y, int64_t count, double* sum, double* magnitude) {
  for (int64_t begin = 0; begin < count;) {
    // Blocks keep the float sums short.
    const int64_t end = std::min<int64_t>(begin + 16 * kLanes, count);
    VecF total{}, absolute{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const VecF term = end - i >= kLanes ? load(x + i) * load(y + i)
                                          : load_some(x + i, end - i) * load_some(y + i, end - i);
      total += term;
      absolute += (VecF)((VecI)term & INT32_MAX);
    }
    *sum += reduce_sum(first_half(total)) + reduce_sum(second_half(total));
    *magnitude += reduce_sum(first_half(absolute)) + reduce_sum(second_half(absolute));
    begin = end;
  }
}

#define FASTSEL_INSTANTIATE(T)                                                                 \
  template void pack_rows<T>(const T*, int64_t, int64_t, int64_t, int64_t, float*, float*);    \
  template void pack_columns<T>(const T*, int64_t, int64_t, int64_t, int64_t, float*, float*); \
  template void copy_rows<T>(const T*, int64_t, int64_t, int64_t, int64_t, float*);            \
  template void square_sum<T>(const T*, int64_t, double*);
FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)
#undef FASTSEL_INSTANTIATE

}  // namespace fastsel::cpu::FASTSEL_ISA
