// The filter of topk: reads values once and keeps the few that can be among the k best.

#include "cpu/topk_simd.h"

#include "core/topk_key.h"
#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

constexpr int32_t kFlip =
    INT32_MIN;  // between unsigned keys and the signed integers that vectors compare

// core/topk_key.h for a vector, as signed integers of the same order.
VecI signed_keys(VecF values, bool largest) {
  const VecI bits = (VecI)values, magnitude = bits & INT32_MAX;
  VecI key = bits ^ (bits >> 31 & INT32_MAX);
  key = magnitude == 0 ? magnitude : key;                       // -0 is 0
  key = magnitude > 0x7f800000 ? (key | -1) & INT32_MAX : key;  // NaN is the largest
  return largest ? key : ~key;
}

uint32_t at_least(VecI keys, VecI threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask((__m512i)keys, (__m512i)threshold);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(keys >= threshold)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(keys >= threshold)));
#else
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= uint32_t{keys[lane] >= threshold[lane]} << lane;
  return mask;
#endif
}

// Appends the lanes of `mask`; may write a whole vector beyond them.
int64_t append(VecI keys, uint32_t mask, uint32_t position, uint32_t* out_keys,
               uint32_t* out_offsets) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(position)));
  const __m512i unsigned_keys = _mm512_xor_si512((__m512i)keys, _mm512_set1_epi32(kFlip));
  const __mmask16 lane_mask = static_cast<__mmask16>(mask);
  _mm512_storeu_si512(out_keys, _mm512_maskz_compress_epi32(lane_mask, unsigned_keys));
  _mm512_storeu_si512(out_offsets, _mm512_maskz_compress_epi32(lane_mask, offsets));
  return __builtin_popcount(mask);
#else
  int64_t kept = 0;
  for (; mask != 0; mask &= mask - 1, ++kept) {
    const int lane = __builtin_ctz(mask);
    out_keys[kept] = static_cast<uint32_t>(keys[lane] ^ kFlip);
    out_offsets[kept] = position + static_cast<uint32_t>(lane);
  }
  return kept;
#endif
}

}  // namespace

template <class T>
void filter_block(const T* values, int64_t count, bool largest, uint32_t threshold, uint32_t* keys,
                  uint32_t* offsets, int64_t* kept) {
  const int32_t signed_threshold = static_cast<int32_t>(threshold) ^ kFlip;
  const VecI limit = VecI{} + signed_threshold;
  int64_t n = 0, i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VecI key = signed_keys(load(values + i), largest);
    const uint32_t mask = at_least(key, limit);
    if (mask != 0) n += append(key, mask, static_cast<uint32_t>(i), keys + n, offsets + n);
  }
  for (; i < count; ++i) {
    const uint32_t key = topk_key(to_float(values[i]), largest);
    keys[n] = key;
    offsets[n] = static_cast<uint32_t>(i);
    n += key >= threshold;
  }
  *kept = n;
}

void split_keys(const uint32_t* keys, int64_t count, uint32_t pivot, KeySplit<uint32_t>& split) {
  int64_t above = 0, below = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i pivots = _mm512_set1_epi32(static_cast<int>(pivot));
  for (; i + kLanes <= count; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 greater = _mm512_cmpgt_epu32_mask(key, pivots);
    const __mmask16 less = _mm512_cmplt_epu32_mask(key, pivots);
    _mm512_storeu_si512(split.above + above, _mm512_maskz_compress_epi32(greater, key));
    _mm512_storeu_si512(split.below + below, _mm512_maskz_compress_epi32(less, key));
    above += __builtin_popcount(greater);
    below += __builtin_popcount(less);
  }
#endif
  for (; i < count; ++i) {  // without branches: they would be coin tosses
    split.above[above] = split.below[below] = keys[i];
    above += keys[i] > pivot;
    below += keys[i] < pivot;
  }
  split.above_count = above;
  split.below_count = below;
}

namespace {

typedef uint32_t VecUUnaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

VecI load_signed(const uint32_t* keys) {
  return (VecI)(*reinterpret_cast<const VecUUnaligned*>(keys) ^ 0x80000000u);
}

int32_t signed_key(uint32_t key) { return static_cast<int32_t>(key ^ 0x80000000u); }

int64_t count_at_least(const uint32_t* keys, int64_t count, int32_t limit) {
  VecI tally[4] = {};  // each lane minus its count
  int64_t i = 0, total = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int v = 0; v < 4; ++v) tally[v] += load_signed(keys + i + v * kLanes) >= limit;
  }
  for (; i + kLanes <= count; i += kLanes) tally[0] += load_signed(keys + i) >= limit;
  for (; i < count; ++i) total += signed_key(keys[i]) >= limit;
  const VecI all = (tally[0] + tally[1]) + (tally[2] + tally[3]);
  for (int lane = 0; lane < kLanes; ++lane) total -= all[lane];
  return total;
}

}  // namespace

// Halves the range of keys in which the cut lies; done as soon as exactly k keys lie above it, which
// without ties takes about as many counts as the distance of two keys has leading zeros.
void cut_by_counting(const uint32_t* keys, int64_t count, int64_t k, uint32_t* key,
                     int64_t* equal) {
  int64_t low = INT32_MAX, high = INT32_MIN, above = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t one = signed_key(keys[i]);
    low = one < low ? one : low;
    high = one > high ? one : high;
  }
  *equal = 0;
  while (low < high) {  // at least k keys reach `low`; fewer, `above`, lie above `high`
    const int64_t middle = low + (high - low + 1) / 2;
    const int64_t reach = count_at_least(keys, count, static_cast<int32_t>(middle));
    if (reach == k) {
      *key = static_cast<uint32_t>(middle - 1) ^ 0x80000000u;
      return;
    }
    if (reach > k) {
      low = middle;
    } else {
      high = middle - 1;
      above = reach;
    }
  }
  *key = static_cast<uint32_t>(low) ^ 0x80000000u;
  *equal = k - above;
}

#define FASTSEL_INSTANTIATE(T) \
  template void filter_block<T>(const T*, int64_t, bool, uint32_t, uint32_t*, uint32_t*, int64_t*);

FASTSEL_INSTANTIATE(float)
FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)

}  // namespace fastsel::cpu::FASTSEL_ISA
