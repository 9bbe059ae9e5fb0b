// Philox4x32-10, the counter-based random generator every random op of fastsel draws from.
//
// J. Salmon, M. Moraes, R. Dror, D. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11,
// section 4.3. Ten rounds of multiply, exchange and xor turn a 128-bit counter and a 64-bit key
// into four words. There is no state: element i of stream s under a seed is a pure function of
// (seed, s, i), so draws do not depend on thread counts, grids or the device.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fastsel {

struct PhiloxWords {
  uint32_t x, y, z, w;
};

FASTSEL_HD uint32_t philox_mulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

FASTSEL_HD PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = philox_mulhi(kMultiplier0, counter.x), low0 = kMultiplier0 * counter.x;
    const uint32_t high1 = philox_mulhi(kMultiplier1, counter.z), low1 = kMultiplier1 * counter.z;
    counter = {high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The four words of element `index` in stream `stream` under `seed`. Ops that draw more than four
// words an element, or several kinds of draws, use one stream for each.
FASTSEL_HD PhiloxWords philox(uint64_t seed, uint64_t index, uint64_t stream = 0) {
  return philox4x32_10({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                        static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)},
                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace fastsel
