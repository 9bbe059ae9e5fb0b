// The scores of adaselection_ in float32: one pass for the moments of what the methods look at, one
// for those statistics that need the moments of the losses first, one for the exponentials, and,
// with the methods' new weights, one for the scores. Passes go over chunks of fixed size, whose sums
// are added in order, so that no thread count shows in the result.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/adaselection_ranks.h"
#include "cpu/adaselection_score.h"
#include "cpu/adaselection_simd.h"
#include "cpu/isa.h"
#include "torch_api.h"

namespace fastsel::cpu {

namespace {

constexpr int64_t kChunk = 8192;
// Up to this many losses ranking by counting, n^2 / 16 comparisons, beats a sort.
constexpr int64_t kCountedRanks = 256;
// Between these magnitudes no difference, square or reciprocal below leaves the range of float32.
constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p100f;

// Calls f(chunk, begin, end).
template <class F>
void each_chunk(int64_t n, const F& f) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min(n, (c + 1) * kChunk));
  };
  if (chunks <= 2) {
    run(0, chunks);
  } else {
    torch::stable::parallel_for(0, chunks, 1, run);
  }
}

// The parts that f(part, begin, end) fills for each chunk, added up in order.
template <class Sums, class F>
Sums sum_over_chunks(int64_t n, const F& f) {
  Sums all;
  if (n <= kChunk) {
    f(all, 0, n);
    return all;
  }
  std::vector<Sums> parts((n + kChunk - 1) / kChunk);
  each_chunk(n, [&](int64_t c, int64_t begin, int64_t end) { f(parts[c], begin, end); });
  for (const Sums& part : parts) all += part;
  return all;
}

struct AllMoments {
  Moments losses;
  Moments methods[kMaxMethods];

  void operator+=(const AllMoments& other) {
    const auto add = [](Moments& a, const Moments& b) {
      a.min = std::min(a.min, b.min);
      a.max = std::max(a.max, b.max);
      a.sum += b.sum;
      a.sum_sq += b.sum_sq;
      a.finite &= b.finite;
    };
    add(losses, other.losses);
    for (int m = 0; m < kMaxMethods; ++m) add(methods[m], other.methods[m]);
  }
};

struct AllSums {
  SoftmaxSums methods[kMaxMethods];

  void operator+=(const AllSums& other) {
    for (int m = 0; m < kMaxMethods; ++m) {
      methods[m].sum += other.methods[m].sum;
      methods[m].weighted_loss += other.methods[m].weighted_loss;
    }
  }
};

struct Magnitudes {
  double sum = 0;
  void operator+=(const Magnitudes& other) { sum += other.sum; }
};

// Scratch memory, at hand for batches of ordinary size.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats <= kAtHand) return;
    large_.reset(new float[floats + kAlignment]);
    const auto address = reinterpret_cast<uintptr_t>(large_.get());
    next_ = large_.get() + (-(address / sizeof(float)) & (kAlignment - 1));
  }

  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  static constexpr int64_t kAtHand = 4096, kAlignment = 16;
  alignas(64) float at_hand_[kAtHand];
  std::unique_ptr<float[]> large_;
  float* next_ = at_hand_;
};

float largest_magnitude(const Moments& m) { return std::max(std::fabs(m.min), std::fabs(m.max)); }

bool is_extreme(const Moments& m) {
  const float largest = largest_magnitude(m);
  return largest > kLargest || (largest > 0 && largest < kSmallest);
}

// A method that is not uniform.
struct Term {
  Statistic statistic;
  float shift = 0;         // that the moments are taken about
  bool of_losses = false;  // the losses' own moments are the statistic's
  float sign = 1;
  float* out = nullptr;  // [n]: the statistic, where it has to be stored, and then its exponentials
  float anchor = 0, factor = 0;

  void measure(int64_t begin, int64_t end, Moments& moments) const {
    FASTSEL_DISPATCH_ISA(add_moments, statistic, begin, end, shift, moments);
  }

