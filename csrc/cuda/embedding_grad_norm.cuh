// embedding_grad_norm_sq on the GPU: the squared norm of each sample's gradient of an embedding
// table, whose row for a token is the sum of the gradients at all positions that hold it. There is no
// array of the table's size, and each gradient is read once.
//
// 1. order    Positions are sorted by token, equal tokens by position: in shared memory by a bitonic
//             network, T log^2 T steps of a block, or by torch where a sample is long.
// 2. sums     The sorted positions are cut into chunks of equal length, columns into tiles; a warp
//             takes a chunk's tile, so no token, however frequent, keeps one warp busy alone. It adds
//             the rows of a token and squares the sum when the token changes.
// 3. carries  Sums of tokens that reach over a chunk's border are left aside and added here, chunk
//             after chunk; a thread a column.
// 4. totals   The squares of all chunks and tiles are added, in order.
// Work is O(T D) whatever the tokens are. A few rows are added in float, more in double. Padding is
// neither read nor added.
#pragma once

#include "cuda/norm_sums.cuh"

namespace fastsel::cuda {

// ---- order ----

// A block a sample; `size` is the power of two from T on.
template <class Index>
__global__ void __launch_bounds__(kEmbeddingSortThreads)
    embedding_order_kernel(const Index* indices,  // [B, T]
                           int positions, int size,
                           int64_t* order) {  // [B, T]
  auto* tokens = dynamic_shared<int64_t>();
  auto* places = reinterpret_cast<int*>(tokens + size);
  const int64_t first = int64_t{blockIdx.x} * positions;
  // What pads comes last: the largest token, from positions after all others.
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kEmbeddingSortThreads) {
    tokens[i] = i < positions ? static_cast<int64_t>(indices[first + i]) : INT64_MAX;
    places[i] = i;
  }
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += kEmbeddingSortThreads) {
        const int low = (i & ~(stride - 1)) << 1 | (i & (stride - 1)), high = low + stride;
        const int64_t a = tokens[low], b = tokens[high];
        const int p = places[low], q = places[high];
        const bool descends = a > b || (a == b && p > q);
        if (descends == ((low & run) == 0)) {
          tokens[low] = b;
          tokens[high] = a;
          places[low] = q;
          places[high] = p;
        }
      }
      __syncthreads();
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < positions; i += kEmbeddingSortThreads)
    order[first + i] = places[i];
}

// ---- sums ----

// What a chunk leaves to its neighbours: the sum of the token that began before it (head), which may
// go on after it (through), and that of a token that begins in it and goes on (tail).
inline constexpr int kHeadOpen = 1, kTailOpen = 2, kThrough = 4;

template <class Index>
struct EmbeddingPlan {
  const Index* indices;  // [B, T]
  const int64_t* order;  // [B, T]
  int64_t padding_idx;
  int64_t tiles;      // of 32 * kVector columns
  int64_t chunks;     // of a sample's sorted positions
  int64_t per_chunk;  // a multiple of 32
  int64_t parts;      // numbers that add up to a sample's norm
  int* open;          // [B, chunks]
  float* heads;       // [B, chunks, D]
  float* tails;       // [B, chunks, D]
  double* squares;    // [B, parts]
};

// A sum of rows: kVector columns of one thread.
template <int kVector>
struct RowSum {
  float part[kVector] = {};
  double total[kVector] = {};
  bool in_total = false;  // part is not all there is

  __device__ __forceinline__ void move_to_total() {
    FASTSEL_UNROLL
    for (int v = 0; v < kVector; ++v) {
      total[v] += part[v];
      part[v] = 0;
    }
    in_total = true;
  }

  __device__ __forceinline__ double squares() {
    if (!in_total) {  // most tokens occur once
      float squares[kVector];
      FASTSEL_UNROLL
      for (int v = 0; v < kVector; ++v) squares[v] = part[v] * part[v];
      return pairwise_sum(squares);
    }
    move_to_total();
    double sum = 0;
    FASTSEL_UNROLL
    for (int v = 0; v < kVector; ++v) sum += total[v] * total[v];
    return sum;
  }

  __device__ __forceinline__ void store(float* out) {
    move_to_total();
    FASTSEL_UNROLL
    for (int v = 0; v < kVector; ++v) out[v] = static_cast<float>(total[v]);
  }
};

// The chunk of one warp as it goes through the sorted positions.
template <class T, int kVector, class Index>
struct EmbeddingChunk {
  const EmbeddingArguments<T>& a;
  const EmbeddingPlan<Index>& plan;
  int64_t sample, chunk, column;
  RowSum<kVector> sum;
  double squares = 0;
  bool head_open = false;
  int flags = 0;

  __device__ __forceinline__ int64_t token(int64_t i) const {
    const int64_t first = sample * a.positions;
    return plan.indices[first + plan.order[first + i]];
  }

  __device__ __forceinline__ void leave(float* sums, int flag) {
    flags |= flag;
    if (column < a.columns) sum.store(sums + (sample * plan.chunks + chunk) * a.columns + column);
    sum = {};
  }

  __device__ __forceinline__ void end_token() {
    if (head_open) {
      leave(plan.heads, kHeadOpen);
      head_open = false;
    } else {
      squares += sum.squares();
      sum = {};
    }
  }

