// The steps of topk that one block takes together: digit counts, the bucket of the k-th key, ranks
// in index order, and the sort of the result. topk.cuh makes kernels of them.
#pragma once

#include "cuda/topk_keys.cuh"

namespace fastsel::cuda {

// What is known about the k-th largest key of a row: its leading bits. Keys with larger leading
// bits are in the result; of those with equal ones `need` are, and while `need` is less than all of
// them, lower bits decide.
struct TopkThreshold {
  unsigned prefix = 0;
  int undecided;  // bits below the prefix
  unsigned need;
  bool decided = false;  // all keys with this prefix are in, or they are all equal

  __device__ TopkThreshold(int key_bits, unsigned k) : undecided(key_bits), need(k) {}

  // Where the k-th largest key and all larger ones are known to lie in [low, high], high < 2^31: the
  // digits begin where the two part.
  __device__ TopkThreshold(unsigned low, unsigned high, unsigned k) : need(k) {
    undecided = kWarpSize - __clz(static_cast<int>(low ^ high));
    prefix = high >> undecided;
    decided = undecided == 0;
  }

  // The leading bits of a key, as many as the prefix has. (A shift by 32 is undefined.)
  __device__ __forceinline__ unsigned leading(unsigned key) const {
    return undecided >= 32 ? 0 : key >> undecided;
  }
  __device__ __forceinline__ bool above(unsigned key) const { return leading(key) > prefix; }
  __device__ __forceinline__ bool equal(unsigned key) const { return leading(key) == prefix; }
};

// The bin that holds the k-th largest key, how many keys lie in higher bins, and how many in it.
struct TopkBucket {
  unsigned bin, above, count;
};

template <int kDigitBits>
struct TopkStorage {
  static constexpr unsigned kBins = 1u << kDigitBits;
  unsigned histogram[kBins];
  unsigned warp_totals[kWarpSize];
  unsigned warp_above[kWarpSize];
  unsigned warp_equal[kWarpSize];
  TopkBucket bucket;
  bool last;
};

__device__ __forceinline__ unsigned warp_inclusive_sum(unsigned v) {
  FASTSEL_UNROLL
  for (unsigned offset = 1; offset < kWarpSize; offset *= 2) {
    const unsigned below = __shfl_up_sync(kFullMask, v, offset);
    if (lane_index() >= offset) v += below;
  }
  return v;
}

// The sum of per_warp[0..warp).
__device__ __forceinline__ unsigned sum_of_warps_before(const unsigned* per_warp, unsigned warp) {
  return __reduce_add_sync(kFullMask, lane_index() < warp ? per_warp[lane_index()] : 0u);
}

// Adds each undecided key's next digit to `histogram`, which the caller has cleared.
template <int kDigitBits, class Keys>
__device__ __forceinline__ void count_digits(const Keys& keys, const TopkThreshold& threshold,
                                             unsigned* histogram) {
  const int bits = min(kDigitBits, threshold.undecided);
  const int shift = threshold.undecided - bits;
  const unsigned mask = (1u << bits) - 1;
  keys.for_each([&](const auto& key, unsigned, int valid) {
    constexpr int V = sizeof(key) / sizeof(key[0]);
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v)
      if (v < valid && threshold.equal(key[v])) atomicAdd(&histogram[key[v] >> shift & mask], 1u);
  });
}

template <int kDigitBits>
__device__ __forceinline__ void clear_histogram(TopkStorage<kDigitBits>& s) {
  for (unsigned bin = threadIdx.x; bin < s.kBins; bin += blockDim.x) s.histogram[bin] = 0;
}

// Finds the bucket that holds the need-th largest key: 1 <= need <= the sum of counts[0..kBins),
// which may lie in shared or global memory. Called by all threads; holds two barriers.
template <int kDigitBits>
__device__ TopkBucket find_bucket(const unsigned* counts, unsigned need,
                                  TopkStorage<kDigitBits>& s) {
  constexpr unsigned kBins = TopkStorage<kDigitBits>::kBins;
  // Thread 0 has the highest bins.
  const unsigned per_thread = (kBins + blockDim.x - 1) / blockDim.x;
  const unsigned taken = min(threadIdx.x * per_thread, kBins);
  const unsigned top = kBins - taken, bottom = top - min(per_thread, top);
  unsigned sum = 0;
  for (unsigned bin = bottom; bin < top; ++bin) sum += counts[bin];
  const unsigned inclusive = warp_inclusive_sum(sum);
  if (lane_index() == kWarpSize - 1) s.warp_totals[warp_index()] = inclusive;
  __syncthreads();
  unsigned above = sum_of_warps_before(s.warp_totals, warp_index()) + inclusive - sum;
  if (above < need && need - above <= sum) {
    unsigned bin = top - 1;
    while (need - above > counts[bin]) above += counts[bin--];
    s.bucket = {bin, above, counts[bin]};
  }
  __syncthreads();
  return s.bucket;
}

