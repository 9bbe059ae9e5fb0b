// knn's argument checks and output shapes, the same for every backend.
#pragma once

#include <tuple>

#include "torch_api.h"

namespace fastsel {

inline void check_knn_arguments(const Tensor& queries, const Tensor& data, int64_t k) {
  FASTSEL_CHECK(queries.dim() == 2 && data.dim() == 2 && queries.size(1) == data.size(1),
                "knn: queries and data must be [Q, D] and [N, D], got ", shape(queries), " and ",
                shape(data));
  FASTSEL_CHECK(queries.scalar_type() == data.scalar_type(),
                "knn: queries and data must have one dtype, got ",
                dtype_name(queries.scalar_type()), " and ", dtype_name(data.scalar_type()));
  FASTSEL_CHECK(k >= 0 && k <= data.size(0), "knn: k must be between 0 and ", data.size(0),
                " (the number of points), got ", k);
  FASTSEL_CHECK(same_device(queries, data), "knn: queries and data must be on one device");
}

// distances and indices: uninitialised [Q, k].
inline std::tuple<Tensor, Tensor> empty_knn(const Tensor& queries, int64_t k) {
  const std::vector<int64_t> size{queries.size(0), k};
  return {empty(size, ScalarType::Float, queries), empty(size, ScalarType::Long, queries)};
}

}  // namespace fastsel
