// neighbor_sample: a warp a draw, all in one launch. The probability of what it drew is the weight of
// every anchor that lists it, which the warp adds up in a fixed order.
//
// As in weighted_sample, wrong arguments give indices that no tensor has, and NaN.
#pragma once

#include "core/random.h"
#include "cuda/sums.cuh"

namespace fastsel::cuda {

template <class Id, class T>
__global__ void neighbor_sample_kernel(const Id* table,  // [rows, width]
                                       int64_t rows, int64_t width,
                                       const int64_t* anchors,  // [count]
                                       const T* weights,        // [count]
                                       int64_t count, const int64_t* seed, int64_t n,
                                       int64_t* indices,  // [n]
                                       float* probs) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  for (int64_t draw = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index(); draw < n;
       draw += warps) {
    double total = 0;
    for (int64_t a = lane_index(); a < count; a += kWarpSize)
      total += anchors[a] >= 0 && anchors[a] < rows ? summand(weights[a]) : NAN;
    total = warp_sum(total);
    if (!(total > 0) || total - total != 0) {
      if (lane_index() == 0) {
        indices[draw] = kNoItem;
        probs[draw] = NAN;
      }
      continue;
    }
    const PhiloxWords words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(draw),
                                     random_stream(RandomStream::neighbor_draws, 0));
    double before = 0;
    const int64_t anchor =
        anchors[find_place(weights, 0, count, before, uniform(words.x, words.y) * total)];
    const Id id = table[anchor * width + uniform_index(words.z, words.w, width)];
    double listed = 0;
    for (int64_t i = lane_index(); i < count * width; i += kWarpSize) {
      const int64_t a = i / width;
      if (table[anchors[a] * width + (i - a * width)] == id) listed += summand(weights[a]);
    }
    listed = warp_sum(listed);
    if (lane_index() != 0) continue;
    const bool known = id >= 0 && id < rows;
    indices[draw] = known ? static_cast<int64_t>(id) : kNoItem;
    probs[draw] = known ? static_cast<float>(listed / (total * static_cast<double>(width))) : NAN;
  }
}

}  // namespace fastsel::cuda
