// adaselection_ on the CPU: one decision of AdaSelection, scores and choice.
//
// 1. Score the samples in float32 (cpu/adaselection_float.cpp); the same pass that takes the first
//    sums finds out whether everything is finite.
// 2. Where it is not, leave out the samples concerned and score the others, gathered; where
//    magnitudes are beyond float32 sums, or losses are float64, score in double.
// 3. Choose the k best scores exactly (cpu/select.h), in ascending order of index.

#include "adaselection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>

#include "cpu/adaselection_score.h"
#include "cpu/adaselection_simd.h"
#include "cpu/select.h"

namespace fastsel::cpu {

namespace {

template <class T>
AdaSelectionMethods methods_of(const AdaSelectionArguments<T>& a) {
  return {a.method_count, a.methods,        a.beta,          a.curriculum_power,
          a.standardize,  a.method_weights, a.method_losses, a.step};
}

template <class T>
AdaSelectionBatch<T> batch_of(const AdaSelectionArguments<T>& a) {
  AdaSelectionBatch<T> batch{a.batch, a.losses, {}};
  for (int m = 0; m < a.method_count; ++m) {
    const int code = a.methods[m];
    if (code == static_cast<int>(Method::grad_norm)) batch.inputs[m] = a.grad_norms;
    if (code == static_cast<int>(Method::rho_loss)) batch.inputs[m] = a.reference_losses;
    if (code >= kFirstStatistic)
      batch.inputs[m] = a.statistics + (code - kFirstStatistic) * a.statistics_stride;
  }
  return batch;
}

// The k best scores, none of which is NaN or negative, in ascending order of index.
void choose(const double* scores, int64_t n, int64_t k, int64_t* indices) {
  if (k == 0) return;
  const auto best = select_best(scores, n, k, true);
  std::copy_n(best.indices.data(), k, indices);
}

void choose(const float* scores, int64_t n, int64_t k, int64_t* indices) {
  // Up to here, counting among all scores beats looking at a sample first.
  constexpr int64_t kCounted = 8192;
  if (k == 0) return;
  if (n > kCounted) {
    const auto best = select_best(scores, n, k, true);
    std::copy_n(best.indices.data(), k, indices);
    return;
  }
  // The bits of what is not negative are its order already; topk's keys have the sign bit besides.
  auto cut = cut_few(reinterpret_cast<const uint32_t*>(scores), n, k);
  cut.key |= 0x80000000u;
  collect_best(scores, n, cut, true, indices);
}

// A batch of other element type, or without some samples.
template <class Real>
class GatheredBatch {
 public:
  template <class T, class Gather>
  GatheredBatch(const AdaSelectionBatch<T>& from, int count, int64_t size, const Gather& gather)
      : batch_{size, nullptr, {}}, memory_(new Real[size * (1 + count)]) {
    Real* next = memory_.get();
    const auto add = [&](const T* values) {
      gather(values, next);
      return std::exchange(next, next + size);
    };
    batch_.losses = add(from.losses);
    for (int m = 0; m < count; ++m) {
      if (from.inputs[m] != nullptr) batch_.inputs[m] = add(from.inputs[m]);
    }
  }

  const AdaSelectionBatch<Real>& get() const { return batch_; }

 private:
  AdaSelectionBatch<Real> batch_;
  std::unique_ptr<Real[]> memory_;
};

template <class T>
bool is_finite(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return std::isfinite(value);
  } else {
    return std::isfinite(to_float(value));
  }
}

template <class T>
std::vector<int64_t> finite_samples(const AdaSelectionBatch<T>& batch, int count) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < batch.size; ++i) {
    bool finite = is_finite(batch.losses[i]);
    for (int m = 0; m < count && finite; ++m)
      finite = batch.inputs[m] == nullptr || is_finite(batch.inputs[m][i]);
    if (finite) found.push_back(i);
  }
  return found;
}

void score_gathered(const AdaSelectionBatch<double>& batch, const AdaSelectionMethods& methods,
                    double* scores) {
  score_samples(batch, methods, scores);
}

void score_gathered(const AdaSelectionBatch<float>& batch, const AdaSelectionMethods& methods,
                    float* scores) {
  if (score_samples(batch, methods, scores) == Scored::done) return;
  const GatheredBatch<double> wide(
      batch, methods.count, batch.size,
      [&](const float* from, double* to) { std::copy_n(from, batch.size, to); });
  std::vector<double> wide_scores(batch.size);
  score_samples(wide.get(), methods, wide_scores.data());
  std::transform(wide_scores.begin(), wide_scores.end(), scores,
                 [](double score) { return static_cast<float>(score); });
}

