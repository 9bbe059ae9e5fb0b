// neighbor_sample and neighbor_probs: a warp a draw or an id, all in one launch. The probability of what it drew is the weight of
// every anchor that lists it, which the warp adds up in a fixed order.
//
// As in weighted_sample, wrong arguments give indices that no tensor has, and NaN.
#pragma once

#include "core/random.h"
#include "cuda/sums.cuh"

namespace fastsel::cuda {

template <class Id, class T>
struct NeighborArguments {
  const Id* table;  // [rows, width]
  int64_t rows, width;
  const int64_t* anchors;  // [count]
  const T* weights;        // [count]
  int64_t count;
  int64_t n;
};

// The weight of all anchors, by a warp; not a number where one of them is wrong.
template <class Id, class T>
__device__ double anchors_total(const NeighborArguments<Id, T>& a) {
  double total = 0;
  for (int64_t i = lane_index(); i < a.count; i += kWarpSize)
    total += a.anchors[i] >= 0 && a.anchors[i] < a.rows ? summand(a.weights[i]) : NAN;
  return warp_sum(total);
}

// The weight of the anchors that list an id, once for each time that one does.
template <class Id, class T>
__device__ double anchors_listing(const NeighborArguments<Id, T>& a, int64_t id) {
  double listed = 0;
  for (int64_t i = lane_index(); i < a.count * a.width; i += kWarpSize) {
    const int64_t anchor = i / a.width;
    if (a.table[a.anchors[anchor] * a.width + (i - anchor * a.width)] == id)
      listed += summand(a.weights[anchor]);
  }
  return warp_sum(listed);
}

template <class Id, class T>
__global__ void neighbor_sample_kernel(NeighborArguments<Id, T> a, const int64_t* seed,
                                       int64_t* indices,  // [n]
                                       float* probs) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  for (int64_t draw = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index(); draw < a.n;
       draw += warps) {
    const double total = anchors_total(a);
    int64_t id = kNoItem;
    float prob = NAN;
    if (total > 0 && total - total == 0) {
      const PhiloxWords words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(draw),
                                       random_stream(RandomStream::neighbor_draws, 0));
      double before = 0;
      const int64_t anchor =
          a.anchors[find_place(a.weights, 0, a.count, before, uniform(words.x, words.y) * total)];
      const int64_t found = a.table[anchor * a.width + uniform_index(words.z, words.w, a.width)];
      if (found >= 0 && found < a.rows) {
        id = found;
        prob = static_cast<float>(anchors_listing(a, id) / (total * static_cast<double>(a.width)));
      }
    }
    if (lane_index() == 0) {
      indices[draw] = id;
      probs[draw] = prob;
    }
  }
}

// How probable ids are to be drawn, a warp an id.
template <class Id, class T>
__global__ void neighbor_probs_kernel(NeighborArguments<Id, T> a, const int64_t* ids,  // [n]
                                      float* probs) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  for (int64_t i = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index(); i < a.n;
       i += warps) {
    const double total = anchors_total(a);
    const bool known = total > 0 && total - total == 0 && ids[i] >= 0 && ids[i] < a.rows;
    const double listed = known ? anchors_listing(a, ids[i]) : NAN;
    if (lane_index() == 0)
      probs[i] = static_cast<float>(listed / (total * static_cast<double>(a.width)));
  }
}

}  // namespace fastsel::cuda
