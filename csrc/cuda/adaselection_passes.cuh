// The passes of adaselection_ over the samples of a block, each in one piece: adaselection.cuh says
// what they are for and puts them together.
#pragma once

#include <cfloat>

#include "core/adaselection_arguments.h"
#include "cuda/adaselection_block.cuh"

namespace fastsel::cuda {

inline constexpr double kLog2E = 1.4426950408889634;

// adaboost's statistic of the largest loss: ln(20001) / 2.
inline constexpr double kAdaboostLargest = 4.951768775;

// What is kept of each sample between passes, in rows as long as whole rounds of the threads. Ranks
// apart, only the thread that works on a sample writes its entries, and only the pivot's loss is read
// by others.
struct AdaSelectionRows {
  float* losses;     // [B], NaN for excluded samples and past B; in the end what the choice goes by
  unsigned* ranks;   // [B], for coreset1, else null
  double* adaboost;  // [B], for adaboost, else null
};

// A warp of a small block leaves a part of each total in every lane, and one warp adds up all of
// them at the end: for few samples the shuffles are what takes time. A large block would need too
// much memory for that.
template <int kThreads>
inline constexpr int kPartLanes = kThreads <= kAdaSelectionSmallThreads ? kWarpSize : 8;

template <int kThreads>
struct AdaSelectionShared {
  double parts[kMaxMethods * (kThreads / kWarpSize) * kPartLanes<kThreads>];
  // Of each method: the largest value of its statistic, what differences from that are multiplied by
  // to become exponents of two, the sum of those powers, its loss, and what a power counts in a
  // score.
  double top[kMaxMethods], scale[kMaxMethods], sum[kMaxMethods], loss[kMaxMethods];
  float share[kMaxMethods];
  double valid, mean, mean_magnitude, largest_magnitude;  // of the losses
  double reward;   // times a loss: the exponent of two that is its reward's
  unsigned pivot;  // the first sample that takes part
  unsigned bin_totals[kWarpSize];
  unsigned lowest[kWarpSize], highest[kWarpSize];  // of the keys, by warp
};

// Doubles a block writes in the exchanges between blocks, each pass to a place of its own.
inline constexpr unsigned kMaskParts = 8;
inline constexpr unsigned kMeasureParts = 4 * kMaxMethods;
inline constexpr unsigned kWeighParts = 2 * kMaxMethods;
inline constexpr unsigned kAdaSelectionParts = kMaskParts + kMeasureParts + kWeighParts;

__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= FLT_MAX; }

// The row of a method code from kFirstStatistic on.
template <class T>
__device__ __forceinline__ const T* statistics_row(const AdaSelectionArguments<T>& a, int code) {
  return a.statistics + (code - kFirstStatistic) * a.statistics_stride;
}

// The losses of N samples, kStride apart: NaN from `end` on and where one of the inputs is not
// finite. Input after input, so that N loads are under way together.
template <int kStride, class T, int N>
__device__ __forceinline__ void load_masked(const AdaSelectionArguments<T>& a, unsigned first,
                                            unsigned end, float (&losses)[N]) {
  bool valid[N];
  const auto need_finite = [&](const T* from) {
    FASTSEL_UNROLL
    for (int n = 0; n < N; ++n) valid[n] = valid[n] && is_finite(to_float(from[n * kStride]));
  };
  FASTSEL_UNROLL
  for (int n = 0; n < N; ++n) {
    valid[n] = first + n * kStride < end;
    losses[n] = valid[n] ? to_float(a.losses[first + n * kStride]) : NAN;
    valid[n] = is_finite(losses[n]);
  }
  if (a.grad_norms != nullptr) need_finite(a.grad_norms + first);
  if (a.reference_losses != nullptr) need_finite(a.reference_losses + first);
  FASTSEL_UNROLL_BY(1)
  for (int m = 0; m < a.method_count; ++m)
    if (a.methods[m] >= kFirstStatistic) need_finite(statistics_row(a, a.methods[m]) + first);
  FASTSEL_UNROLL
  for (int n = 0; n < N; ++n) losses[n] = valid[n] ? losses[n] : NAN;
}

// The samples [begin, end) of a block of kThreads; with kGrid the blocks of a cooperative grid share
// the batch and call the same functions. No branch asks whether a sample takes part: the others count
// as nothing, so that the work on a thread's samples overlaps.
template <class T, int kThreads, bool kGrid>
class AdaSelectionPasses {
 public:
  static constexpr int U = kAdaSelectionUnroll;
  static constexpr int kRound = U * kThreads;  // samples of a block in one round
  static constexpr int kLanes = kPartLanes<kThreads>;
  static constexpr unsigned kWarps = kThreads / kWarpSize;