  void exponentiate(const float* losses, int64_t begin, int64_t end, SoftmaxSums& sums) const {
    FASTSEL_DISPATCH_ISA(exponentials, statistic, losses, begin, end, anchor, factor, out, sums);
  }
};

class FloatScores {
 public:
  FloatScores(const AdaSelectionBatch<float>& batch, const AdaSelectionMethods& methods)
      : batch_(batch),
        methods_(methods),
        padded_((batch.size + 15) / 16 * 16),
        scratch_(padded_ * methods.count) {}

  Scored run(float* scores) {
    measure_inputs();
    if (const Scored found = check_inputs(); found != Scored::done) return found;
    measure_derived();
    exponentiate();
    mix(scores);
    return Scored::done;
  }

 private:
  bool is_derived(int m) const {
    return methods_.is(m, Method::adaboost) || methods_.is(m, Method::coreset1) ||
           methods_.is(m, Method::coreset2);
  }

  bool has_own_input(int m) const { return batch_.inputs[m] != nullptr; }

  double mean(const Moments& moments, float shift) const {
    return shift + moments.sum / static_cast<double>(batch_.size);
  }

  double deviation(const Moments& moments) const {
    const auto n = static_cast<double>(batch_.size);
    // Taken about one of the samples, the sums cancel by a factor of at most n + 1.
    return std::sqrt(std::max(0.0, (moments.sum_sq - moments.sum * (moments.sum / n)) / n));
  }

  void measure_inputs() {
    for (int m = 0; m < methods_.count; ++m) {
      if (methods_.is(m, Method::uniform)) continue;
      Term& term = terms_[m];
      term.statistic.values = batch_.losses;
      term.out = scratch_.take(padded_);
      term.sign = methods_.is(m, Method::small_loss) || methods_.is(m, Method::coreset2) ? -1 : 1;
      term.of_losses = methods_.is(m, Method::big_loss) || methods_.is(m, Method::small_loss);
      if (!has_own_input(m)) continue;
      term.shift = batch_.inputs[m][0];
      term.statistic.values = batch_.inputs[m];
      if (methods_.is(m, Method::rho_loss)) {
        term.shift = batch_.losses[0] - batch_.inputs[m][0];
        term.statistic = {Statistic::Form::difference, batch_.losses, batch_.inputs[m], 0, 0};
      }
    }
    Statistic losses;
    losses.values = batch_.losses;
    const float shift = batch_.losses[0];
    moments_ =
        sum_over_chunks<AllMoments>(batch_.size, [&](AllMoments& part, int64_t begin, int64_t end) {
          FASTSEL_DISPATCH_ISA(add_moments, losses, begin, end, shift, part.losses);
          for (int m = 0; m < methods_.count; ++m) {
            if (has_own_input(m)) terms_[m].measure(begin, end, part.methods[m]);
          }
        });
    mean_ = mean(moments_.losses, shift);
  }

  Scored check_inputs() const {
    bool finite = moments_.losses.finite, extreme = is_extreme(moments_.losses);
    for (int m = 0; m < methods_.count; ++m) {
      if (!has_own_input(m)) continue;
      finite &= moments_.methods[m].finite;
      extreme |= is_extreme(moments_.methods[m]);
    }
    if (!finite) return Scored::not_finite;
    return extreme ? Scored::too_extreme : Scored::done;
  }

