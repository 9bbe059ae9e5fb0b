// The passes of adaselection_ over float32 samples, for the instruction set this file is compiled
// for. Statistics and exponentials are float32, sums are double.

#include "cpu/adaselection_simd.h"

#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

// A vector that is all samples, or begins with the last `count` ones. Every lane goes through the
// same arithmetic, so equal samples get equal scores wherever they stand.
struct Whole {};
struct Part {
  int64_t count;
};

FASTSEL_HD VecF load_lanes(const float* p, Whole) { return load(p); }
FASTSEL_HD VecF load_lanes(const float* p, Part part) { return load_some(p, part.count); }
FASTSEL_HD VecF keep_lanes(VecF v, Whole, float) { return v; }
FASTSEL_HD VecF keep_lanes(VecF v, Part part, float other) {
  return lanes_below(part.count) ? v : splat(other);
}
FASTSEL_HD void store_lanes(float* p, VecF v, Whole) { store(p, v); }
FASTSEL_HD void store_lanes(float* p, VecF v, Part part) { store_some(p, v, part.count); }

template <class F>
FASTSEL_HD void each_vector(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, Whole{});
  if (i < end) f(i, Part{end - i});
}

FASTSEL_HD VecF magnitude(VecF v) { return (VecF)((VecI)v & INT32_MAX); }

struct DoubleSum {
  VecD first{}, second{};

  FASTSEL_HD void add(VecF v) {
    first += first_half(v);
    second += second_half(v);
  }
  FASTSEL_HD double total() const { return reduce_sum(first + second); }
};

// exp, 0 below -87.
FASTSEL_HD VecF exp_or_zero(VecF x) {
  const VecF floor = splat(-87.0f);
  const VecI inside = x >= floor;
  return (VecF)((VecI)exp_in_range(inside ? x : floor) & inside);
}

// Calls run(read), where read(i, lanes) is the statistic's vector at sample i.
template <class F>
FASTSEL_HD void with_form(const Statistic& s, F&& run) {
  const float* values = s.values;
  const float* reference = s.reference;
  const VecF mean = splat(s.mean), mean_low = splat(s.mean_low);
  switch (s.form) {
    case Statistic::Form::value:
      return run([=](int64_t i, auto lanes)
                     __attribute__((always_inline)) { return load_lanes(values + i, lanes); });
    case Statistic::Form::difference:
      return run([=](int64_t i, auto lanes) __attribute__((always_inline)) {
        return load_lanes(values + i, lanes) - load_lanes(reference + i, lanes);
      });
    case Statistic::Form::deviation:
      // The first difference is exact where it is small.
      return run([=](int64_t i, auto lanes) __attribute__((always_inline)) {
        return magnitude((load_lanes(values + i, lanes) - mean) - mean_low);
      });
  }
}

}  // namespace

template <class T>
void widen(const T* values, int64_t begin, int64_t end, float* out) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(out + i, load(values + i));
  for (; i < end; ++i) out[i] = to_float(values[i]);
}

void add_moments(const Statistic& s, int64_t begin, int64_t end, float shift, Moments& moments) {
  with_form(s, [&](auto read) __attribute__((always_inline)) {
    VecF min = splat(INFINITY), max = splat(-INFINITY);
    VecD sums[2] = {}, squares[2] = {};
    VecI odd{};  // all ones where a value was not finite
    const double from = shift;
    each_vector(begin, end, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const VecF v = keep_lanes(read(i, lanes), lanes, shift);
      odd |= ((VecI)v & 0x7f800000) == 0x7f800000;
      min = v < min ? v : min;
      max = v > max ? v : max;
      const VecD a = first_half(v) - from, b = second_half(v) - from;
      sums[0] += a;
      sums[1] += b;
      squares[0] += a * a;
      squares[1] += b * b;
    });
    moments.max = max_or_second(splat(moments.max), splat(reduce_max(max)))[0];
    moments.min = -max_or_second(splat(-moments.min), splat(reduce_max(-min)))[0];
    moments.sum += reduce_sum(sums[0] + sums[1]);
    moments.sum_sq += reduce_sum(squares[0] + squares[1]);
    int any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= odd[lane];
    moments.finite &= any == 0;
  });
}

