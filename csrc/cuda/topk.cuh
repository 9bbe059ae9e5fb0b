// topk: the k largest (or smallest) of each row, in index order or sorted, in one launch.
//
// Radix selection after AIR Top-K (Zhang et al., "Parallel Top-K Algorithms on GPU: A Comprehensive
// Study and New Methods", SC'23, doi 10.1145/3581784.3607062). In plain words:
//   1. A value becomes an unsigned key, larger is better (core/topk_key.h).
//   2. Count the leading digit of every key; the k-th largest key lies in the bucket where the
//      counts, summed from the top, reach k. Keys in higher buckets are in the result, keys in
//      lower ones are out.
//   3. The same with the next digit of that bucket's keys, until the digits are used up or all keys
//      left belong to the result (the paper's early stop).
//   4. Each warp counts its keys above and at the threshold; a scan over the counts says where it
//      writes.
// What we changed: the result comes in index order and of equal keys the first are taken, so it is
// a pure function of the input: the paper's kernels write in the order of an atomic counter. The
// sort of up to kTopkSortLimit results is part of the launch. Where several blocks share a row they
// meet at grid barriers instead of taking one launch a digit, and each block keeps its keys, or the
// list of those that still matter (the paper's adaptive buffer), in its shared memory.
//
// Three homes for the keys, chosen by choose_topk_plan:
//   registers of one block, shared memory of one block (topk_block_kernel), several blocks a row
//   (topk_grid_kernel).
#pragma once

#include "cuda/topk_block.cuh"
#include "cuda/tuning.h"

namespace fastsel::cuda {

// What the kernels below choose from: rows of keys, of which an operator's own arguments say how
// they come to be and where a chosen one goes.
struct SelectionShape {
  int64_t rows;
  unsigned columns;
  unsigned k;          // 1 <= k <= columns
  unsigned sort_size;  // sort the result in the kernel: the next power of two from k; 0: leave it
                       // in index order
};

// Wider keys first: int's order of ~key with the sign bit flipped is unsigned descending order of
// key. For a sort after the kernel.
__device__ __forceinline__ int rank_of_key(unsigned key) {
  return static_cast<int>(~key ^ 0x80000000u);
}

template <class T>
struct TopkArguments : SelectionShape {
  using Row = TopkRow<T>;

  const T* scores;     // [rows, columns], unit stride along columns
  int64_t row_stride;  // in elements
  bool largest;
  T* values;         // [rows, k]
  int64_t* indices;  // [rows, k]
  int* ranks;        // null, or [rows, k]: numbers whose ascending order is the result's

  __device__ Row row(int64_t number) const { return Row(scores + number * row_stride, largest); }

  __device__ __forceinline__ void write(int64_t number, unsigned position, unsigned key,
                                        unsigned column) const {
    const int64_t out = number * k + position;
    indices[out] = column;
    // The key has lost the sign of zero and a NaN's payload.
    values[out] = scores[number * row_stride + column];
    if (ranks) ranks[out] = rank_of_key(key);
  }
};

template <class Row>
inline constexpr int kTopkKeyBits = 8 * static_cast<int>(sizeof(typename Row::Key));

// A segment a warp: the block's columns [begin, end) cut into whole steps of 32 * Row::V columns.
__device__ __forceinline__ WarpSegment warp_segment(unsigned begin, unsigned end,
                                                    unsigned per_warp) {
  const unsigned first = begin + warp_index() * per_warp;
  return {min(first, end), min(first + per_warp, end)};
}

// Sorts the row's k entries, which lie in shared memory before a barrier, and writes them.
template <class Arguments>
__device__ void write_sorted(const Arguments& a, int64_t row, unsigned long long* entries) {
  sort_descending(entries, a.sort_size);
  for (unsigned i = threadIdx.x; i < a.k; i += blockDim.x) {
    const unsigned long long entry = entries[i];
    a.write(row, i, static_cast<unsigned>(entry >> 32), sort_entry_column(entry));
  }
}

// ---- one block a row ----

// Dynamic shared memory: the keys (if Keys keeps them there), then sort_size entries.
template <class Arguments, int kDigitBits, class Keys>
__device__ __forceinline__ void topk_rows_of_block(const Arguments& a) {
  using Row = typename Arguments::Row;
  constexpr unsigned kStep = kWarpSize * Row::V;
  auto& s = block_shared<TopkStorage<kDigitBits>>();
  const unsigned warps = blockDim.x / kWarpSize;
  const unsigned per_warp = (a.columns + warps * kStep - 1) / (warps * kStep) * kStep;
  char* shared = dynamic_shared<char>();
  auto* entries =
      reinterpret_cast<unsigned long long*>(shared + warps * per_warp * Keys::kBytesPerKey);

  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const Keys keys(a.row(row), warp_segment(0, a.columns, per_warp), shared);
    TopkThreshold threshold(kTopkKeyBits<Row>, a.k);
    decide(keys, threshold, s);
    count_chosen(keys, threshold, s);
    for (unsigned i = a.k + threadIdx.x; i < a.sort_size; i += blockDim.x) entries[i] = 0;
    __syncthreads();
    emit_chosen(keys, threshold, sum_of_warps_before(s.warp_above, warp_index()),
                sum_of_warps_before(s.warp_equal, warp_index()),
                [&](unsigned position, unsigned key, unsigned column) {
                  if (a.sort_size)
                    entries[position] = sort_entry(key, column);
                  else
                    a.write(row, position, key, column);
                });
    __syncthreads();
    if (a.sort_size) write_sorted(a, row, entries);
  }
}