  // grid_parts [gridDim.x * kAdaSelectionParts]: only with kGrid. begin is a multiple of kRound.
  __device__ AdaSelectionPasses(const AdaSelectionArguments<T>& a, const AdaSelectionRows& rows,
                                unsigned begin, unsigned end, double* grid_parts)
      : a_(a),
        rows_(rows),
        begin_(begin),
        end_(end),
        grid_parts_(grid_parts),
        s_(block_shared<AdaSelectionShared<kThreads>>()) {
    // Here nobody waits for them, and no block has written them yet.
    step_ = *a.step;
    if (threadIdx.x < static_cast<unsigned>(a.method_count)) {
      previous_loss_ = a.method_losses[threadIdx.x];
      weight_ = a.method_weights[threadIdx.x];
    }
  }

  // Returns how many samples take part, of all blocks.
  __device__ __forceinline__ double mask() {
    double sum = 0, magnitudes = 0;
    float largest = 0;
    unsigned valid = 0, first = ~0u;
    FASTSEL_UNROLL_BY(1)
    for (unsigned round = begin_; round < end_; round += kRound) {
      const unsigned base = round + threadIdx.x;
      float loss[U];
      load_masked<kThreads>(a_, base, end_, loss);
      FASTSEL_UNROLL
      for (int u = 0; u < U; ++u) {
        const unsigned i = base + u * kThreads;
        rows_.losses[i] = loss[u];
        const bool counts = is_finite(loss[u]);
        const float one = counts ? loss[u] : 0.0f;
        const double wide = static_cast<double>(one);
        sum += wide;
        magnitudes += fabs(wide);
        largest = max(largest, fabsf(one));
        valid += counts;
        first = min(first, counts ? i : ~0u);
      }
    }
    double totals[kMaskParts] = {sum,
                                 magnitudes,
                                 static_cast<double>(valid),
                                 0,
                                 static_cast<double>(largest),
                                 -static_cast<double>(first),
                                 -INFINITY,
                                 -INFINITY};
    store_parts<4>(0, totals);
    totals_of<4, kMaskParts>(1, 0, [this](unsigned, double total) {
      const double all = __shfl_sync(kFullMask, total, 2);
      if (lane_index() == 0) s_.mean = total / all;
      if (lane_index() == 1) s_.mean_magnitude = total / all;
      if (lane_index() == 2) s_.valid = total;
      if (lane_index() == 4) s_.largest_magnitude = total;
      if (lane_index() == 5) s_.pivot = static_cast<unsigned>(-total);
      if (threadIdx.x == 2 && blockIdx.x == 0 && a_.excluded != nullptr)
        *a_.excluded += a_.batch - static_cast<int64_t>(total);
    });
    return s_.valid;
  }

  __device__ __forceinline__ void measure() {
    const Items<1> pivot{s_.pivot, {static_cast<double>(rows_.losses[s_.pivot])}, {true}};
    FASTSEL_UNROLL_BY(1)
    for (int m = 0; m < a_.method_count; ++m) {
      if (is_uniform(m)) continue;
      double zero[1], totals[4] = {0, 0, -INFINITY, -INFINITY};
      statistics<Pass::pivot>(m, pivot, zero);
      for_each_items([&](const Items<U>& items) {
        double statistic[U];
        statistics<Pass::first>(m, items, statistic);
        FASTSEL_UNROLL
        for (int u = 0; u < U; ++u) {
          const double one = items.valid[u] ? statistic[u] : zero[0];
          const double difference = one - zero[0];
          totals[0] += difference;
          totals[1] += difference * difference;
          totals[2] = larger(totals[2], one);
          totals[3] = larger(totals[3], -one);
        }
      });
      store_parts<2>(m, totals);
    }
    totals_of<2, 4>(a_.method_count, kMaskParts, [this](unsigned m, double total) {
      const double squares = __shfl_down_sync(kFullMask, total, 1);
      const double top = __shfl_down_sync(kFullMask, total, 2);
      const double bottom = -__shfl_down_sync(kFullMask, total, 3);
      if (lane_index() > 0) return;
      const double mean = total / s_.valid;
      const double variance = larger(squares / s_.valid - mean * mean, 0.0);
      const double divisor =
          spread_divisor(sqrt(variance), larger(fabs(top), fabs(bottom)), a_.standardize);
      s_.top[m] = is_uniform(m) ? 0 : top;
      s_.scale[m] = is_uniform(m) ? 0 : kLog2E / divisor;
    });
  }