void add_magnitudes(const float* values, int64_t begin, int64_t end, double& sum) {
  DoubleSum total;
  each_vector(begin, end, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    total.add(magnitude(load_lanes(values + i, lanes)));
  });
  sum += total.total();
}

void adaboost_statistic(const float* losses, int64_t begin, int64_t end, float largest,
                        float* out) {
  const float margin = 1e-4f * largest;
  each_vector(begin, end, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const VecF loss = load_lanes(losses + i, lanes);
    const VecF ratio = ((largest + loss) + margin) / ((largest - loss) + margin);
    store(out + i, 0.5f * log_of_normal(largest == 0 ? splat(1.0f) : ratio));
  });
}

void exponentials(const Statistic& s, const float* losses, int64_t begin, int64_t end, float anchor,
                  float factor, float* out, SoftmaxSums& sums) {
  with_form(s, [&](auto read) __attribute__((always_inline)) {
    DoubleSum total;
    VecD weighted[2] = {};
    each_vector(begin, end, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      // Where there is no sample, anything could come out that is beyond exp's range.
      const VecF x = keep_lanes((read(i, lanes) - anchor) * factor, lanes, 0.0f);
      const VecF e = exp_or_zero(x), counted = keep_lanes(e, lanes, 0.0f);
      const VecF loss = load_lanes(losses + i, lanes);
      store(out + i, e);
      total.add(counted);
      weighted[0] += first_half(counted) * first_half(loss);
      weighted[1] += second_half(counted) * second_half(loss);
    });
    sums.sum += total.total();
    sums.weighted_loss += reduce_sum(weighted[0] + weighted[1]);
  });
}

void mix(const Mixture& m, int64_t begin, int64_t end) {
  const VecF ceiling = splat(static_cast<float>(kLargestRewardExponent));
  each_vector(begin, end, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    VecF importance = splat(m.constant);
    for (int t = 0; t < m.count; ++t) importance += m.shares[t] * load(m.terms[t] + i);
    const VecF x = load_lanes(m.losses + i, lanes) * m.reward_factor;
    store_lanes(m.scores + i, exp_or_zero(x < ceiling ? x : ceiling) * importance, lanes);
  });
}

// A sample's rank is the number of smaller losses, and of equal ones before it.
void coreset1_by_counting(const float* losses, int64_t n, float* out) {
  each_vector(0, n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const VecF mine = load_lanes(losses + i, lanes);
    VecI rank{};
    const int64_t block_end = i + kLanes < n ? i + kLanes : n;
    for (int64_t j = 0; j < i; ++j) rank -= splat(losses[j]) <= mine;
    for (int64_t j = i; j < block_end; ++j) {
      const VecF other = splat(losses[j]);
      rank -= (other < mine) | ((other == mine) & ~lanes_below(j - i + 1));
    }
    for (int64_t j = block_end; j < n; ++j) rank -= splat(losses[j]) < mine;
    const VecI doubled = 2 * rank - static_cast<int32_t>(n - 1);
    store(out + i, magnitude(__builtin_convertvector(doubled, VecF)) * 0.5f);
  });
}

// Keys as topk_key makes them; losses are finite.
void rank_digits(const float* losses, int64_t n, const RankDigits& out) {
  const VecU mask = VecU{} + ((1u << out.bits) - 1);
  each_vector(0, n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const VecI bits = (VecI)load_lanes(losses + i, lanes);
    const VecI ordered = (bits & INT32_MAX) == 0 ? VecI{} : bits ^ (bits >> 31 & INT32_MAX);
    VecU key = ((VecU)ordered ^ 0x80000000u) - out.low;
    for (int p = 0; p < out.passes; ++p, key >>= out.bits)
      store(out.digits + p * out.stride + i, key & mask);
  });
}

#define FASTSEL_INSTANTIATE(T) template void widen<T>(const T*, int64_t, int64_t, float*);

FASTSEL_INSTANTIATE(Half)
FASTSEL_INSTANTIATE(BFloat16)

}  // namespace fastsel::cpu::FASTSEL_ISA
