// adaselection_'s argument checks, outputs and raw arguments, the same for every backend.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "core/adaselection_arguments.h"
#include "torch_api.h"

namespace fastsel {

// The op's arguments, named as in its schema.
struct AdaSelectionCall {
  Tensor losses;                           // [B]
  std::optional<Tensor> grad_norms;        // [B]
  std::optional<Tensor> reference_losses;  // [B]
  std::vector<int64_t> methods;            // [M]
  Tensor method_weights;                   // [M]
  Tensor method_losses;                    // [M]
  Tensor step;                             // one element
  int64_t k;
  double beta;
  double curriculum_power;
  bool standardize;
  std::optional<Tensor> statistics;  // [S, B]
  std::optional<Tensor> excluded;    // one element
};

namespace detail {

inline void check_like_losses(const char* name, const Tensor& tensor, const Tensor& losses) {
  FASTSEL_CHECK(tensor.scalar_type() == losses.scalar_type(), "adaselection_: ", name, " must be ",
                dtype_name(losses.scalar_type()), " as losses are, got ",
                dtype_name(tensor.scalar_type()));
  FASTSEL_CHECK(same_device(tensor, losses), "adaselection_: losses and ", name,
                " must be on one device");
}

inline void check_per_sample(const char* name, const char* method,
                             const std::optional<Tensor>& tensor, const Tensor& losses) {
  FASTSEL_CHECK(tensor.has_value(), "adaselection_: ", name, " must be given for method ", method,
                ", got None");
  FASTSEL_CHECK(tensor->dim() == 1 && tensor->size(0) == losses.size(0), "adaselection_: ", name,
                " must be [B] = [", losses.size(0), "], got ", shape(*tensor));
  check_like_losses(name, *tensor, losses);
}

// A tensor that the op changes in place.
inline void check_state(const char* name, const Tensor& tensor, const Tensor& losses,
                        ScalarType type) {
  FASTSEL_CHECK(tensor.scalar_type() == type, "adaselection_: ", name, " must be ",
                dtype_name(type), ", got ", dtype_name(tensor.scalar_type()));
  FASTSEL_CHECK(tensor.is_contiguous(), "adaselection_: ", name, " must be contiguous");
  FASTSEL_CHECK(same_device(tensor, losses), "adaselection_: losses and ", name,
                " must be on one device");
}

inline void check_method_state(const char* name, const Tensor& tensor,
                               const AdaSelectionCall& call) {
  const auto count = static_cast<int64_t>(call.methods.size());
  FASTSEL_CHECK(tensor.dim() == 1 && tensor.size(0) == count, "adaselection_: ", name,
                " must be [M] = [", count, "], got ", shape(tensor));
  check_state(name, tensor, call.losses, ScalarType::Float);
}

inline void check_counter(const char* name, const Tensor& tensor, const Tensor& losses) {
  FASTSEL_CHECK(tensor.numel() == 1, "adaselection_: ", name, " must have one element, got ",
                shape(tensor));
  check_state(name, tensor, losses, ScalarType::Long);
}

}  // namespace detail

inline bool has_method(const AdaSelectionCall& call, Method method) {
  return std::find(call.methods.begin(), call.methods.end(), static_cast<int64_t>(method)) !=
         call.methods.end();
}

// Whether a row of `statistics` is among the methods.
inline bool has_statistics(const AdaSelectionCall& call) {
  return std::any_of(call.methods.begin(), call.methods.end(),
                     [](int64_t code) { return code >= kFirstStatistic; });
}

inline void check_adaselection_arguments(const AdaSelectionCall& call) {
  const Tensor& losses = call.losses;
  FASTSEL_CHECK(losses.dim() == 1, "adaselection_: losses must be [B], got ", shape(losses));
  FASTSEL_CHECK(call.k >= 0 && call.k <= losses.size(0), "adaselection_: k must be between 0 and ",
                losses.size(0), " (the size of the batch), got ", call.k);
  const auto& methods = call.methods;
  FASTSEL_CHECK(!methods.empty() && methods.size() <= kMaxMethods,
                "adaselection_: methods must be 1 to ", kMaxMethods, " codes, got ",
                methods.size());
  if (has_statistics(call)) {
    FASTSEL_CHECK(call.statistics.has_value(),
                  "adaselection_: statistics must be given for method codes from ", kFirstStatistic,
                  ", got None");
    FASTSEL_CHECK(call.statistics->dim() == 2 && call.statistics->size(1) == losses.size(0),
                  "adaselection_: statistics must be [S, B] with B = ", losses.size(0), ", got ",
                  shape(*call.statistics));
    detail::check_like_losses("statistics", *call.statistics, losses);
  }
  const int64_t codes =
      kFirstStatistic +
      (call.statistics && call.statistics->dim() > 0 ? call.statistics->size(0) : 0);
  for (size_t m = 0; m < methods.size(); ++m) {
    FASTSEL_CHECK(methods[m] >= 0 && methods[m] < codes,
                  "adaselection_: methods must be codes from 0 to ", codes - 1, ", got ",
                  methods[m]);
    FASTSEL_CHECK(
        std::find(methods.begin(), methods.begin() + m, methods[m]) == methods.begin() + m,
        "adaselection_: methods must name each method once, got ", methods[m], " twice");
  }
  if (has_method(call, Method::grad_norm))
    detail::check_per_sample("grad_norms", "grad_norm (3)", call.grad_norms, losses);
  if (has_method(call, Method::rho_loss))
    detail::check_per_sample("reference_losses", "rho_loss (7)", call.reference_losses, losses);
  FASTSEL_CHECK(std::isfinite(call.beta), "adaselection_: beta must be finite, got ", call.beta);
  FASTSEL_CHECK(call.curriculum_power >= 0,
                "adaselection_: curriculum_power must be 0 or more (infinity for no reward), got ",
                call.curriculum_power);
  detail::check_method_state("method_weights", call.method_weights, call);
  detail::check_method_state("method_losses", call.method_losses, call);
  detail::check_counter("step", call.step, losses);
  if (call.excluded) detail::check_counter("excluded", *call.excluded, losses);
}

// What the kernels read, with unit stride along the samples, and drops what no method needs.
inline void make_unit_stride(AdaSelectionCall& call) {
  const auto prepare = [](std::optional<Tensor>& tensor, bool needed) {
    if (!needed) tensor.reset();
    if (!tensor) return;
    const int64_t last = tensor->dim() - 1;
    if (tensor->size(last) > 1 && tensor->stride(last) != 1) tensor = as_contiguous(*tensor);
  };
  call.losses = as_contiguous(call.losses);
  prepare(call.grad_norms, has_method(call, Method::grad_norm));
  prepare(call.reference_losses, has_method(call, Method::rho_loss));
  prepare(call.statistics, has_statistics(call));
}

// indices [k] and scores [B], uninitialised.
inline std::tuple<Tensor, Tensor> empty_adaselection(const AdaSelectionCall& call) {
  const bool wide = call.losses.scalar_type() == ScalarType::Double;
  return {empty({call.k}, ScalarType::Long, call.losses),
          empty({call.losses.size(0)}, wide ? ScalarType::Double : ScalarType::Float, call.losses)};
}

// Of a call that is checked and of unit stride.
template <class T>
AdaSelectionArguments<T> adaselection_arguments(const AdaSelectionCall& call, const Tensor& indices,
                                                const Tensor& scores) {
  const auto optional_data = [](const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
  };
  AdaSelectionArguments<T> a{};
  a.losses = data<T>(call.losses);
  a.grad_norms = optional_data(call.grad_norms);
  a.reference_losses = optional_data(call.reference_losses);
  a.statistics = optional_data(call.statistics);
  a.statistics_stride = call.statistics ? call.statistics->stride(0) : 0;
  a.batch = call.losses.size(0);
  a.k = call.k;
  a.method_count = static_cast<int>(call.methods.size());
  std::copy(call.methods.begin(), call.methods.end(), a.methods);
  a.beta = call.beta;
  a.curriculum_power = call.curriculum_power;
  a.standardize = call.standardize;
  a.method_weights = mutable_data<float>(call.method_weights);
  a.method_losses = mutable_data<float>(call.method_losses);
  a.step = mutable_data<int64_t>(call.step);
  a.excluded = call.excluded ? mutable_data<int64_t>(*call.excluded) : nullptr;
  a.indices = mutable_data<int64_t>(indices);
  a.scores = mutable_data<ScoreType<T>>(scores);
  return a;
}

}  // namespace fastsel
