// weighted_sample's argument checks and output shapes, the same for every backend.
#pragma once

#include <tuple>

#include "torch_api.h"

namespace fastsel {

// Of a random op's argument: one element, on the device of the tensor that the op works on.
inline void check_seed(const char* op, const Tensor& seed, const Tensor& like) {
  FASTSEL_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                ": seed must be one int64, got ", shape(seed), " of ",
                dtype_name(seed.scalar_type()));
  FASTSEL_CHECK(same_device(seed, like), op, ": seed must be on the device of the other tensors");
}

inline void check_weighted_sample_arguments(const Tensor& weights, int64_t n, const Tensor& seed,
                                            bool replacement) {
  FASTSEL_CHECK(weights.dim() >= 1,
                "weighted_sample: weights must have at least one dimension, got ", shape(weights));
  const int64_t items = weights.size(weights.dim() - 1);
  FASTSEL_CHECK(n >= 0, "weighted_sample: n must not be negative, got ", n);
  FASTSEL_CHECK(replacement || n <= items, "weighted_sample: n must be at most ", items,
                " (the size of the last dimension) without replacement, got ", n);
  FASTSEL_CHECK(n == 0 || items > 0, "weighted_sample: weights has no items to draw ", n, " from");
  check_seed("weighted_sample", seed, weights);
}

// indices and probs for weights [..., N]: uninitialised [..., n].
inline std::tuple<Tensor, Tensor> empty_weighted_sample(const Tensor& weights, int64_t n) {
  std::vector<int64_t> size(weights.sizes().begin(), weights.sizes().end());
  size.back() = n;
  return {empty(size, ScalarType::Long, weights), empty(size, ScalarType::Float, weights)};
}

}  // namespace fastsel
