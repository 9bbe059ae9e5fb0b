// Ranks by a radix sort of positions from the last digit. The losses' bits, less those of the
// smallest, are cut into digits once, so that a pass moves positions alone: at 16 bits each they stay
// in the first-level cache where a batch of ordinary size is sorted.

#include "cpu/adaselection_ranks.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "core/topk_key.h"
#include "cpu/adaselection_simd.h"
#include "cpu/isa.h"

namespace fastsel::cpu {

namespace {

// With 14 bits a digit the 32 bits of a loss take two or three passes instead of three; their
// counters cost as much as a pass over so many losses.
constexpr int64_t kManyLosses = 32768;
constexpr int kDigitBits = 11, kLongDigitBits = 14;

// Twice the distance from the middle is an integer.
float distance_of(uint32_t rank, int64_t n) {
  return 0.5f * static_cast<float>(std::abs(2 * static_cast<int64_t>(rank) - (n - 1)));
}

// One pass: start[d] is where the next position of digit d goes.
template <class F>
void each_place(const uint16_t* digits, int64_t n, uint32_t* start, const F& f) {
  for (int64_t i = 0; i < n; ++i) f(i, start[digits[i]]++);
}

template <class F, class Position>
void each_place(const uint16_t* digits, const Position* order, int64_t n, uint32_t* start,
                const F& f) {
  for (int64_t i = 0; i < n; ++i) f(order[i], start[digits[order[i]]]++);
}

template <class Position>
void rank(const RankDigits& digits, int64_t n, float* __restrict out) {
  const size_t values = size_t{1} << digits.bits;
  std::vector<uint32_t> counts(values * digits.passes);
  const std::unique_ptr<Position[]> memory(new Position[2 * n]);
  Position *from = nullptr, *to = memory.get(), *other = to + n;
  for (int p = 0; p < digits.passes; ++p) {
    const uint16_t* digit = digits.digits + p * digits.stride;
    uint32_t* start = counts.data() + p * values;
    for (int64_t i = 0; i < n; ++i) ++start[digit[i]];
    const bool one_value = static_cast<int64_t>(start[digit[0]]) == n,
               last = p + 1 == digits.passes;
    if (one_value && !last) continue;
    uint32_t before = 0;
    for (size_t d = 0; d < values; ++d) before += std::exchange(start[d], before);
    const auto write = [=](int64_t i, uint32_t place) { out[i] = distance_of(place, n); };
    const auto move = [=, to = to](int64_t i, uint32_t place) {
      to[place] = static_cast<Position>(i);
    };
    if (last) {
      from == nullptr ? each_place(digit, n, start, write)
                      : each_place(digit, from, n, start, write);
    } else {
      from == nullptr ? each_place(digit, n, start, move) : each_place(digit, from, n, start, move);
      from = std::exchange(to, from == nullptr ? other : from);
    }
  }
}

}  // namespace

void coreset1_by_sorting(const float* losses, int64_t n, float smallest, float largest,
                         float* out) {
  const uint32_t low = topk_key(smallest, true), high = topk_key(largest, true);
  const int bits = std::max<int>(std::bit_width(high - low), 1);
  const int widest = n < kManyLosses ? kDigitBits : kLongDigitBits;
  const int passes = (bits + widest - 1) / widest;
  const int64_t stride = (n + 15) / 16 * 16;
  const std::unique_ptr<uint16_t[]> memory(new uint16_t[stride * passes]);
  const RankDigits digits{memory.get(), stride, passes, (bits + passes - 1) / passes, low};
  FASTSEL_DISPATCH_ISA(rank_digits, losses, n, digits);
  n <= 65536 ? rank<uint16_t>(digits, n, out) : rank<uint32_t>(digits, n, out);
}

}  // namespace fastsel::cpu
