// What the random operators draw: words of streams, and uniform numbers made of them.
#pragma once

#include <cstdint>

#include "core/exact.h"
#include "core/macros.h"
#include "core/philox.h"

namespace fastsel {

// Streams of random words under one seed, by what they are for; `row` in their low bits.
enum class RandomStream : uint64_t {
  weighted_keys = 1,
  weighted_low_bits = 2,
  weighted_draws = 3,
  neighbor_draws = 4
};

FASTSEL_HD uint64_t random_stream(RandomStream kind, int64_t row) {
  return static_cast<uint64_t>(kind) << 48 | static_cast<uint64_t>(row);
}

// The word of an item: four items share a block of the generator.
FASTSEL_HD uint32_t word_of(const PhiloxWords& words, unsigned which) {
  return which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w;
}

FASTSEL_HD uint32_t item_word(uint64_t seed, uint64_t stream, int64_t item) {
  return word_of(philox(seed, static_cast<uint64_t>(item) / 4, stream), item % 4);
}

// A number in [0, 1) of 53 bits.
FASTSEL_HD double uniform(uint32_t high, uint32_t low) {
  const uint64_t bits = uint64_t{high} << 32 | low;
  return mul_rn(static_cast<double>(bits >> 11), 0x1p-53);
}

// The high word of the product of two 64-bit integers.
FASTSEL_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// An integer in [0, n), each as probable as the next to within n / 2^64.
FASTSEL_HD int64_t uniform_index(uint32_t high, uint32_t low, int64_t n) {
  return static_cast<int64_t>(multiply_high(uint64_t{high} << 32 | low, static_cast<uint64_t>(n)));
}

}  // namespace fastsel
