// adaselection_: one decision of AdaSelection, in one launch of one block for up to 8192 samples.
//
// Minghe Zhang et al., "AdaSelection: Accelerating Deep Learning Training through Data Subsampling",
// sections 3.1 and 3.2; core/adaselection.h has the formulas. In plain words:
//   1. mask     Find the samples that take part, whose inputs are all finite; sum their losses.
//   2. measure  Of each method's statistic take the spread and the largest value.
//   3. weigh    With them, sum the exponentials of its softmax, and those times the losses: the
//               softmax's denominator and the method's loss.
//   4. update   Move the methods' weights by how their losses have changed since the last step.
//   5. mix      A sample's score is the weighted sum of its importances times its reward.
//   6. Keep the k best scores by radix selection (topk.cuh), in index order.
// What we changed: the paper's hundred tensor operations become three passes over the samples that
// end in an exchange of totals, and one that writes the scores. Between passes only the masked loss
// of a sample is kept, because most statistics and an exponential take less than M more numbers a
// sample to store; adaboost's logarithms and coreset1's ranks take more, and are kept too. The
// variance needs no pass for a mean: a statistic is taken relative to that of one sample, the pivot,
// which lies no further from the mean than sqrt(n) standard deviations, so that the difference of
// sums cancels at most the digits of n. Statistics and sums are double, because values that lie close
// together would lose their differences; exponentials are float, as the scores are. Totals are added
// in a fixed order, without atomics.
//
// Two kernels are made of the passes: one block with the kept values in shared memory, and a
// cooperative grid with them in global memory, whose blocks meet where the one block's threads do.
// The grid leaves the choice to topk's launch after it, and the ranks to a sort before it.
#pragma once

#include "cuda/adaselection_passes.cuh"
#include "cuda/topk.cuh"

namespace fastsel::cuda {

// ---- one block ----

// Where the one block keeps its rows in dynamic shared memory, in bytes.
struct AdaSelectionLayout {
  unsigned ranks, adaboost, counts, size;