  __device__ __forceinline__ void weigh() {
    FASTSEL_UNROLL_BY(1)
    for (int m = 0; m < a_.method_count; ++m) {
      if (is_uniform(m)) continue;
      double totals[2] = {0, 0};
      for_each_items([&](const Items<U>& items) {
        float power[U];
        powers(m, items, power);
        FASTSEL_UNROLL
        for (int u = 0; u < U; ++u) {
          const auto one = static_cast<double>(items.valid[u] ? power[u] : 0.0f);
          totals[0] += one;
          totals[1] += one * items.loss[u];
        }
      });
      store_parts<2>(m, totals);
    }
    totals_of<2, 2>(a_.method_count, kMaskParts + kMeasureParts, [this](unsigned m, double total) {
      const double weighted = __shfl_down_sync(kFullMask, total, 1);
      if (lane_index() > 0) return;
      s_.sum[m] = is_uniform(m) ? s_.valid : total;
      s_.loss[m] = is_uniform(m) ? s_.mean : weighted / total;
    });
  }

  // A lane a method, in one warp of each block; the first block writes down what came out.
  __device__ __forceinline__ void update() {
    if (warp_index() == 0) {
      const unsigned m = lane_index();
      const bool mine = m < static_cast<unsigned>(a_.method_count);
      const double loss = mine ? s_.loss[m] : 0;
      const double exponent =
          mine ? weight_exponent(loss, previous_loss_, a_.beta, step_ == 0) : -DBL_MAX;
      double exponents[1] = {exponent > -DBL_MAX ? exponent : -DBL_MAX};  // NaN is not the largest
      const double largest = combine_values<0, 1>(exponents);
      const double grown = mine ? grown_weight(weight_, exponent, largest) : 0;
      double summand[1] = {grown};
      const float weight = normalized_weight(grown, combine_values<1, 1>(summand));
      if (mine) s_.share[m] = static_cast<float>(static_cast<double>(weight) / s_.sum[m]);
      if (mine && blockIdx.x == 0) {
        constexpr double kLargest = FLT_MAX;
        a_.method_weights[m] = weight;
        a_.method_losses[m] = static_cast<float>(max(min(loss, kLargest), -kLargest));
        if (m == 0) *a_.step = step_ + 1;
      }
    } else if (threadIdx.x == kWarpSize) {
      s_.reward = reward_factor(s_.mean_magnitude, step_, a_.curriculum_power) * kLog2E;
    }
    __syncthreads();
  }

  // Writes the scores and calls place(i, valid, score) for each sample and, with a score of NaN,
  // for the numbers past the end that complete a round. Where no sample takes part, the passes since
  // mask() may be left out.
  template <class Place>
  __device__ __forceinline__ void mix(Place&& place) {
    const int methods = s_.valid > 0 ? a_.method_count : 0;
    for_each_items([&](const Items<U>& items) {
      float mixture[U] = {};
      FASTSEL_UNROLL_BY(1)
      for (int m = 0; m < methods; ++m) {
        float power[U];
        powers(m, items, power);
        const float share = s_.share[m];
        FASTSEL_UNROLL
        for (int u = 0; u < U; ++u) mixture[u] += share * power[u];
      }
      FASTSEL_UNROLL
      for (int u = 0; u < U; ++u) {
        constexpr double kLargest = kLargestRewardExponent * kLog2E;
        const double exponent = items.loss[u] * s_.reward;
        const float reward =
            fast_exp2(static_cast<float>(exponent > kLargest ? kLargest : exponent));
        const float score = items.valid[u] ? reward * mixture[u] : NAN;
        const unsigned i = items.first + u * kThreads;
        if (i < end_) a_.scores[i] = score;
        place(i, items.valid[u], score);
      }
    });
  }

 private:
  // Its sums are known, and its powers all 1.
  __device__ __forceinline__ bool is_uniform(unsigned m) const {
    return a_.methods[m] == static_cast<int>(Method::uniform);
  }

  // N samples of a thread: first, first + kThreads, ... The loss of one that does not take part is 0.
  template <int N>
  struct Items {
    unsigned first;
    double loss[N];
    bool valid[N];
  };

