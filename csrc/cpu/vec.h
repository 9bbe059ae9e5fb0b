// Float vectors as wide as the instruction set this file is compiled for: the CPU kernels' only
// SIMD layer.
//
// Kernels named *_simd.cpp are compiled three times, for AVX-512, AVX2 with FMA, and the baseline;
// the compiler's vector extensions give one source for all, and the few operations they lack
// (maximum, movemask, compress) are here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtypes.h"
#include "core/macros.h"

namespace fastsel::cpu::FASTSEL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
// The same, at any address: for rows that start anywhere.
typedef float VecFUnaligned __attribute__((vector_size(kVectorBytes), aligned(4)));
typedef uint16_t VecU16Unaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2)));

FASTSEL_HD VecF splat(float v) { return v - VecF{}; }

FASTSEL_HD VecF load(const float* p) { return *reinterpret_cast<const VecFUnaligned*>(p); }
FASTSEL_HD void store(float* p, VecF v) { *reinterpret_cast<VecFUnaligned*>(p) = v; }

// The low half of each lane.
FASTSEL_HD void store(uint16_t* p, VecU v) {
  *reinterpret_cast<VecU16Unaligned*>(p) = __builtin_convertvector(v, VecU16);
}

FASTSEL_HD VecF load(const BFloat16* p) {
  const VecU16 bits = *reinterpret_cast<const VecU16Unaligned*>(p);
  return (VecF)(__builtin_convertvector(bits, VecU) << 16);
}

FASTSEL_HD void store(BFloat16* p, VecF v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const VecU nan = bits >> 16 | 0x40u;
  const VecU is_nan = (VecU)(v != v), out = (is_nan & nan) | (~is_nan & rounded);
  *reinterpret_cast<VecU16Unaligned*>(p) = __builtin_convertvector(out, VecU16);
}

#if defined(__AVX512F__)
FASTSEL_HD VecF load(const Half* p) {
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTSEL_HD void store(Half* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FASTSEL_HD VecF load(const Half* p) {
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTSEL_HD void store(Half* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FASTSEL_HD VecF load(const Half* p) {
  VecF v{};
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
FASTSEL_HD void store(Half* p, VecF v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(v[i]);
}
#endif

// The first and the second half of a vector in double.
#if defined(__AVX512F__)
FASTSEL_HD VecD first_half(VecF v) {
  return (VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
}
FASTSEL_HD VecD second_half(VecF v) {
  return (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
}
#elif defined(__AVX2__)
FASTSEL_HD VecD first_half(VecF v) {
  return (VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
}
FASTSEL_HD VecD second_half(VecF v) {
  return (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
}
#else
FASTSEL_HD VecD first_half(VecF v) {
  VecD half;
  for (int i = 0; i < kLanes / 2; ++i) half[i] = v[i];
  return half;
}
FASTSEL_HD VecD second_half(VecF v) {
  VecD half;
  for (int i = 0; i < kLanes / 2; ++i) half[i] = v[kLanes / 2 + i];
  return half;
}
#endif

FASTSEL_HD double reduce_sum(VecD v) {
  double sum = v[0];
  for (int i = 1; i < kLanes / 2; ++i) sum += v[i];
  return sum;
}

// All ones in the lanes below `count`, zero in the others.
FASTSEL_HD VecI lanes_below(int64_t count) {
  VecI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes < static_cast<int32_t>(count);
}

// `count` values (at most a vector), other lanes 0.
FASTSEL_HD VecF load_some(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  VecF v{};
  for (int64_t i = 0; i < kLanes && i < count; ++i) v[i] = p[i];
  return v;
#endif
}

// The first `count` lanes, at most a vector.
FASTSEL_HD void store_some(float* p, VecF v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < kLanes && i < count; ++i) p[i] = v[i];
#endif
}

// `count` values (at most a vector), other lanes -inf.
template <class T>
FASTSEL_HD VecF load_padded(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 padding = _mm512_set1_ps(-INFINITY);
    return (VecF)_mm512_mask_loadu_ps(padding, static_cast<__mmask16>((1u << count) - 1), p);
  }
#endif
  VecF v = splat(-INFINITY);
  for (int64_t i = 0; i < kLanes && i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

// v with lane i at -inf.
FASTSEL_HD VecF drop_lane(VecF v, int64_t i) {
  v[i] = -INFINITY;
  return v;
}

// The larger of each lane; where one is NaN, the second.
FASTSEL_HD VecF max_or_second(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

FASTSEL_HD float reduce_max(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

FASTSEL_HD float reduce_sum(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

// exp(x) for x in [-87, 88], to 1 ulp near 0 and 2e-7 relative at the ends; NaN stays NaN, and
// exp(0) is 1. The argument is reduced by a multiple of ln 2; the polynomial is the minimax one of
// degree 6 for |r| <= ln(2)/2, 4e-9 relative.
FASTSEL_HD VecF exp_in_range(VecF x) {
  const float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const VecF shifted = x * 1.44269504088896341f + kRound;
  const VecF n = shifted - kRound;
#if defined(__FMA__)
  const VecF r = x - n * 0.693147180559945309f;  // fused: the product is not rounded
#else
  const VecF r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;  // Cody-Waite
#endif
  VecF p = splat(0x1.6a2256p-10f);
  p = p * r + 0x1.123b02p-7f;
  p = p * r + 0x1.5558f8p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecI exponent =
      ((VecI)shifted << 23) + 0x3f800000;  // 2^n: the shift drops kRound's own bits
  return p * (VecF)exponent;
}

// log(x) for normal, positive x, to 1.5 ulp: the polynomial is that of Cephes' logf, for mantissas in
// [sqrt(1/2), sqrt(2)).
FASTSEL_HD VecF log_of_normal(VecF x) {
  const VecI bits = (VecI)x, exponent = (bits - 0x3f3504f3) >> 23;
  const VecF f = (VecF)(bits - (exponent << 23)) - 1.0f,
             e = __builtin_convertvector(exponent, VecF);
  VecF p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VecF square = f * f;
  VecF tail = p * f * square + e * -2.12194440e-4f;  // log 2 is 0.693359375 less this
  tail = tail - square * 0.5f;
  return e * 0.693359375f + (f + tail);
}

}  // namespace fastsel::cpu::FASTSEL_ISA
