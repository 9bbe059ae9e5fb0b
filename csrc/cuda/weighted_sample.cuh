// weighted_sample: without replacement the selection of topk over keys that are made on the way,
// with replacement a tree of sums that each draw descends. Weights are read twice either way, the
// second time without replacement only to list what may still be chosen, with replacement only where
// a draw ends.
//
// A wrong weight, or too few of them above zero, cannot be reported without waiting for the device:
// such rows give indices that no tensor has, and probabilities that are not numbers.
#pragma once

#include "core/weighted_sample.h"
#include "cuda/sums.cuh"
#include "cuda/topk.cuh"

namespace fastsel::cuda {

// ---- without replacement ----

// Selection takes the largest keys: a quotient's complement. Items that are never drawn have the
// least key, wrong weights the largest, so that they are seen whatever else is there.
inline constexpr unsigned kNeverDrawn = 0, kWrongWeight = 0xffffffffu;

struct FourWeights {
  float w[4];
};
struct FourKeys {
  unsigned key[4];
};

// The keys of four items that share a block of the generator, the first of them a multiple of 4. Not
// inlined: some 250 instructions, which rows in registers call for many times over.
FASTSEL_NOINLINE __device__ inline FourKeys weighted_keys(FourWeights weights, uint64_t seed,
                                                          int64_t row, unsigned first) {
  const PhiloxWords words =
      philox(seed, first / 4, random_stream(RandomStream::weighted_keys, row));
  FourKeys keys;
  FASTSEL_UNROLL
  for (unsigned i = 0; i < 4; ++i) {
    const float w = weights.w[i];
    const auto low = [&] {
      return item_word(seed, random_stream(RandomStream::weighted_low_bits, row), first + i);
    };
    keys.key[i] = !valid_weight(w) ? kWrongWeight
                  : w == 0 ? kNeverDrawn
                           : ~quotient_key(exponential_of_word(0.0f, word_of(words, i), low), w);
  }
  return keys;
}

template <class T>
struct WeightedRow : RowValues<T, 4> {
  using Key = uint32_t;
  using RowValues<T, 4>::V;

  uint64_t seed;
  int64_t number;

  __device__ WeightedRow(const T* row, uint64_t row_seed, int64_t row_number)
      : RowValues<T, 4>(row), seed(row_seed), number(row_number) {}

  __device__ __forceinline__ void to_keys(const Vector<T, V>& weights, unsigned first,
                                          unsigned (&keys)[V]) const {
    FourWeights four;
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v) four.w[v] = to_float(weights[v]);
    const FourKeys made = weighted_keys(four, seed, number, first);
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v) keys[v] = made.key[v];
  }
};

// The n + 1 smallest quotients of each row, of which the last is the threshold; n if that is all.
template <class T>
struct WeightedArguments : SelectionShape {
  using Row = WeightedRow<T>;

  const T* weights;  // [rows, columns]
  const int64_t* seed;
  unsigned* keys;  // [rows, k]
  int64_t* items;  // [rows, k]
  int* ranks;      // null, or [rows, k]: numbers whose ascending order is that of the draws

  __device__ Row row(int64_t number) const {
    return Row(weights + number * columns, static_cast<uint64_t>(*seed), number);
  }

  __device__ __forceinline__ void write(int64_t number, unsigned position, unsigned key,
                                        unsigned column) const {
    const int64_t out = number * k + position;
    keys[out] = key;
    items[out] = column;
    if (ranks) ranks[out] = rank_of_key(key);
  }
};

// From the sorted keys and items of WeightedArguments: what was drawn, and how probable that was.
template <class T>
__global__ void weighted_finish_kernel(const T* weights,      // [rows, columns]
                                       const unsigned* keys,  // [rows, k]
                                       const int64_t* items,  // [rows, k]
                                       int64_t rows, int64_t columns, int64_t n, int64_t k,
                                       int64_t* indices,  // [rows, n]
                                       float* probs) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / n, from = row * k + i % n;
    if (keys[row * k] == kWrongWeight || keys[from] == kNeverDrawn) {
      indices[i] = kNoItem;
      probs[i] = NAN;
      continue;
    }
    const unsigned threshold = k > n ? keys[row * k + n] : kNeverDrawn;
    indices[i] = items[from];
    probs[i] = threshold == kNeverDrawn
                   ? 1.0f
                   : inclusion_probability(to_float(weights[row * columns + items[from]]),
                                           key_value(~threshold));
  }
}

// ---- with replacement ----

// How many numbers a node of the tree sums.
inline constexpr int64_t kSumsFanOut = 1024;

// The tree of one row: the sums of its weights, of those sums, and so on, until few are left. Of
// several rows each level holds one row's nodes after the other's.
struct SumsTree {
  static constexpr int kMostLevels = 5;  // 1024^6 weights
  int levels;
  int64_t counts[kMostLevels];  // nodes of a row
  double* sums[kMostLevels];
};

// One level from the one below: a warp a node.
template <class T>
__global__ void sum_nodes_kernel(const T* values,  // [rows, count]
                                 int64_t rows, int64_t count,
                                 double* sums,  // [rows, nodes]
                                 int64_t nodes) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  for (int64_t node = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index();
       node < rows * nodes; node += warps) {
    const T* row = values + node / nodes * count;
    const int64_t begin = node % nodes * kSumsFanOut;
    double sum = 0;
    for (int64_t i = lane_index(); i < kSumsFanOut; i += kWarpSize)
      if (begin + i < count) sum += summand(row[begin + i]);
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[node] = sum;
  }
}

// A warp a draw.
template <class T>
__global__ void descend_kernel(const T* weights,  // [rows, columns]
                               int64_t rows, int64_t columns, SumsTree tree, const int64_t* seed,
                               int64_t n,
                               int64_t* indices,  // [rows, n]
                               float* probs) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  const int top = tree.levels - 1;
  for (int64_t draw = blockIdx.x * int64_t{blockDim.x / kWarpSize} + warp_index(); draw < rows * n;
       draw += warps) {
    const int64_t row = draw / n;
    double total = 0;
    for (int64_t i = lane_index(); i < tree.counts[top]; i += kWarpSize)
      total += tree.sums[top][row * tree.counts[top] + i];
    total = warp_sum(total);
    const PhiloxWords words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(draw % n),
                                     random_stream(RandomStream::weighted_draws, row));
    const double target = uniform(words.x, words.y) * total;
    double before = 0;
    int64_t node = 0;
    for (int level = top; level >= 0; --level) {
      const int64_t count = tree.counts[level], begin = level == top ? 0 : node * kSumsFanOut;
      const int64_t end = level == top ? count : min(count, begin + kSumsFanOut);
      node = find_place(tree.sums[level] + row * count, begin, end, before, target);
    }
    const T* row_weights = weights + row * columns;
    const int64_t item = find_place(row_weights, node * kSumsFanOut,
                                    min(columns, (node + 1) * kSumsFanOut), before, target);
    if (lane_index() != 0) continue;
    const bool drawable = total > 0 && total - total == 0;
    indices[draw] = drawable ? item : kNoItem;
    probs[draw] = drawable ? static_cast<float>(to_float(row_weights[item]) / total) : NAN;
  }
}

}  // namespace fastsel::cuda
