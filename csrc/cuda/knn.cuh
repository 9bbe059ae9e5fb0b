// knn: tiles of approximate distances that never leave the chip, and in the same kernel the choice
// among them.
//
// A block takes kKnnTile queries and goes through its part of the points, kKnnTile at a time: their
// inner products in registers, then norm - 2 q x in shared memory, where a warp looks for points not
// above its query's limit. Of those few the distance itself is computed (core/knn.h) and put on the
// query's list, which is sorted when it is full; its k-th distance is the next limit. Where there are
// few queries several blocks share the points, and a second kernel merges their lists.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/knn.h"
#include "cuda/norm_sums.cuh"
#include "cuda/topk_keys.cuh"
#include "cuda/tuning.h"

namespace fastsel::cuda {

// Queries, and points, of a tile; dimensions of one step of its products; a thread's share of it.
inline constexpr int kKnnTile = 64;
inline constexpr int kKnnDepth = 16;
inline constexpr int kKnnShare = 4;
inline constexpr int kKnnThreads = (kKnnTile / kKnnShare) * (kKnnTile / kKnnShare);

// Norms up to this can be added and subtracted in float; of larger ones nothing is rejected.
inline constexpr float kKnnMostNorm = 1e37f;

// A key of a distance and the point's index: their order is the result's.
using KnnEntry = unsigned long long;
inline constexpr KnnEntry kKnnNothing = ~0ull;

__device__ __forceinline__ KnnEntry knn_entry(float distance, unsigned index) {
  return static_cast<KnnEntry>(distance_key(distance)) << 32 | index;
}

template <class T>
struct KnnArguments {
  const T* queries;  // [query_count, dims]
  int64_t query_count;
  const T* points;  // [count, dims]
  unsigned count;
  int64_t dims;
  const float* query_norms;  // [query_count], shortened by what the filter may be wrong by
  const float* point_norms;  // [count]
  unsigned k;
  unsigned capacity;  // of a list: a power of two, at least k + kKnnTile
  unsigned parts;     // the points are shared by so many blocks
  KnnEntry* lists;    // [query_count, parts, capacity]
  float* distances;   // [query_count, k]
  int64_t* indices;
};

// Sorts entries[0..size) of one warp, size a power of two, smallest first.
__device__ inline void warp_sort(KnnEntry* entries, unsigned size) {
  for (unsigned run = 2; run <= size; run *= 2) {
    for (unsigned stride = run / 2; stride > 0; stride /= 2) {
      __syncwarp();
      for (unsigned i = lane_index(); i < size / 2; i += kWarpSize) {
        const unsigned low = (i & ~(stride - 1)) << 1 | (i & (stride - 1)), high = low + stride;
        const KnnEntry a = entries[low], b = entries[high];
        if ((a > b) == ((low & run) == 0)) {
          entries[low] = b;
          entries[high] = a;
        }
      }
    }
  }
  __syncwarp();
}

// Of a list of `count` entries the k best, in order, the rest of it nothing; returns their number.
__device__ inline unsigned keep_nearest(KnnEntry* list, unsigned count, unsigned capacity,
                                        unsigned k) {
  for (unsigned i = count + lane_index(); i < capacity; i += kWarpSize) list[i] = kKnnNothing;
  warp_sort(list, capacity);
  return min(count, k);
}

// What norm - 2 q x must not exceed, of a list whose k best are in order.
__device__ __forceinline__ float knn_limit(const KnnEntry* list, unsigned count, unsigned k,
                                           float query_norm, int64_t dims) {
  if (!(query_norm <= kKnnMostNorm)) return NAN;  // to which nothing compares
  if (count < k) return INFINITY;
  const float farthest = key_distance(static_cast<uint32_t>(list[k - 1] >> 32));
  const float limit = farthest * (1 + 0x1p-19f) - query_norm;
  return limit + fabsf(limit) * 0x1p-20f + fabsf(query_norm) * 0x1p-22f + underflow_room(dims);
}

// A warp a row: its squared norm, made smaller by the share that the filter may be wrong by: twice
// dims + 2 roundings. Not a number where it is too large.
template <class T>
__global__ void knn_norms_kernel(const T* rows,  // [count, dims]
                                 int64_t count, int64_t dims, float* norms) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  for (int64_t row = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index(); row < count;
       row += warps) {
    double sum = 0;
    for (int64_t d = lane_index(); d < dims; d += kWarpSize) {
      const double value = as_double(rows[row * dims + d]);
      sum += value * value;
    }
    sum = warp_sum(sum) * (1 - static_cast<double>(dims + 40) * 0x1p-23);
    if (lane_index() == 0)
      norms[row] = sum <= static_cast<double>(kKnnMostNorm) ? static_cast<float>(sum) : NAN;
  }
}

struct KnnStorage {
  float queries[kKnnDepth][kKnnTile];
  float points[kKnnDepth][kKnnTile];
  float approximate[kKnnTile][kKnnTile + 1];
  float limits[kKnnTile];
  unsigned counts[kKnnTile];
};

// kKnnDepth dimensions of kKnnTile rows into shared memory, zero beyond either end.
template <class T>
__device__ __forceinline__ void load_tile(const T* rows, int64_t first, int64_t count,
                                          int64_t depth, int64_t dims,
                                          float (&tile)[kKnnDepth][kKnnTile]) {
  for (unsigned i = threadIdx.x; i < kKnnDepth * kKnnTile; i += kKnnThreads) {
    const unsigned d = i % kKnnDepth, row = i / kKnnDepth;
    const bool inside = first + row < count && depth + d < dims;
    tile[d][row] = inside ? to_float(rows[(first + row) * dims + depth + d]) : 0.0f;
  }
}

