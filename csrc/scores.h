// sample_scores' argument checks and outputs, the same for every backend.
#pragma once

#include <tuple>

#include "core/scores_arguments.h"
#include "torch_api.h"

namespace fastsel {

using SampleScores =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, grad_norm, entropy, lse: each [B]

inline void check_scores_arguments(const char* op, const Tensor& logits, const Tensor& target) {
  FASTSEL_CHECK(logits.dim() == 2, op, ": logits must be [B, C], got ", shape(logits));
  FASTSEL_CHECK(target.dim() == 1 && target.size(0) == logits.size(0), op,
                ": target must be [B] = [", logits.size(0), "], got ", shape(target));
  FASTSEL_CHECK(target.scalar_type() == ScalarType::Long, op, ": target must be int64, got ",
                dtype_name(target.scalar_type()));
  FASTSEL_CHECK(same_device(logits, target), op, ": logits and target must be on one device");
  FASTSEL_CHECK(logits.size(1) > 0 || logits.size(0) == 0, op,
                ": logits must have at least one class, got ", shape(logits));
}

inline void check_scores_backward_arguments(const char* op, const Tensor& grad_loss,
                                            const Tensor& logits, const Tensor& target,
                                            const Tensor& loss, const Tensor& lse) {
  check_scores_arguments(op, logits, target);
  const ScalarType type =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::pair<const char*, const Tensor&> rows[] = {
      {"grad_loss", grad_loss}, {"loss", loss}, {"lse", lse}};
  for (const auto& [name, tensor] : rows) {
    FASTSEL_CHECK(tensor.dim() == 1 && tensor.size(0) == logits.size(0), op, ": ", name,
                  " must be [B] = [", logits.size(0), "], got ", shape(tensor));
    FASTSEL_CHECK(tensor.scalar_type() == type, op, ": ", name, " must be ", dtype_name(type),
                  ", got ", dtype_name(tensor.scalar_type()));
    FASTSEL_CHECK(same_device(logits, tensor), op, ": logits and ", name, " must be on one device");
  }
}

// The outputs of sample_scores for B rows: uninitialised [B] each.
inline SampleScores empty_scores(const Tensor& logits, ScalarType type) {
  const int64_t batch = logits.size(0);
  return {empty({batch}, type, logits), empty({batch}, type, logits), empty({batch}, type, logits),
          empty({batch}, type, logits)};
}

template <class T>
ScoresArguments<T> scores_arguments(const Tensor& logits, const Tensor& target,
                                    int64_t ignore_index, const SampleScores& out) {
  const auto& [loss, grad_norm, entropy, lse] = out;
  return {data<T>(logits),
          data<int64_t>(target),
          logits.size(0),
          logits.size(1),
          logits.stride(0),
          ignore_index,
          mutable_data<ScoreType<T>>(loss),
          mutable_data<ScoreType<T>>(grad_norm),
          mutable_data<ScoreType<T>>(entropy),
          mutable_data<ScoreType<T>>(lse)};
}

template <class T>
ScoresBackwardArguments<T> scores_backward_arguments(const Tensor& grad_loss, const Tensor& logits,
                                                     const Tensor& target, const Tensor& loss,
                                                     const Tensor& lse, int64_t ignore_index,
                                                     const Tensor& grad_logits) {
  return {data<ScoreType<T>>(grad_loss),
          data<T>(logits),
          data<int64_t>(target),
          data<ScoreType<T>>(loss),
          data<ScoreType<T>>(lse),
          logits.size(0),
          logits.size(1),
          logits.stride(0),
          ignore_index,
          mutable_data<T>(grad_logits)};
}

// Logits as the kernels want them: unit stride along the classes. Rows may lie any distance apart.
inline Tensor with_unit_column_stride(const Tensor& logits) {
  return logits.size(1) <= 1 || logits.stride(1) == 1 ? logits : as_contiguous(logits);
}

}  // namespace fastsel
