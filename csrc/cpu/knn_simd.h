// The vectorised part of knn, one build an instruction set.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastsel::cpu {

// Points side by side in a panel [D, kKnnPanel], as many as a mask has bits, and queries in a group
// [D, kKnnQueries].
constexpr int64_t kKnnPanel = 32;
constexpr int64_t kKnnQueries = 8;

// What one query found: the offsets of points that may be near enough, in ascending order.
struct KnnHits {
  uint32_t* offsets;  // room for every point of the call
  int64_t count;
};

#define FASTSEL_DECLARE_KNN(ISA)                                                                   \
  namespace ISA {                                                                                  \
  void knn_filter(const float* panel, const float* norms, int64_t dims, const float* queries,      \
                  int64_t groups, const float* limits, float* partial, uint32_t* near);            \
  void knn_leaf(const float* panels, int64_t count, int64_t dims, const float* query, float limit, \
                KnnHits* hits);                                                                    \
  template <class T>                                                                               \
  void knn_scan(const T* rows, int64_t count, int64_t dims, const T* query, float limit,           \
                KnnHits* hits);                                                                    \
  }

// knn_filter: of every point x of a panel and every query q of the groups, which are given as -2 q,
// whether norm - 2 q x is not above the query's limit: a bit in `near` [groups * kKnnQueries].
// `partial` is memory of kKnnPanel floats a query. knn_leaf and knn_scan keep those of `count`
// points, in panels or as they are, whose distance to the query, the sum of squared differences, is
// not above the limit. What is not a number counts as near.
FASTSEL_DECLARE_KNN(baseline)
FASTSEL_DECLARE_KNN(avx2)
FASTSEL_DECLARE_KNN(avx512)
#undef FASTSEL_DECLARE_KNN

}  // namespace fastsel::cpu