template <int kDigitBits>
__device__ __forceinline__ void narrow(TopkThreshold& threshold, const TopkBucket& bucket) {
  const int bits = min(kDigitBits, threshold.undecided);
  threshold.prefix = threshold.prefix << bits | bucket.bin;
  threshold.undecided -= bits;
  threshold.need -= bucket.above;
  threshold.decided = threshold.undecided == 0 || bucket.count == threshold.need;
}

// Narrows the threshold until it is decided, by the keys of all warps. Called by all threads; holds
// barriers.
template <int kDigitBits, class Keys>
__device__ __forceinline__ void decide(const Keys& keys, TopkThreshold& threshold,
                                       TopkStorage<kDigitBits>& s) {
  while (!threshold.decided) {
    clear_histogram(s);
    __syncthreads();
    count_digits<kDigitBits>(keys, threshold, s.histogram);
    __syncthreads();
    narrow<kDigitBits>(threshold, find_bucket(s.histogram, threshold.need, s));
  }
}

// Counts this warp's keys above and at the threshold into s, for every warp to read after a
// barrier.
template <int kDigitBits, class Keys>
__device__ __forceinline__ void count_chosen(const Keys& keys, const TopkThreshold& threshold,
                                             TopkStorage<kDigitBits>& s) {
  unsigned above = 0, equal = 0;
  keys.for_each([&](const auto& key, unsigned, int valid) {
    constexpr int V = sizeof(key) / sizeof(key[0]);
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v) {
      above += v < valid && threshold.above(key[v]);
      equal += v < valid && threshold.equal(key[v]);
    }
  });
  above = __reduce_add_sync(kFullMask, above);
  equal = __reduce_add_sync(kFullMask, equal);
  if (lane_index() == 0) {
    s.warp_above[warp_index()] = above;
    s.warp_equal[warp_index()] = equal;
  }
}

// Calls emit(position, key, column) for each chosen key of the warp: those above the threshold and,
// of the equal ones, the row's first `need`. `above` and `equal` say how many such keys lie before
// this warp's. Position counts the chosen ones in column order.
template <class Keys, class Emit>
__device__ __forceinline__ void emit_chosen(const Keys& keys, const TopkThreshold& threshold,
                                            unsigned above, unsigned equal, Emit&& emit) {
  keys.for_each([&](const auto& key, unsigned first, int valid) {
    constexpr int V = sizeof(key) / sizeof(key[0]);
    unsigned mine = 0;  // above in the low half, equal in the high one: at most 32 * 8 a warp
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v)
      if (v < valid) mine += threshold.above(key[v]) ? 1u : threshold.equal(key[v]) ? 1u << 16 : 0u;
    if (!__any_sync(kFullMask, mine != 0)) return;
    const unsigned inclusive = warp_inclusive_sum(mine);
    unsigned above_before = above + ((inclusive - mine) & 0xffffu);
    unsigned equal_before = equal + ((inclusive - mine) >> 16);
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v) {
      if (v >= valid) continue;
      if (threshold.above(key[v])) {
        emit(above_before++ + min(equal_before, threshold.need), key[v],
             first + static_cast<unsigned>(v));
      } else if (threshold.equal(key[v])) {
        if (equal_before < threshold.need)
          emit(above_before + equal_before, key[v], first + static_cast<unsigned>(v));
        ++equal_before;
      }
    }
    const unsigned total = __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    above += total & 0xffffu;
    equal += total >> 16;
  });
}

// Keys and columns in one word, whose descending order is the result's: larger keys first, equal
// ones by column. Never 0, because columns stay below 2^32 - 1; 0 pads.
__device__ __forceinline__ unsigned long long sort_entry(unsigned key, unsigned column) {
  return static_cast<unsigned long long>(key) << 32 | ~column;
}
__device__ __forceinline__ unsigned sort_entry_column(unsigned long long entry) {
  return ~static_cast<unsigned>(entry);
}

// Sorts entries[0..size) in shared memory, largest first; size is a power of two. Bitonic: the
// pairs of a step with a stride of at most 32 lie within 64 neighbours that always belong to one
// warp, so a warp barrier does there. The caller puts a barrier before; one comes last.
__device__ inline void sort_descending(unsigned long long* entries, unsigned size) {
  for (unsigned run = 2; run <= size; run *= 2) {
    for (unsigned stride = run / 2; stride > 0; stride /= 2) {
      for (unsigned i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const unsigned low = (i & ~(stride - 1)) << 1 | (i & (stride - 1)), high = low + stride;
        const unsigned long long a = entries[low], b = entries[high];
        if ((a < b) == ((low & run) == 0)) {
          entries[low] = b;
          entries[high] = a;
        }
      }
      const unsigned next = stride > 1 ? stride / 2 : run;
      const bool last = stride == 1 && run == size;
      if (stride > kWarpSize || next > kWarpSize || last)
        __syncthreads();
      else
        __syncwarp();
    }
  }
}

}  // namespace fastsel::cuda