// Any batch, in whatever way it takes.
template <class T>
void decide_carefully(const AdaSelectionArguments<T>& a) {
  using Real = ScoreType<T>;
  const AdaSelectionBatch<T> batch = batch_of(a);
  const std::vector<int64_t> samples = finite_samples(batch, a.method_count);
  const auto n = static_cast<int64_t>(samples.size());
  std::fill_n(a.scores, a.batch, std::numeric_limits<Real>::quiet_NaN());
  std::vector<int64_t> chosen(std::min(a.k, n));
  if (n > 0) {
    const GatheredBatch<Real> gathered(batch, a.method_count, n, [&](const T* from, Real* to) {
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<T, double>) {
          to[i] = from[samples[i]];
        } else {
          to[i] = to_float(from[samples[i]]);
        }
      }
    });
    std::vector<Real> scores(n);
    score_gathered(gathered.get(), methods_of(a), scores.data());
    for (int64_t i = 0; i < n; ++i) a.scores[samples[i]] = scores[i];
    choose(scores.data(), n, static_cast<int64_t>(chosen.size()), chosen.data());
  }
  for (int64_t& index : chosen) index = samples[index];
  // Of the excluded the first, as many as are missing.
  for (int64_t i = 0, sample = 0; static_cast<int64_t>(chosen.size()) < a.k; ++i) {
    if (sample < n && samples[sample] == i) {
      ++sample;
    } else {
      chosen.push_back(i);
    }
  }
  std::sort(chosen.begin(), chosen.end());
  std::copy(chosen.begin(), chosen.end(), a.indices);
  if (a.excluded != nullptr) *a.excluded += a.batch - n;
}

Scored score_as_it_is(const AdaSelectionArguments<float>& a) {
  return score_samples(batch_of(a), methods_of(a), a.scores);
}

template <class T>
Scored score_as_it_is(const AdaSelectionArguments<T>& a) {  // sixteen-bit
  const GatheredBatch<float> wide(
      batch_of(a), a.method_count, a.batch,
      [&](const T* from, float* to) { FASTSEL_DISPATCH_ISA(widen, from, 0, a.batch, to); });
  return score_samples(wide.get(), methods_of(a), a.scores);
}

template <class T>
void decide(const AdaSelectionArguments<T>& a) {
  if constexpr (!std::is_same_v<T, double>) {
    if (a.batch > 0 && score_as_it_is(a) == Scored::done) {
      choose(a.scores, a.batch, a.k, a.indices);
      return;
    }
  }
  decide_carefully(a);
}

}  // namespace

std::tuple<Tensor, Tensor> adaselection_cpu(Tensor losses,                           // [B]
                                            std::optional<Tensor> grad_norms,        // [B]
                                            std::optional<Tensor> reference_losses,  // [B]
                                            std::vector<int64_t> methods,            // [M]
                                            Tensor method_weights,                   // [M]
                                            Tensor method_losses,                    // [M]
                                            Tensor step,                             // [1]
                                            int64_t k, double beta, double curriculum_power,
                                            bool standardize,
                                            std::optional<Tensor> statistics,  // [S, B]
                                            std::optional<Tensor> excluded) {  // [1]
  AdaSelectionCall call{std::move(losses),
                        std::move(grad_norms),
                        std::move(reference_losses),
                        std::move(methods),
                        std::move(method_weights),
                        std::move(method_losses),
                        std::move(step),
                        k,
                        beta,
                        curriculum_power,
                        standardize,
                        std::move(statistics),
                        std::move(excluded)};
  check_adaselection_arguments(call);
  FASTSEL_CHECK(call.losses.size(0) < INT32_MAX, "adaselection_: losses must be fewer than ",
                INT32_MAX, ", got ", call.losses.size(0));
  const int64_t now = *data<int64_t>(call.step);
  FASTSEL_CHECK(now >= 0, "adaselection_: step must not be negative, got ", now);
  make_unit_stride(call);
  Tensor indices, scores;  // not a structured binding: clang captures none in a lambda
  std::tie(indices, scores) = empty_adaselection(call);
  dispatch_floating_and_double("adaselection_", "losses", call.losses.scalar_type(), [&](auto tag) {
    decide(adaselection_arguments<typename decltype(tag)::type>(call, indices, scores));
  });
  return {indices, scores};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("adaselection_", TORCH_BOX(&fastsel::cpu::adaselection_cpu));
}
