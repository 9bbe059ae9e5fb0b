// The scores of adaselection_ in double, plainly. Magnitudes are taken out first, as powers of two,
// so that no sum or square of finite numbers overflows.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/adaselection_score.h"

namespace fastsel::cpu {

namespace {

using Values = std::vector<double>;

double largest_magnitude(const Values& values) {
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::fabs(v));
  return largest;
}

// A power of two by which the values are at most 1 in magnitude.
double unit_of(double largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, -std::max(exponent, -1000));
}

double mean_of(const Values& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Statistics in multiples of 1 / unit.
struct Scaled {
  Values values;
  double unit = 1;
};

Scaled scaled(const double* values, size_t n) {
  Scaled out{Values(values, values + n)};
  out.unit = unit_of(largest_magnitude(out.values));
  for (double& v : out.values) v *= out.unit;
  return out;
}

void rank_statistic(const Values& losses, Values& out) {
  std::vector<size_t> order(losses.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return losses[a] < losses[b]; });
  for (size_t rank = 0; rank < order.size(); ++rank) {
    out[order[rank]] =
        coreset1_statistic(static_cast<int64_t>(rank), static_cast<int64_t>(order.size()));
  }
}

Scaled statistic(Method method, const Scaled& losses, const double* raw_losses,
                 const double* input) {
  const Values& l = losses.values;
  const size_t n = l.size();
  Scaled s{Values(n), 1};
  switch (method) {
    case Method::uniform: return s;
    case Method::big_loss: return losses;
    case Method::small_loss:
      s.unit = losses.unit;
      std::transform(l.begin(), l.end(), s.values.begin(), [](double v) { return -v; });
      return s;
    case Method::adaboost: {
      const double largest = largest_magnitude(l);
      std::transform(l.begin(), l.end(), s.values.begin(),
                     [=](double v) { return 0.5 * std::log(adaboost_ratio(v, largest)); });
      return s;
    }
    case Method::coreset1: rank_statistic(l, s.values); return s;
    case Method::coreset2: {
      const double mean = mean_of(l);
      s.unit = losses.unit;
      std::transform(l.begin(), l.end(), s.values.begin(),
                     [=](double v) { return -std::fabs(v - mean); });
      return s;
    }
    case Method::rho_loss: {
      Values halves(n);
      for (size_t i = 0; i < n; ++i) halves[i] = 0.5 * raw_losses[i] - 0.5 * input[i];
      s = scaled(halves.data(), n);
      s.unit *= 0.5;
      return s;
    }
    default: return scaled(input, n);  // grad_norm, a row of statistics
  }
}

// Turns statistics into sample importances.
void softmax(Scaled& s, bool standardize) {
  Values& v = s.values;
  const double mean = mean_of(v), top = *std::max_element(v.begin(), v.end());
  double square = 0;
  for (const double x : v) square += (x - mean) * (x - mean);
  const double std = std::sqrt(square / static_cast<double>(v.size()));
  const double divisor = standardize ? spread_divisor(std, largest_magnitude(v), true) : s.unit;
  for (double& x : v) x = std::exp((x - top) / divisor);
  const double sum = std::accumulate(v.begin(), v.end(), 0.0);
  for (double& x : v) x /= sum;
}

}  // namespace

void score_samples(const AdaSelectionBatch<double>& batch, const AdaSelectionMethods& methods,
                   double* scores) {
  const auto n = static_cast<size_t>(batch.size);
  const Scaled losses = scaled(batch.losses, n);
  std::vector<Values> importances;
  double current[kMaxMethods];
  for (int m = 0; m < methods.count; ++m) {
    const auto method = static_cast<Method>(methods.codes[m]);
    Scaled s = statistic(method, losses, batch.losses, batch.inputs[m]);
    softmax(s, methods.standardize);
    current[m] = std::inner_product(s.values.begin(), s.values.end(), losses.values.begin(), 0.0) /
                 losses.unit;
    importances.push_back(std::move(s.values));
  }
  double magnitudes = 0;
  for (const double v : losses.values) magnitudes += std::fabs(v);
  const double factor = methods.reward_factor(magnitudes / static_cast<double>(n));
  methods.advance(current);
  for (size_t i = 0; i < n; ++i) {
    double importance = 0;
    for (int m = 0; m < methods.count; ++m)
      importance += static_cast<double>(methods.weights[m]) * importances[m][i];
    scores[i] = std::exp(std::min(kLargestRewardExponent, losses.values[i] * factor)) * importance;
  }
}

}  // namespace fastsel::cpu
