// csrc/core as pytest sees it: each function a thin call, for tests/test_core.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "core/dtypes.h"
#include "core/philox.h"
#include "core/scores.h"
#include "core/topk_key.h"
#include "core/weighted_sample.h"

namespace {

using fastsel::BFloat16;
using fastsel::Half;
using fastsel::ScoreState;

std::vector<uint32_t> words(fastsel::PhiloxWords w) { return {w.x, w.y, w.z, w.w}; }

std::vector<uint32_t> philox4x32_10(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
  return words(fastsel::philox4x32_10({counter.at(0), counter.at(1), counter.at(2), counter.at(3)},
                                      key.at(0), key.at(1)));
}

// The scores of a row that is summed as `parts` separate states, merged from the left.
std::tuple<double, double, double, double> row_scores(const std::vector<std::vector<double>>& parts,
                                                      double target_logit) {
  ScoreState<double> total;
  for (const auto& part : parts) {
    ScoreState<double> state;
    for (double x : part) state.max = x > state.max ? x : state.max;
    for (double x : part) {
      const double e = exp(x - state.max);
      state.sum += e;
      state.sum_sq += e * e;
      state.weighted += (x - state.max) * e;
    }
    total = fastsel::merge(total, state);
  }
  const auto scores = fastsel::finish_scores(total, target_logit);
  return {scores.loss, scores.grad_norm, scores.entropy, scores.lse};
}

}  // namespace

void bind_core(pybind11::module_& m) {
  m.def("exponential_float", [](uint32_t word, uint32_t low) {
    return fastsel::exponential_of_word(0.0f, word, [=] { return low; });
  });
  m.def("exponential_double", [](uint32_t word, uint32_t low) {
    return fastsel::exponential_of_word(0.0, word, [=] { return low; });
  });
  m.def("quotient_key_float", [](float e, float w) { return fastsel::quotient_key(e, w); });
  m.def("quotient_key_double", [](double e, double w) { return fastsel::quotient_key(e, w); });
  m.def("key_value_float", [](uint32_t key) {
    const auto value = fastsel::key_value(key);
    return std::make_tuple(value.mantissa, value.exponent);
  });
  m.def("key_value_double", [](uint64_t key) {
    const auto value = fastsel::key_value(key);
    return std::make_tuple(value.mantissa, value.exponent);
  });
  m.def("philox4x32_10", &philox4x32_10);
  m.def("philox", [](uint64_t seed, uint64_t index, uint64_t stream) {
    return words(fastsel::philox(seed, index, stream));
  });
  m.def("row_scores", &row_scores);
  m.def("half_to_float", [](uint16_t bits) { return fastsel::to_float(Half{bits}); });
  m.def("bfloat16_to_float", [](uint16_t bits) { return fastsel::to_float(BFloat16{bits}); });
  m.def("float_to_half", [](float v) { return fastsel::from_float<Half>(v).bits; });
  m.def("float_to_bfloat16", [](float v) { return fastsel::from_float<BFloat16>(v).bits; });
  m.def("topk_key_float", [](float v, bool largest) { return fastsel::topk_key(v, largest); });
  m.def("topk_key_double", [](double v, bool largest) { return fastsel::topk_key(v, largest); });
  m.def("topk_key_half",
        [](uint16_t bits, bool largest) { return fastsel::topk_key(Half{bits}, largest); });
  m.def("topk_key_bfloat16",
        [](uint16_t bits, bool largest) { return fastsel::topk_key(BFloat16{bits}, largest); });
}
