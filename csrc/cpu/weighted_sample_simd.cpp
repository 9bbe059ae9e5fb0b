// One pass over the weights: random words, and the few items that can be among those drawn.
//
// -log1p(-u) is at least u, so an item can be below the threshold t only if u <= t w: a
// multiplication and a comparison, where the key itself takes a logarithm and a division.

#include "cpu/weighted_sample_simd.h"

#include <limits>

#include "core/philox.h"
#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));
constexpr int kCounters = kVectorBytes / 8;  // blocks of the generator side by side

// The product of the low halves of each 64 bits.
VecU64 multiply_low(VecU64 a, uint32_t b) {
#if defined(__AVX512F__)
  return (VecU64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (VecU64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// Philox (core/philox.h) of kCounters counters. What stands in the upper halves means nothing until
// the last round: the multiplications do not read it.
struct Words {
  VecU64 x, y, z, w;
};

Words philox_vector(VecU64 index, uint64_t stream, uint64_t seed) {
  Words c{index, index >> 32, VecU64{} + static_cast<uint32_t>(stream),
          VecU64{} + static_cast<uint32_t>(stream >> 32)};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const VecU64 first = multiply_low(c.x, 0xD2511F53u), second = multiply_low(c.z, 0xCD9E8D57u);
    c = {(second >> 32) ^ c.y ^ key0, second, (first >> 32) ^ c.w ^ key1, first};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Where counters stand so that words come out in the order of their items: lane 2 i of the vector is
// counter i, lane 2 i + 1 counter kCounters / 2 + i.
VecU64 counter_lanes() {
  VecU64 lanes{};
  for (int i = 0; i < kCounters; ++i)
    lanes[i] = static_cast<uint64_t>(i / 2 + i % 2 * (kCounters / 2));
  return lanes;
}

VecU64 low_and_high(VecU64 low, VecU64 high) { return (low & 0xffffffffu) | high << 32; }

// The even lanes of both, interleaved; then the odd ones.
void interleave(VecU64 a, VecU64 b, VecU64* even, VecU64* odd) {
#if defined(__AVX512F__)
  *even = (VecU64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  *odd = (VecU64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  *even = (VecU64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  *odd = (VecU64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  for (int i = 0; i < kCounters; i += 2) {
    (*even)[i] = a[i];
    (*even)[i + 1] = b[i];
    (*odd)[i] = a[i + 1];
    (*odd)[i + 1] = b[i + 1];
  }
#endif
}

// The words of 4 * kCounters items, from the multiple `index` of 4 on.
void item_words(VecU64 index, uint64_t stream, uint64_t seed, VecU* first, VecU* second) {
  const Words c = philox_vector(index, stream, seed);
  VecU64 even, odd;
  interleave(low_and_high(c.x, c.y), low_and_high(c.z, c.w), &even, &odd);
  *first = (VecU)even;
  *second = (VecU)odd;
}

// A number that is at most u, from its word. Twenty-four bits of it, which float holds exactly.
VecF lower_bound(VecU words) {
  return __builtin_convertvector((VecI)(words >> 8), VecF) * 0x1p-24f;
}

uint32_t mask_of(VecI lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
#else
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= uint32_t{lanes[lane] != 0} << lane;
  return mask;
#endif
}

template <class T>
VecF load_some(const T* weights, int64_t count) {
  VecF some{};
  for (int64_t i = 0; i < count; ++i) some[i] = to_float(weights[i]);
  return some;
}

}  // namespace

template <class T>
void filter_weights(const T* weights, int64_t count, int64_t first, uint64_t seed, uint64_t stream,
                    float threshold, WeightCandidates* candidates) {
  constexpr int64_t kStep = 4 * kCounters;  // two vectors of weights
  const VecF limit = splat(threshold), largest = splat(std::numeric_limits<float>::max());
  VecU64 index = counter_lanes() + static_cast<uint64_t>(first) / 4;
  VecI invalid{};
  int64_t kept = 0;
  const auto visit = [&](VecF w, VecU words, int64_t offset) {
    invalid |= ~((w >= 0.0f) & (w <= largest));
    // Not greater: an infinite threshold keeps everything.
    const VecI keep = ~(lower_bound(words) > limit * w) & (w > 0.0f);
    for (uint32_t mask = mask_of(keep); mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      candidates->words[kept] = words[lane];
      candidates->offsets[kept++] = static_cast<uint32_t>(offset + lane);
    }
  };
  VecU low, high;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    item_words(index, stream, seed, &low, &high);
    index += static_cast<uint64_t>(kCounters);
    visit(load(weights + i), low, i);
    visit(load(weights + i + kLanes), high, i + kLanes);
  }
  if (i < count) {
    item_words(index, stream, seed, &low, &high);
    const int64_t left = count - i;
    visit(load_some(weights + i, left < kLanes ? left : kLanes), low, i);
    if (left > kLanes) visit(load_some(weights + i + kLanes, left - kLanes), high, i + kLanes);
  }
  candidates->count = kept;
  candidates->invalid = mask_of(invalid) != 0;
}

template <class T>
void sum_weights(const T* weights, int64_t count, double* sums, bool* invalid) {
  const VecF largest = splat(std::numeric_limits<float>::max());
  VecI wrong{};
  for (int64_t begin = 0; begin < count; begin += kWeightTile) {
    const int64_t end = begin + kWeightTile < count ? begin + kWeightTile : count;
    VecD first{}, second{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const VecF w = i + kLanes <= end ? load(weights + i) : load_some(weights + i, end - i);
      wrong |= ~((w >= 0.0f) & (w <= largest));
      first += first_half(w);
      second += second_half(w);
    }
    *sums++ = reduce_sum(first + second);
  }
  *invalid = mask_of(wrong) != 0;
}

#define FASTSEL_INSTANTIATE(T)                                                        \
  template void filter_weights(const T*, int64_t, int64_t, uint64_t, uint64_t, float, \
                               WeightCandidates*);                                    \
  template void sum_weights(const T*, int64_t, double*, bool*);
FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)
#undef FASTSEL_INSTANTIATE

}  // namespace fastsel::cpu::FASTSEL_ISA
