// Sixteen-bit floating point as storage: kernels read it, compute in float32, and write it back.
//
// Own types rather than torch's or CUDA's, so that one kernel source serves a CPU without torch
// headers, a GPU, and the host emulation on a machine that has no CUDA toolkit. Bit layouts are
// IEEE binary16 and bfloat16; conversions from float round to nearest, ties to even, as torch's do.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace fastsel {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
FASTSEL_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FASTSEL_HD float to_float(float v) { return v; }

FASTSEL_HD float to_float(BFloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }

FASTSEL_HD float to_float(Half v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Rebiasing the exponent by a multiplication makes subnormals come out right too.
  const float rebias = bit_cast<float>(uint32_t{(254 - 15) << 23});
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * rebias));
}

template <class T>
FASTSEL_HD T from_float(float v);

template <>
FASTSEL_HD float from_float<float>(float v) {
  return v;
}

template <>
FASTSEL_HD BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
FASTSEL_HD Half from_float<Half>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last bit kept with the float's last bit, and the addition
    // itself rounds.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace fastsel