  // Statistics that depend on all losses.
  void measure_derived() {
    const int64_t n = batch_.size;
    const float largest = largest_magnitude(moments_.losses);
    bool any = false;
    for (int m = 0; m < methods_.count; ++m) {
      if (!is_derived(m)) continue;
      any = true;
      Term& term = terms_[m];
      if (methods_.is(m, Method::coreset2)) {
        const auto high = static_cast<float>(mean_);
        const auto low = static_cast<float>(mean_ - static_cast<double>(high));
        term.statistic = {Statistic::Form::deviation, batch_.losses, nullptr, high, low};
        term.shift = std::fabs((batch_.losses[0] - high) - low);
        continue;
      }
      term.statistic.values = term.out;
      if (methods_.is(m, Method::coreset1)) {
        if (n <= kCountedRanks) {
          FASTSEL_DISPATCH_ISA(coreset1_by_counting, batch_.losses, n, term.out);
        } else {
          coreset1_by_sorting(batch_.losses, n, moments_.losses.min, moments_.losses.max, term.out);
        }
      } else {  // the first values, for the shift
        FASTSEL_DISPATCH_ISA(adaboost_statistic, batch_.losses, 0, std::min<int64_t>(n, 16),
                             largest, term.out);
      }
      term.shift = term.out[0];
    }
    if (!any) return;
    const auto derived =
        sum_over_chunks<AllMoments>(n, [&](AllMoments& part, int64_t begin, int64_t end) {
          for (int m = 0; m < methods_.count; ++m) {
            if (!is_derived(m)) continue;
            if (methods_.is(m, Method::adaboost)) {
              FASTSEL_DISPATCH_ISA(adaboost_statistic, batch_.losses, begin, end, largest,
                                   terms_[m].out);
            }
            terms_[m].measure(begin, end, part.methods[m]);
          }
        });
    for (int m = 0; m < methods_.count; ++m) {
      if (is_derived(m)) moments_.methods[m] = derived.methods[m];
    }
  }

  void exponentiate() {
    for (int m = 0; m < methods_.count; ++m) {
      Term& term = terms_[m];
      if (term.out == nullptr) continue;
      const Moments& moments = term.of_losses ? moments_.losses : moments_.methods[m];
      const double divisor =
          spread_divisor(deviation(moments), largest_magnitude(moments), methods_.standardize);
      term.anchor = term.sign > 0 ? moments.max : moments.min;
      term.factor = static_cast<float>(term.sign / divisor);
    }
    sums_ = sum_over_chunks<AllSums>(batch_.size, [&](AllSums& part, int64_t begin, int64_t end) {
      for (int m = 0; m < methods_.count; ++m) {
        if (terms_[m].out != nullptr)
          terms_[m].exponentiate(batch_.losses, begin, end, part.methods[m]);
      }
    });
  }

  double mean_magnitude() const {
    if (moments_.losses.min >= 0) return mean_;
    if (moments_.losses.max <= 0) return -mean_;
    const auto all =
        sum_over_chunks<Magnitudes>(batch_.size, [&](Magnitudes& part, int64_t begin, int64_t end) {
          FASTSEL_DISPATCH_ISA(add_magnitudes, batch_.losses, begin, end, part.sum);
        });
    return all.sum / static_cast<double>(batch_.size);
  }

  void mix(float* scores) const {
    Mixture mixture{};
    mixture.losses = batch_.losses;
    mixture.scores = scores;
    mixture.reward_factor = static_cast<float>(methods_.reward_factor(mean_magnitude()));
    double current[kMaxMethods];
    for (int m = 0; m < methods_.count; ++m) {
      const SoftmaxSums& sums = sums_.methods[m];
      current[m] = terms_[m].out == nullptr ? mean_ : sums.weighted_loss / sums.sum;
    }
    methods_.advance(current);
    for (int m = 0; m < methods_.count; ++m) {
      const double weight = methods_.weights[m];
      if (terms_[m].out == nullptr) {
        mixture.constant = static_cast<float>(weight / static_cast<double>(batch_.size));
      } else {
        mixture.terms[mixture.count] = terms_[m].out;
        mixture.shares[mixture.count++] = static_cast<float>(weight / sums_.methods[m].sum);
      }
    }
    each_chunk(batch_.size, [&](int64_t, int64_t begin, int64_t end) {
      FASTSEL_DISPATCH_ISA(mix, mixture, begin, end);
    });
  }

  const AdaSelectionBatch<float>& batch_;
  const AdaSelectionMethods& methods_;
  const int64_t padded_;
  Scratch scratch_;
  Term terms_[kMaxMethods];
  AllMoments moments_;
  AllSums sums_;
  double mean_ = 0;
};

}  // namespace

Scored score_samples(const AdaSelectionBatch<float>& batch, const AdaSelectionMethods& methods,
                     float* scores) {
  return FloatScores(batch, methods).run(scores);
}

}  // namespace fastsel::cpu