  // The rows of 32 sorted positions, `count` of them there; lane l knows the place of row l. Bits of
  // `ends` say after which rows the token changes, those of `padding` which rows do not count.
  __device__ __forceinline__ void add_rows(int64_t place, int count, unsigned ends,
                                           unsigned padding) {
    const T* grads = a.grad_outputs + sample * a.grad_strides.batch + column;
    for (int first = 0; first < count; first += kEmbeddingUnroll) {
      Vector<T, kVector> rows[kEmbeddingUnroll];
      FASTSEL_UNROLL
      for (int u = 0; u < kEmbeddingUnroll; ++u) {
        rows[u] = {};
        const int64_t row = __shfl_sync(kFullMask, place, first + u);
        if (first + u >= count || (padding >> (first + u) & 1) || column >= a.columns) continue;
        const T* p = grads + row * a.grad_strides.position;
        if constexpr (kVector == 1) {
          rows[u][0] = *p;
        } else {
          rows[u] = load_streaming<kVector>(p);
        }
      }
      FASTSEL_UNROLL
      for (int u = 0; u < kEmbeddingUnroll; ++u) {
        if (first + u >= count || (padding >> (first + u) & 1)) continue;
        FASTSEL_UNROLL
        for (int v = 0; v < kVector; ++v) sum.part[v] += to_float(rows[u][v]);
        if (ends >> (first + u) & 1) end_token();
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t begin = chunk * plan.per_chunk;
    const int64_t end = min(begin + plan.per_chunk, a.positions);
    const int64_t first_token = token(begin);
    head_open = begin > 0 && first_token != plan.padding_idx && token(begin - 1) == first_token;
    bool goes_on = false;  // the last token is not complete
    for (int64_t first = begin; first < end; first += kWarpSize) {
      const int64_t i = first + lane;
      const int count = static_cast<int>(min(end - first, int64_t{kWarpSize}));
      const bool valid = lane < count;
      const int64_t mine = valid ? token(i) : 0;
      const bool is_padding = mine == plan.padding_idx;
      const bool is_last = valid && (i + 1 == a.positions || token(i + 1) != mine);
      const unsigned ends = __ballot_sync(kFullMask, is_last);
      const unsigned padding = __ballot_sync(kFullMask, valid && is_padding);
      const int64_t place = valid ? plan.order[sample * a.positions + i] : 0;
      add_rows(place, count, ends, padding);
      goes_on = !((ends | padding) >> (count - 1) & 1);
      if (goes_on) sum.move_to_total();
    }
    if (!goes_on) return;
    if (head_open) {
      leave(plan.heads, kHeadOpen | kThrough);
    } else {
      leave(plan.tails, kTailOpen);
    }
  }
};

// A warp for each sample, chunk and tile.
template <class T, int kVector, class Index>
__global__ void __launch_bounds__(kEmbeddingThreads, kEmbeddingResident)
    embedding_sums_kernel(EmbeddingArguments<T> a, EmbeddingPlan<Index> plan) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t warp = (int64_t{blockIdx.x} * kEmbeddingThreads + threadIdx.x) / kWarpSize;
  const int64_t tile = warp % plan.tiles, chunk = warp / plan.tiles % plan.chunks;
  const int64_t sample = warp / plan.tiles / plan.chunks;
  if (sample >= a.batch) return;
  const int64_t column = (tile * kWarpSize + lane) * kVector;
  EmbeddingChunk<T, kVector, Index> mine{a, plan, sample, chunk, column, {}};
  mine.run();
  const double squares = warp_sum(mine.squares);
  if (lane > 0) return;
  plan.squares[sample * plan.parts + chunk * plan.tiles + tile] = squares;
  if (tile == 0 && plan.chunks > 1) plan.open[sample * plan.chunks + chunk] = mine.flags;
}

// ---- carries ----

// A thread a column; blocks share a sample's columns. Several chunks' sums are under way at a time.
template <class Index>
__global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_carries_kernel(EmbeddingPlan<Index> plan, int64_t columns, int64_t column_blocks) {
  constexpr int kAtOnce = 8;
  const int64_t sample = blockIdx.x / column_blocks, block = blockIdx.x % column_blocks;
  const int64_t column = block * kEmbeddingThreads + threadIdx.x;
  double squares = 0, carry = 0;
  for (int64_t first = 0; first < plan.chunks && column < columns; first += kAtOnce) {
    int flags[kAtOnce];
    float heads[kAtOnce], tails[kAtOnce];
    FASTSEL_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t chunk = sample * plan.chunks + first + u;
      flags[u] = first + u < plan.chunks ? plan.open[chunk] : 0;
      heads[u] = flags[u] & kHeadOpen ? plan.heads[chunk * columns + column] : 0.0f;
      tails[u] = flags[u] & kTailOpen ? plan.tails[chunk * columns + column] : 0.0f;
    }
    FASTSEL_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      if (flags[u] & kHeadOpen) carry += heads[u];
      if ((flags[u] & kHeadOpen) && !(flags[u] & kThrough)) squares += carry * carry;
      if (flags[u] & kTailOpen) carry = tails[u];
    }
  }
  squares = block_sum<kEmbeddingThreads>(squares);
  if (threadIdx.x == 0)
    plan.squares[sample * plan.parts + plan.chunks * plan.tiles + block] = squares;
}

// ---- totals ----

// A block a sample.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    embedding_totals_kernel(const double* squares,  // [B, parts]
                            int64_t parts,
                            float* norms) {  // [B]
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads)
    sum += squares[int64_t{blockIdx.x} * parts + i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = static_cast<float>(sum);
}

}  // namespace fastsel::cuda