  // The counts of the ranking are done with before adaboost's row is written.
  __host__ __device__ AdaSelectionLayout(unsigned batch, unsigned threads, bool with_ranks,
                                         bool with_adaboost) {
    const unsigned round = kAdaSelectionUnroll * threads;
    const unsigned row = (batch + round - 1) / round * round * 4;  // of four-byte values
    const unsigned counts_size = with_ranks ? threads / kWarpSize * kRankBins * 4 : 0;
    const unsigned adaboost_size = with_adaboost ? 2 * row : 0;
    ranks = row;
    adaboost = counts = with_ranks ? 2 * row : row;
    size = adaboost + (counts_size > adaboost_size ? counts_size : adaboost_size);
  }
};

// Scores as unsigned integers of the same order, 0 for what is excluded. No score is negative.
__device__ __forceinline__ unsigned score_key(float score) {
  return score >= 0 ? bit_cast<unsigned>(score) + 1 : 0;
}

// The k best of a block's keys, which lie in shared memory before a barrier; `low` and `high` bound
// the k-th.
template <int kDigitBits>
__device__ __forceinline__ void choose(unsigned* keys, unsigned batch, unsigned k, unsigned low,
                                       unsigned high, int64_t* indices) {
  constexpr unsigned kStep = kWarpSize * SharedKeys<TopkRow<float>>::V;
  auto& s = block_shared<TopkStorage<kDigitBits>>();
  const unsigned warps = blockDim.x / kWarpSize;
  const unsigned per_warp = (batch + warps * kStep - 1) / (warps * kStep) * kStep;
  const SharedKeys<TopkRow<float>> segment(warp_segment(0, batch, per_warp), 0, keys);
  TopkThreshold threshold(low, high, k);
  decide(segment, threshold, s);
  count_chosen(segment, threshold, s);
  __syncthreads();
  emit_chosen(segment, threshold, sum_of_warps_before(s.warp_above, warp_index()),
              sum_of_warps_before(s.warp_equal, warp_index()),
              [&](unsigned position, unsigned, unsigned column) { indices[position] = column; });
}

template <class T, int kThreads, int kItems, int kDigitBits>
__global__ void __launch_bounds__(kThreads, 1)
    adaselection_block_kernel(AdaSelectionArguments<T> a, bool with_ranks, bool with_adaboost) {
  auto& s = block_shared<AdaSelectionShared<kThreads>>();
  const auto batch = static_cast<unsigned>(a.batch);
  const AdaSelectionLayout layout(batch, kThreads, with_ranks, with_adaboost);
  char* shared = dynamic_shared<char>();
  const AdaSelectionRows rows{reinterpret_cast<float*>(shared),
                              reinterpret_cast<unsigned*>(shared + layout.ranks),
                              reinterpret_cast<double*>(shared + layout.adaboost)};
  AdaSelectionPasses<T, kThreads, false> passes(a, rows, 0, batch, nullptr);
  const double valid = passes.mask();
  if (valid > 0) {
    if (with_ranks)
      rank_losses<T, kItems>(rows.losses, batch, rows.ranks,
                             reinterpret_cast<unsigned*>(shared + layout.counts), s.bin_totals);
    passes.measure();
    passes.weigh();
    passes.update();
  }
  auto* keys = reinterpret_cast<unsigned*>(shared);
  unsigned low = ~0u, high = 0;  // of the keys that take part
  passes.mix([&](unsigned i, bool is_valid, float score) {
    const unsigned key = score_key(score);
    if (is_valid) low = min(low, key);
    high = max(high, key);
    keys[i] = key;
  });
  if (a.k == 0) return;
  low = __reduce_min_sync(kFullMask, low);
  high = __reduce_max_sync(kFullMask, high);
  if (lane_index() == 0) {
    s.lowest[warp_index()] = low;
    s.highest[warp_index()] = high;
  }
  __syncthreads();
  const bool counts = lane_index() < kThreads / kWarpSize;
  low = __reduce_min_sync(kFullMask, counts ? s.lowest[lane_index()] : ~0u);
  high = __reduce_max_sync(kFullMask, counts ? s.highest[lane_index()] : 0u);
  if (static_cast<double>(a.k) > valid) low = 0;  // excluded samples are among the chosen
  choose<kDigitBits>(keys, batch, static_cast<unsigned>(a.k), low, high, a.indices);
}

// ---- a cooperative grid ----

struct AdaSelectionGrid {
  unsigned chunk;         // samples a block
  AdaSelectionRows rows;  // in global memory; losses end as what topk is to choose by
  double* parts;          // [blocks * kAdaSelectionParts]
  const int64_t* order;   // [B], the samples by ascending loss, excluded ones last: for coreset1
};

template <class T>
__global__ void __launch_bounds__(kAdaSelectionThreads, 1)
    adaselection_grid_kernel(AdaSelectionArguments<T> a, AdaSelectionGrid grid) {
  const unsigned begin = blockIdx.x * grid.chunk;
  const unsigned end = min(begin + grid.chunk, static_cast<unsigned>(a.batch));
  if (grid.order != nullptr)
    for (unsigned i = begin + threadIdx.x; i < end; i += blockDim.x)
      grid.rows.ranks[grid.order[i]] = i;
  AdaSelectionPasses<T, kAdaSelectionThreads, true> passes(a, grid.rows, begin, end, grid.parts);
  if (passes.mask() > 0) {
    passes.measure();
    passes.weigh();
    passes.update();
  }
  // Below every score lies what is excluded.
  passes.mix(
      [&](unsigned i, bool, float score) { grid.rows.losses[i] = score >= 0 ? score : -1.0f; });
}

// The losses as integers of the same order, with excluded samples last: what a sort takes to give
// AdaSelectionGrid::order.
template <class T>
__global__ void __launch_bounds__(kAdaSelectionThreads)
    adaselection_sort_keys_kernel(AdaSelectionArguments<T> a, int* keys) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, batch = static_cast<unsigned>(a.batch);
  float loss[1];
  load_masked<1>(a, i, batch, loss);
  if (i < batch) keys[i] = static_cast<int>(topk_key(loss[0], true) ^ 0x80000000u);
}

}  // namespace fastsel::cuda