template <class Arguments>
__global__ void __launch_bounds__(kTopkSmallThreads) topk_small_kernel(Arguments a) {
  using Keys = RegisterKeys<typename Arguments::Row, kTopkRegisterKeys>;
  topk_rows_of_block<Arguments, kTopkSmallDigitBits, Keys>(a);
}

template <class Arguments>
__global__ void __launch_bounds__(kTopkRegisterThreads) topk_register_kernel(Arguments a) {
  using Keys = RegisterKeys<typename Arguments::Row, kTopkRegisterKeys>;
  topk_rows_of_block<Arguments, kTopkDigitBits, Keys>(a);
}

template <class Arguments>
__global__ void __launch_bounds__(kTopkSharedThreads) topk_shared_kernel(Arguments a) {
  topk_rows_of_block<Arguments, kTopkDigitBits, SharedKeys<typename Arguments::Row>>(a);
}

// ---- several blocks a row ----

struct TopkGridShape {
  unsigned blocks_per_row;  // if more than one, gridDim.x = rows * blocks_per_row
  unsigned chunk;           // columns a block, whole steps for each of its warps
  bool chunk_in_shared;     // else shared memory holds lists of `listed` entries a warp
  unsigned listed;
  unsigned* workspace;  // [rows, topk_workspace_words(blocks_per_row)], cleared by the kernel
  unsigned long long* entries;  // [rows, k] if the kernel sorts; of one block a row [blocks, k]
};

inline constexpr unsigned kTopkBins = 1u << kTopkDigitBits;
inline constexpr unsigned kTopkMaxDigits = (32 + kTopkDigitBits - 1) / kTopkDigitBits;

// A row's part of the workspace: a histogram a digit, then for each block its counts above and at
// the threshold, then the number of blocks that have written their results.
__host__ __device__ inline unsigned topk_workspace_words(unsigned blocks_per_row) {
  return kTopkMaxDigits * kTopkBins + 2 * blocks_per_row + 1;
}

// The keys of one block's chunk, wherever they are.
template <class Row>
class ChunkKeys {
 public:
  __device__ ChunkKeys(const Row& row, WarpSegment segment, unsigned begin,
                       const TopkGridShape& shape, void* shared)
      : global_(row, segment),
        shared_(segment, begin, shared),
        list_(static_cast<KeyAndColumn*>(shared) + warp_index() * shape.listed),
        home_(Home::global) {
    if (!shape.chunk_in_shared) return;
    shared_.load(row);
    home_ = Home::shared;
  }

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    if (home_ == Home::shared)
      shared_.for_each(f);
    else if (home_ == Home::list)
      ListedKeys(list_, listed_).for_each(f);
    else
      global_.for_each(f);
  }

  // The first pass after a digit has been decided lists the warp's keys that may still be chosen,
  // so that later passes read few. A warp with more of them than the list holds goes on reading
  // global memory.
  __device__ void list_survivors(const TopkThreshold& threshold, unsigned capacity) {
    if (home_ != Home::global) return;
    unsigned count = 0;
    global_.for_each([&](const auto& key, unsigned first, int valid) {
      constexpr int V = sizeof(key) / sizeof(key[0]);
      unsigned mine = 0;
      FASTSEL_UNROLL
      for (int v = 0; v < V; ++v)
        mine += v < valid && threshold.leading(key[v]) >= threshold.prefix;
      if (!__any_sync(kFullMask, mine != 0)) return;
      const unsigned inclusive = warp_inclusive_sum(mine);
      unsigned slot = count + inclusive - mine;
      FASTSEL_UNROLL
      for (int v = 0; v < V; ++v)
        if (v < valid && threshold.leading(key[v]) >= threshold.prefix) {
          if (slot < capacity) list_[slot] = {key[v], first + static_cast<unsigned>(v)};
          ++slot;
        }
      count += __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
    });
    __syncwarp();
    if (count > capacity) return;
    listed_ = count;
    home_ = Home::list;
  }

 private:
  enum class Home { global, shared, list };
  GlobalKeys<Row> global_;
  SharedKeys<Row> shared_;
  KeyAndColumn* list_;
  unsigned listed_ = 0;
  Home home_;
};

