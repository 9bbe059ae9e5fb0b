// Weighted sampling without replacement by exponential keys: what host and device share.
//
// P. Efraimidis, P. Spirakis: "Weighted random sampling with a reservoir", 2006. Item i gets the key
// E_i / w_i with E_i exponential; the n smallest keys in ascending order are distributed as n items
// drawn one after another, each in proportion to its weight among those left.
//
// Every operation here is one that IEEE 754 rounds in one way only, and none is contracted, so the
// keys, and with them the draws, are the same bits on every host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/dtypes.h"
#include "core/exact.h"
#include "core/macros.h"
#include "core/random.h"

namespace fastsel {

// ---- floats of either width, by their parts ----

template <class Real>
struct RealParts;

template <>
struct RealParts<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  // The exponents of quotients E / w go from -194 to 153, nine bits with this offset.
  static constexpr int kKeyOffset = 80;
  // Terms of the series of atanh: 2/11 s^10 is below 1e-8 of it at the largest s, 0.172.
  static constexpr int kSeries = 5;
};

template <>
struct RealParts<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kKeyOffset = 200;
  static constexpr int kSeries = 11;
};

// 2 atanh(s), s at most 0.172.
template <class Real>
FASTSEL_HD Real twice_atanh(Real s) {
  const Real square = mul_rn(s, s);
  Real sum = Real(2) / Real(2 * RealParts<Real>::kSeries - 1);
  for (int i = RealParts<Real>::kSeries - 2; i >= 0; --i)
    sum = add_rn(mul_rn(sum, square), Real(2) / Real(2 * i + 1));
  return mul_rn(s, sum);
}

// -log(v), v in (0, 3/4], normal.
template <class Real>
FASTSEL_HD Real negative_log(Real v) {
  using P = RealParts<Real>;
  using Bits = typename P::Bits;
  constexpr Bits kMask = (Bits(1) << P::kMantissa) - 1;
  const Bits bits = bit_cast<Bits>(v);
  int exponent = static_cast<int>(bits >> P::kMantissa) - P::kBias;
  Real m = bit_cast<Real>((bits & kMask) | Bits(P::kBias) << P::kMantissa);  // [1, 2)
  if (m > Real(1.4142135)) {
    m = mul_rn(m, Real(0.5));
    ++exponent;
  }
  const Real log = twice_atanh((m - Real(1)) / add_rn(m, Real(1)));
  return -add_rn(mul_rn(Real(exponent), Real(0.69314718055994530942)), log);
}

// -log1p(-u) of u in (0, 1), of which 1 - u is given too, so that neither end loses bits.
template <class Real>
FASTSEL_HD Real exponential(Real u, Real one_minus_u) {
  return u <= Real(0.25) ? twice_atanh(u / add_rn(Real(2), -u)) : negative_log(one_minus_u);
}

// Words below this get 32 bits more, because small keys are the ones that are chosen: else items
// with equal words would be chosen by their place. One item in 1024 takes a second draw for it.
inline constexpr uint32_t kSmallWord = 1u << 22;

// The exponential of an item in float, from its word; `low` gives 32 bits more where they matter.
template <class Low>
FASTSEL_HD float exponential_of_word(float, uint32_t word, Low&& low) {
  if (word < kSmallWord) {
    const float whole = static_cast<float>(word),
                part = mul_rn(static_cast<float>(low()), 0x1p-32f);
    const float u = mul_rn(add_rn(whole, add_rn(part, 0x1p-33f)), 0x1p-32f);
    return exponential(u, add_rn(1.0f, -u));
  }
  const float u = mul_rn(add_rn(static_cast<float>(word), 0.5f), 0x1p-32f);
  return exponential(u, mul_rn(add_rn(static_cast<float>(~word), 0.5f), 0x1p-32f));
}

// The same in double, always of 64 bits.
template <class Low>
FASTSEL_HD double exponential_of_word(double, uint32_t word, Low&& low) {
  const uint64_t bits = uint64_t{word} << 32 | low();
  const double u = mul_rn(add_rn(static_cast<double>(bits), 0.5), 0x1p-64);
  return exponential(u, mul_rn(add_rn(static_cast<double>(~bits), 0.5), 0x1p-64));
}

// ---- keys ----

// E / w as an unsigned integer of the same order: a float with a longer exponent, which neither
// overflows nor loses bits at either end of the weights' range. w is positive and finite. The result
// is neither 0 nor all ones.
template <class Real>
FASTSEL_HD typename RealParts<Real>::Bits quotient_key(Real e, Real w) {
  using P = RealParts<Real>;
  using Bits = typename P::Bits;
  constexpr Bits kMask = (Bits(1) << P::kMantissa) - 1, kOne = Bits(P::kBias) << P::kMantissa;
  int exponent = P::kKeyOffset;
  Bits bits = bit_cast<Bits>(w);
  if (bits >> P::kMantissa == 0) {  // subnormal
    bits = bit_cast<Bits>(mul_rn(w, Real(1ull << P::kMantissa)));
    exponent += P::kMantissa;
  }
  exponent -= static_cast<int>(bits >> P::kMantissa) - P::kBias;
  const Bits e_bits = bit_cast<Bits>(e);
  exponent += static_cast<int>(e_bits >> P::kMantissa) - P::kBias;
  const Real quotient =
      bit_cast<Real>((e_bits & kMask) | kOne) / bit_cast<Real>((bits & kMask) | kOne);
  if constexpr (sizeof(Real) == 8) exponent += 1000;  // 2^1024 and its like
  return bit_cast<Bits>(quotient) + (static_cast<Bits>(exponent) << P::kMantissa);
}

// What quotient_key stands for: mantissa * 2^exponent.
struct KeyValue {
  double mantissa;  // [1, 2)
  int exponent;
};

template <class Bits>
FASTSEL_HD KeyValue key_value(Bits key) {
  using P = RealParts<std::conditional_t<sizeof(Bits) == 4, float, double>>;
  constexpr Bits kMask = (Bits(1) << P::kMantissa) - 1;
  const int offset = P::kBias + P::kKeyOffset + (sizeof(Bits) == 8 ? 1000 : 0);
  const double mantissa = 1.0 + static_cast<double>(key & kMask) / static_cast<double>(kMask + 1);
  return {mantissa, static_cast<int>(key >> P::kMantissa) - offset};
}

// The probability that an item of weight w is chosen, given the threshold: the smallest key that is
// not. P(E / w < threshold) = 1 - exp(-w * threshold).
FASTSEL_HD float inclusion_probability(double w, KeyValue threshold) {
  const double scaled = ldexp(w * threshold.mantissa, threshold.exponent);
  return static_cast<float>(-expm1(-scaled));
}

// Whether a weight is one that may be given: not negative, not NaN, finite.
template <class Real>
FASTSEL_HD bool valid_weight(Real w) {
  return w >= Real(0) && w - w == Real(0);
}

}  // namespace fastsel