template <class T>
__global__ void __launch_bounds__(kKnnThreads) knn_kernel(KnnArguments<T> a) {
  auto& s = block_shared<KnnStorage>();
  const int64_t first_query = int64_t{blockIdx.x} * kKnnTile;
  const unsigned part = blockIdx.y;
  const unsigned tiles = (a.count + kKnnTile - 1) / kKnnTile;
  const auto edge = [&](unsigned p) {
    return static_cast<unsigned>(static_cast<uint64_t>(tiles) * p / a.parts) * kKnnTile;
  };
  const unsigned begin = edge(part), end = min(a.count, edge(part + 1));
  const unsigned column = threadIdx.x % (kKnnTile / kKnnShare) * kKnnShare;
  const unsigned line = threadIdx.x / (kKnnTile / kKnnShare) * kKnnShare;
  constexpr unsigned kWarps = kKnnThreads / kWarpSize;

  for (unsigned q = threadIdx.x; q < kKnnTile; q += kKnnThreads) {
    const int64_t query = first_query + q;
    s.counts[q] = 0;
    s.limits[q] =
        query < a.query_count ? knn_limit(nullptr, 0, a.k, a.query_norms[query], a.dims) : NAN;
  }
  const auto list_of = [&](int64_t query) {
    return a.lists + (query * a.parts + part) * a.capacity;
  };

  for (unsigned first = begin; first < end; first += kKnnTile) {
    float sums[kKnnShare][kKnnShare] = {};
    __syncthreads();  // the tile before has been looked through
    for (int64_t depth = 0; depth < a.dims; depth += kKnnDepth) {
      __syncthreads();
      load_tile(a.queries, first_query, a.query_count, depth, a.dims, s.queries);
      load_tile(a.points, first, a.count, depth, a.dims, s.points);
      __syncthreads();
      for (int d = 0; d < kKnnDepth; ++d) {
        FASTSEL_UNROLL
        for (int i = 0; i < kKnnShare; ++i) {
          FASTSEL_UNROLL
          for (int j = 0; j < kKnnShare; ++j)
            sums[i][j] += s.queries[d][line + i] * s.points[d][column + j];
        }
      }
    }
    FASTSEL_UNROLL
    for (int j = 0; j < kKnnShare; ++j) {
      const unsigned point = first + column + j;
      const float norm = point < end ? a.point_norms[point] : INFINITY;
      FASTSEL_UNROLL
      for (int i = 0; i < kKnnShare; ++i)
        s.approximate[line + i][column + j] = norm - 2 * sums[i][j];
    }
    __syncthreads();

    for (unsigned q = warp_index(); q < kKnnTile; q += kWarps) {
      const int64_t query = first_query + q;
      if (query >= a.query_count) continue;
      KnnEntry* list = list_of(query);
      unsigned count = s.counts[q];
      bool grew = false;
      for (unsigned base = 0; base < kKnnTile; base += kWarpSize) {
        const unsigned at = base + lane_index(), point = first + at;
        const bool near = point < end && !(s.approximate[q][at] > s.limits[q]);
        const unsigned mask = __ballot_sync(kFullMask, near);
        if (near) {
          const unsigned slot = count + __popc(mask & ((1u << lane_index()) - 1));
          list[slot] = knn_entry(
              squared_distance(a.queries + query * a.dims, a.points + point * a.dims, a.dims),
              point);
        }
        count += __popc(mask);
        grew |= mask != 0;
      }
      const bool first_full = s.limits[q] == INFINITY && count >= a.k;
      if (grew && (count + kKnnTile > a.capacity || first_full)) {
        count = keep_nearest(list, count, a.capacity, a.k);
        const float limit = knn_limit(list, count, a.k, a.query_norms[query], a.dims);
        if (lane_index() == 0) s.limits[q] = limit;
      }
      __syncwarp();
      if (lane_index() == 0) s.counts[q] = count;
      __syncwarp();
    }
  }

  __syncthreads();
  for (unsigned q = warp_index(); q < kKnnTile; q += kWarps) {
    const int64_t query = first_query + q;
    if (query >= a.query_count) continue;
    KnnEntry* list = list_of(query);
    keep_nearest(list, s.counts[q], a.capacity, a.k);
    if (a.parts > 1) continue;
    for (unsigned i = lane_index(); i < a.k; i += kWarpSize) {
      a.distances[query * a.k + i] = key_distance(static_cast<uint32_t>(list[i] >> 32));
      a.indices[query * a.k + i] = static_cast<unsigned>(list[i]);
    }
  }
}

// Merges a query's lists: a warp a query. Each list in turn goes into the second half of the first.
template <class T>
__global__ void knn_merge_kernel(KnnArguments<T> a) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  for (int64_t query = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index();
       query < a.query_count; query += warps) {
    KnnEntry* whole = a.lists + query * a.parts * a.capacity;
    for (unsigned part = 1; part < a.parts; ++part) {
      const KnnEntry* other = whole + int64_t{part} * a.capacity;
      for (unsigned done = 0; done < a.k; done += a.capacity - a.k) {
        for (unsigned i = lane_index(); i < a.capacity - a.k; i += kWarpSize)
          whole[a.k + i] = done + i < a.k ? other[done + i] : kKnnNothing;
        warp_sort(whole, a.capacity);
      }
    }
    for (unsigned i = lane_index(); i < a.k; i += kWarpSize) {
      a.distances[query * a.k + i] = key_distance(static_cast<uint32_t>(whole[i] >> 32));
      a.indices[query * a.k + i] = static_cast<unsigned>(whole[i]);
    }
  }
}

}  // namespace fastsel::cuda