  template <class F>
  __device__ __forceinline__ void for_each_items(F&& f) {
    FASTSEL_UNROLL_BY(1)
    for (unsigned round = begin_; round < end_; round += kRound) {
      Items<U> items;
      items.first = round + threadIdx.x;
      FASTSEL_UNROLL
      for (int u = 0; u < U; ++u) {
        const float loss = rows_.losses[items.first + u * kThreads];
        items.valid[u] = is_finite(loss);
        items.loss[u] = static_cast<double>(items.valid[u] ? loss : 0.0f);
      }
      f(items);
    }
  }

  // adaboost's statistics are computed and kept for good when they are met first.
  enum class Pass { pivot, first, later };

  // The method's statistic of each of the samples that take part; some number for the others. For
  // the pivot, a number in the range of the batch's statistics.
  template <Pass kPass, int N>
  __device__ __forceinline__ void statistics(int m, const Items<N>& items, double (&out)[N]) const {
    const auto each = [&](auto&& statistic) {
      FASTSEL_UNROLL
      for (int n = 0; n < N; ++n) out[n] = statistic(n);
    };
    const auto values = [&](const T* row) {
      return [&items, from = row + items.first](int n) {
        return items.valid[n] ? static_cast<double>(to_float(from[n * kThreads])) : 0.0;
      };
    };
    const auto loss = [&](int n) { return items.loss[n]; };
    const int code = a_.methods[m];
    switch (static_cast<Method>(code)) {
      case Method::uniform: return each([](int) { return 0.0; });
      case Method::big_loss: return each(loss);
      case Method::small_loss: return each([&](int n) { return -loss(n); });
      case Method::grad_norm: return each(values(a_.grad_norms));
      case Method::adaboost: {
        double* kept = rows_.adaboost + items.first;
        return each([&](int n) {
          // If all statistics lie close together, it is here, with that of the largest loss.
          if (kPass == Pass::pivot) return copysign(kAdaboostLargest, s_.mean);
          if (kPass == Pass::later) return kept[n * kThreads];
          return kept[n * kThreads] = 0.5 * log(adaboost_ratio(loss(n), s_.largest_magnitude));
        });
      }
      case Method::coreset1: {
        const unsigned* ranks = rows_.ranks + items.first;
        return each([&](int n) {
          return coreset1_statistic(items.valid[n] ? ranks[n * kThreads] : 0,
                                    static_cast<int64_t>(s_.valid));
        });
      }
      case Method::coreset2: return each([&](int n) { return -fabs(loss(n) - s_.mean); });
      case Method::rho_loss: {
        const auto reference = values(a_.reference_losses);
        return each([&](int n) { return loss(n) - reference(n); });
      }
      default: return each(values(statistics_row(a_, code)));
    }
  }

  // The method's importances, less their common factor: 1 for the largest statistic. The exponent is
  // a float, whose rounding is 2^-25 of it.
  __device__ __forceinline__ void powers(int m, const Items<U>& items, float (&out)[U]) const {
    const double top = s_.top[m], scale = s_.scale[m];
    double statistic[U];
    statistics<Pass::later>(m, items, statistic);
    FASTSEL_UNROLL
    for (int u = 0; u < U; ++u)
      out[u] = fast_exp2(static_cast<float>((statistic[u] - top) * scale));
  }

  template <int kSums, int V>
  __device__ __forceinline__ void store_parts(unsigned group, double (&totals)[V]) {
    const double part = combine_values<kSums, kLanes>(totals);
    if (lane_index() < kLanes)
      s_.parts[(group * kWarps + warp_index()) * kLanes + lane_index()] = part;
  }

  // The totals of what store_parts has stored; `used` of grid_parts are other passes'.
  template <int kSums, int V, class Use>
  __device__ __forceinline__ void totals_of(unsigned groups, unsigned used, Use&& use) {
    double* grid_parts = kGrid ? grid_parts_ + used * gridDim.x : nullptr;
    block_totals<kSums, V, kGrid>(groups, s_.parts, kWarps * kLanes / V, grid_parts, use);
  }

  const AdaSelectionArguments<T>& a_;
  AdaSelectionRows rows_;
  unsigned begin_, end_;
  double* grid_parts_;
  AdaSelectionShared<kThreads>& s_;
  int64_t step_;
  float previous_loss_ = 0, weight_ = 0;
};

}  // namespace fastsel::cuda