// Called after a barrier that follows the block's last entry: true in all threads of the block that
// comes to this point last of those that share the row. It sorts.
__device__ __forceinline__ bool last_of_row(unsigned* finished, unsigned blocks,
                                            bool& shared_last) {
  if (blocks == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();  // the block's entries before the count
    shared_last = atomicAdd(finished, 1u) == blocks - 1;
  }
  __syncthreads();
  __threadfence();  // the count before the others' entries
  return shared_last;
}

// blocks_per_row = 1: each block takes one row after another; no grid barrier, so no cooperative
// launch is needed. More: every row has its own group of blocks and is done at once, and all groups
// pass the same barriers.
template <class Arguments>
__global__ void __launch_bounds__(kTopkGridThreads, 1)
    topk_grid_kernel(Arguments a, TopkGridShape shape) {
  using Row = typename Arguments::Row;
  auto& s = block_shared<TopkStorage<kTopkDigitBits>>();
  char* shared = dynamic_shared<char>();
  const unsigned blocks = shape.blocks_per_row;
  const bool many = blocks > 1;
  const int64_t words = topk_workspace_words(blocks);
  GridToken cleared{};
  if (many) {
    const int64_t threads = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < a.rows * words;
         i += threads)
      shape.workspace[i] = 0;
    cleared = grid_arrive();  // awaited only after the keys have been read for the first time
  }

  for (int64_t row = blockIdx.x / blocks; row < a.rows; row += gridDim.x / blocks) {
    unsigned* histograms = shape.workspace + row * words;
    unsigned* counts = histograms + kTopkMaxDigits * kTopkBins;
    const unsigned part = blockIdx.x % blocks;
    const unsigned begin = part * shape.chunk, end = min(begin + shape.chunk, a.columns);
    ChunkKeys<Row> keys(a.row(row),
                        warp_segment(begin, end, shape.chunk / (blockDim.x / kWarpSize)), begin,
                        shape, shared);
    TopkThreshold threshold(kTopkKeyBits<Row>, a.k);

    constexpr int kDigits = (kTopkKeyBits<Row> + kTopkDigitBits - 1) / kTopkDigitBits;
    for (int digit = 0; digit < kDigits; ++digit) {
      const bool working = !threshold.decided;
      unsigned* row_histogram = many ? histograms + digit * kTopkBins : s.histogram;
      if (working) {
        if (digit == 1) keys.list_survivors(threshold, shape.listed);
        clear_histogram(s);
        __syncthreads();
        count_digits<kTopkDigitBits>(keys, threshold, s.histogram);
        __syncthreads();
      }
      if (many) {
        if (digit == 0) grid_wait(cleared);
        for (unsigned bin = threadIdx.x; working && bin < kTopkBins; bin += blockDim.x)
          if (s.histogram[bin]) atomicAdd(&row_histogram[bin], s.histogram[bin]);
        grid_sync();
      }
      if (working) narrow<kTopkDigitBits>(threshold, find_bucket(row_histogram, threshold.need, s));
      // With several rows, others may still need the barriers of the next digit.
      if (threshold.decided && (!many || a.rows == 1)) break;
    }

    keys.list_survivors(threshold, shape.listed);
    count_chosen(keys, threshold, s);
    __syncthreads();
    unsigned above = sum_of_warps_before(s.warp_above, warp_index());
    unsigned equal = sum_of_warps_before(s.warp_equal, warp_index());
    if (many) {
      if (threadIdx.x == blockDim.x - 1) {
        counts[2 * part] = above + s.warp_above[warp_index()];
        counts[2 * part + 1] = equal + s.warp_equal[warp_index()];
      }
      grid_sync();
      unsigned above_before = 0, equal_before = 0;
      for (unsigned other = lane_index(); other < part; other += kWarpSize) {
        above_before += counts[2 * other];
        equal_before += counts[2 * other + 1];
      }
      above += __reduce_add_sync(kFullMask, above_before);
      equal += __reduce_add_sync(kFullMask, equal_before);
    }
    unsigned long long* row_entries = shape.entries + (many ? row : int64_t{blockIdx.x}) * a.k;
    emit_chosen(keys, threshold, above, equal,
                [&](unsigned position, unsigned key, unsigned column) {
                  if (a.sort_size)
                    row_entries[position] = sort_entry(key, column);
                  else
                    a.write(row, position, key, column);
                });
    __syncthreads();  // the keys in shared memory have been read
    if (a.sort_size && last_of_row(counts + 2 * blocks, blocks, s.last)) {
      auto* entries = reinterpret_cast<unsigned long long*>(shared);
      for (unsigned i = threadIdx.x; i < a.sort_size; i += blockDim.x)
        entries[i] = i < a.k ? row_entries[i] : 0;
      __syncthreads();
      write_sorted(a, row, entries);
      __syncthreads();  // before the next row's keys take the entries' place
    }
  }
}

}  // namespace fastsel::cuda
