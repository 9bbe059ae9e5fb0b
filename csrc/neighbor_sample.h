// neighbor_sample's argument checks and output shapes, the same for every backend.
#pragma once

#include <tuple>

#include "weighted_sample.h"

namespace fastsel {

inline void check_neighbor_arguments(const char* op, const Tensor& table, const Tensor& anchors,
                                     const Tensor& anchor_weights) {
  const auto wide = [](const Tensor& t) { return t.scalar_type() == ScalarType::Long; };
  FASTSEL_CHECK(table.dim() == 2, op, ": table must be [N, K], got ", shape(table));
  FASTSEL_CHECK(wide(table) || table.scalar_type() == ScalarType::Int, op,
                ": table must be int64 or int32, got ", dtype_name(table.scalar_type()));
  FASTSEL_CHECK(anchors.dim() == 1 && wide(anchors), op, ": anchors must be [A] of int64, got ",
                shape(anchors), " of ", dtype_name(anchors.scalar_type()));
  FASTSEL_CHECK(anchor_weights.dim() == 1 && anchor_weights.size(0) == anchors.size(0), op,
                ": anchor_weights must be [", anchors.size(0), "] like anchors, got ",
                shape(anchor_weights));
  FASTSEL_CHECK(same_device(table, anchors) && same_device(table, anchor_weights), op,
                ": table, anchors and anchor_weights must be on one device");
}

inline void check_neighbor_sample_arguments(const Tensor& table, const Tensor& anchors,
                                            const Tensor& anchor_weights, int64_t n,
                                            const Tensor& seed) {
  check_neighbor_arguments("neighbor_sample", table, anchors, anchor_weights);
  FASTSEL_CHECK(n >= 0, "neighbor_sample: n must not be negative, got ", n);
  FASTSEL_CHECK(n == 0 || (anchors.size(0) > 0 && table.size(1) > 0),
                "neighbor_sample: there are no neighbours to draw ", n, " from");
  check_seed("neighbor_sample", seed, table);
}

inline void check_neighbor_probs_arguments(const Tensor& table, const Tensor& anchors,
                                           const Tensor& anchor_weights, const Tensor& ids) {
  check_neighbor_arguments("neighbor_probs", table, anchors, anchor_weights);
  FASTSEL_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                "neighbor_probs: ids must be [n] of int64, got ", shape(ids), " of ",
                dtype_name(ids.scalar_type()));
  FASTSEL_CHECK(same_device(table, ids), "neighbor_probs: ids must be on the device of table");
  FASTSEL_CHECK(ids.numel() == 0 || (anchors.size(0) > 0 && table.size(1) > 0),
                "neighbor_probs: there are no neighbours");
}

// indices and probs: uninitialised [n].
inline std::tuple<Tensor, Tensor> empty_neighbor_sample(const Tensor& table, int64_t n) {
  return {empty({n}, ScalarType::Long, table), empty({n}, ScalarType::Float, table)};
}

}  // namespace fastsel
