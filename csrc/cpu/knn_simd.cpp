// The filter of knn: approximate distances of a few queries to many points, kept in registers and
// compared there.

#include "cpu/knn_simd.h"

#include "cpu/vec.h"

namespace fastsel::cpu::FASTSEL_ISA {

namespace {

// Vectors of points that a step works on, and queries: their sums fill the registers.
constexpr int kVectors = 2;
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif

uint32_t not_above(VecF values, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(limit), _CMP_NGT_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(limit), _CMP_NGT_UQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpngt_ps((__m128)values, _mm_set1_ps(limit))));
#else
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= uint32_t{!(values[lane] > limit)} << lane;
  return mask;
#endif
}

// Adds `dims` dimensions to the sums of kRows queries and kVectors vectors of points.
void multiply(const float* points,   // [dims, kKnnPanel], from the first of the vectors on
              const float* queries,  // [dims, kKnnQueries], from the first of the queries on
              int64_t dims, VecF (&sums)[kRows][kVectors]) {
  for (int64_t d = 0; d < dims; ++d) {
    VecF x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(points + d * kKnnPanel + v * kLanes);
    for (int q = 0; q < kRows; ++q) {
      const VecF times = splat(queries[d * kKnnQueries + q]);
      for (int v = 0; v < kVectors; ++v) sums[q][v] += times * x[v];
    }
  }
}

}  // namespace

void knn_filter(const float* panel, const float* norms, int64_t dims, const float* queries,
                int64_t groups, const float* limits, float* partial, uint32_t* near) {
  // So many dimensions of the panel stay in the first cache while all queries take turns with them.
  constexpr int64_t kSome = 128;
  for (int64_t begin = 0; begin == 0 || begin < dims; begin += kSome) {
    const int64_t some = dims - begin < kSome ? dims - begin : kSome;
    const bool last = begin + some == dims;
    for (int64_t q = 0; q < groups * kKnnQueries; q += kRows) {
      const float* from =
          queries + (q / kKnnQueries * dims + begin) * kKnnQueries + q % kKnnQueries;
      uint32_t found[kRows] = {};
      for (int64_t i = 0; i < kKnnPanel; i += kVectors * kLanes) {
        float* kept = partial + q * kKnnPanel + i;
        VecF sums[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v)
            sums[r][v] = load((begin == 0 ? norms + i : kept + r * kKnnPanel) + v * kLanes);
        multiply(panel + begin * kKnnPanel + i, from, some, sums);
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            if (last) {
              found[r] |= not_above(sums[r][v], limits[q + r]) << (i + v * kLanes);
            } else {
              store(kept + r * kKnnPanel + v * kLanes, sums[r][v]);
            }
          }
        }
      }
      for (int r = 0; last && r < kRows; ++r) near[q + r] = found[r];
    }
  }
}

void knn_leaf(const float* panels, int64_t count, int64_t dims, const float* query, float limit,
              KnnHits* hits) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const float* points = panels + i / kKnnPanel * dims * kKnnPanel + i % kKnnPanel;
    VecF sum{};
    for (int64_t d = 0; d < dims; ++d) {
      const VecF difference = load(points + d * kKnnPanel) - splat(query[d]);
      sum += difference * difference;
    }
    uint32_t near = not_above(sum, limit);
    if (count - i < kLanes) near &= (1u << (count - i)) - 1;
    for (; near != 0; near &= near - 1)
      hits->offsets[found++] = static_cast<uint32_t>(i + __builtin_ctz(near));
  }
  hits->count = found;
}

template <class T>
void knn_scan(const T* rows, int64_t count, int64_t dims, const T* query, float limit,
              KnnHits* hits) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * dims;
    VecF sums{};
    int64_t d = 0;
    for (; d + kLanes <= dims; d += kLanes) {
      const VecF difference = load(row + d) - load(query + d);
      sums += difference * difference;
    }
    float sum = 0;
    for (; d < dims; ++d) {
      const float difference = to_float(row[d]) - to_float(query[d]);
      sum += difference * difference;
    }
    sum += reduce_sum(sums);
    hits->offsets[found] = static_cast<uint32_t>(i);
    found += !(sum > limit);
  }
  hits->count = found;
}

template void knn_scan(const float*, int64_t, int64_t, const float*, float, KnnHits*);
template void knn_scan(const Half*, int64_t, int64_t, const Half*, float, KnnHits*);
template void knn_scan(const BFloat16*, int64_t, int64_t, const BFloat16*, float, KnnHits*);

}  // namespace fastsel::cpu::FASTSEL_ISA
