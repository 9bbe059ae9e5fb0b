// topk's argument checks and output shapes, the same for every backend.
#pragma once

#include <tuple>

#include "torch_api.h"

namespace fastsel {

inline void check_topk_arguments(const Tensor& scores, int64_t k) {
  FASTSEL_CHECK(scores.dim() >= 1, "topk: scores must have at least one dimension, got ",
                shape(scores));
  const int64_t n = scores.size(scores.dim() - 1);
  FASTSEL_CHECK(k >= 0 && k <= n, "topk: k must be between 0 and ", n,
                " (the size of the last dimension), got ", k);
}

// values and indices for scores [..., N]: uninitialised [..., k].
inline std::tuple<Tensor, Tensor> empty_topk(const Tensor& scores, int64_t k) {
  std::vector<int64_t> size(scores.sizes().begin(), scores.sizes().end());
  size.back() = k;
  return {empty(size, scores.scalar_type(), scores), empty(size, ScalarType::Long, scores)};
}

// csrc/cuda/topk.cu, for the launchers of other ops that end in a top-k.
std::tuple<Tensor, Tensor> topk_cuda(const Tensor& scores, int64_t k, bool largest, bool sorted);

}  // namespace fastsel
