// Floating-point values as unsigned integers that sort the same way: what radix selection works on.
//
// The order is torch's: NaN is the largest value, whatever its sign or payload; -0 and +0 are one
// value. `largest` decides which end is wanted; a larger key is always the better one, so selection
// itself knows only "k largest keys".
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/macros.h"

namespace fastsel {

// Which unsigned integer holds the key of a T, and the key's width in bits.
template <class T>
struct TopkKey;
template <>
struct TopkKey<float> {
  using type = uint32_t;
};
template <>
struct TopkKey<double> {
  using type = uint64_t;
};
template <>
struct TopkKey<Half> {
  using type = uint16_t;
};
template <>
struct TopkKey<BFloat16> {
  using type = uint16_t;
};

namespace detail {

// `infinity` is the bit pattern of +inf; every larger magnitude is a NaN.
template <class Bits>
FASTSEL_HD Bits ordered_bits(Bits bits, Bits infinity) {
  constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const Bits magnitude = Bits(bits & Bits(~kSign));
  if (magnitude > infinity) return Bits(~Bits(0));
  if (magnitude == 0) return kSign;
  return (bits & kSign) ? Bits(~bits) : Bits(bits | kSign);
}

}  // namespace detail

FASTSEL_HD uint32_t topk_key(float v, bool largest) {
  const uint32_t key = detail::ordered_bits<uint32_t>(bit_cast<uint32_t>(v), 0x7f800000u);
  return largest ? key : ~key;
}

FASTSEL_HD uint64_t topk_key(double v, bool largest) {
  const uint64_t key = detail::ordered_bits<uint64_t>(bit_cast<uint64_t>(v), 0x7ff0000000000000u);
  return largest ? key : ~key;
}

FASTSEL_HD uint16_t topk_key(Half v, bool largest) {
  const uint16_t key = detail::ordered_bits<uint16_t>(v.bits, 0x7c00u);
  return largest ? key : uint16_t(~key);
}

FASTSEL_HD uint16_t topk_key(BFloat16 v, bool largest) {
  const uint16_t key = detail::ordered_bits<uint16_t>(v.bits, 0x7f80u);
  return largest ? key : uint16_t(~key);
}

}  // namespace fastsel
