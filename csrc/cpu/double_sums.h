// Sums in double over values of any storage type, a vector at a time: what the per-sample gradient
// norms are made of. For *_simd.cpp files, once an instruction set.
//
// Products and squares of float32 values are exact in double, so a norm is right to the last bit of
// float32 however many terms it has and however they cancel; the loops wait for memory either way.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

struct Doubles {
  VecD low, high;
};

template <class T>
FASTSEL_HD Doubles load_doubles(const T* p) {
  const VecF v = load(p);
  return {first_half(v), second_half(v)};
}

// float32 is widened as it is loaded, half a vector at a time: taking a vector apart costs more.
FASTSEL_HD VecD load_half(const float* p) {
#if defined(__AVX512F__)
  return (VecD)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (VecD)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  VecD half;
  for (int i = 0; i < kLanes / 2; ++i) half[i] = p[i];
  return half;
#endif
}

FASTSEL_HD Doubles load_doubles(const float* p) {
  return {load_half(p), load_half(p + kLanes / 2)};
}

FASTSEL_HD VecD& double_vector(double* p) {  // aligned to a vector
  return *reinterpret_cast<VecD*>(p);
}

// The sum of x[i] * y[i], or of y[i] where kWeighted is false. x may be y.
template <bool kWeighted, class T>
FASTSEL_HD double sum_of_products(const T* x, const T* y, int64_t count) {
  VecD sums[4]{};
  int64_t i = 0;
  const auto add = [&](int64_t at, VecD& low, VecD& high) __attribute__((always_inline)) {
    const Doubles b = load_doubles(y + at);
    if constexpr (kWeighted) {
      const Doubles a = load_doubles(x + at);
      low += a.low * b.low;
      high += a.high * b.high;
    } else {
      low += b.low;
      high += b.high;
    }
  };
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    add(i, sums[0], sums[1]);
    add(i + kLanes, sums[2], sums[3]);
  }
  if (i + kLanes <= count) {
    add(i, sums[0], sums[1]);
    i += kLanes;
  }
  double total = reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) {
    const double b = to_float(y[i]);
    total += kWeighted ? static_cast<double>(to_float(x[i])) * b : b;
  }
  return total;
}

// The sum of squares of sums[0, width).
FASTSEL_HD double sum_of_squares(double* sums, int64_t width) {  // aligned to a vector
  constexpr int64_t kHalf = kLanes / 2;
  VecD squares[2]{};
  int64_t j = 0;
  for (; j + 2 * kHalf <= width; j += 2 * kHalf) {
    const VecD a = double_vector(sums + j), b = double_vector(sums + j + kHalf);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  double total = reduce_sum(squares[0] + squares[1]);
  for (; j < width; ++j) total += sums[j] * sums[j];
  return total;
}

}  // namespace fastsel::cpu::FASTSEL_ISA
