// linear_grad_norm_sq: the squared norm of each sample's weight gradient A_b^T G_b of a linear
// layer, A_b [T, d] its input and G_b [T, p] its output's gradient.
//
// With one position the gradient is an outer product, and its squared norm the product of two
// squared norms (Goodfellow, arXiv 1510.01799): a stream of reads. With a few, the Gram form over
// several samples a tile. With more, the tiles of grad_norm_product.cuh.
#pragma once

#include "cuda/grad_norm_product.cuh"

namespace fastsel::cuda {

template <class T>
struct LinearOperand {
  const T* values;     // [B, T, width], unit stride along the width
  int64_t per_sample;  // elements between samples
  int64_t per_position;
  int64_t width;
  bool aligned;  // every position starts at a multiple of 16 bytes
};

template <class T_>
struct LinearSource {
  using T = T_;
  static constexpr bool kFeaturesContiguous = true;
  static constexpr bool kGathers = false;
  template <class Tile>
  static constexpr size_t kTableBytes = 0;

  LinearOperand<T> a, g;
  int64_t positions;

  template <class Tile, bool kDepthContiguous>
  __device__ DenseLoader<Tile, kDepthContiguous> activations(int64_t sample, int64_t, void*) const {
    return loader<Tile, kDepthContiguous>(a, sample);
  }
  template <class Tile, bool kDepthContiguous>
  __device__ DenseLoader<Tile, kDepthContiguous> gradients(int64_t sample, int64_t) const {
    return loader<Tile, kDepthContiguous>(g, sample);
  }

 private:
  template <class Tile, bool kDepthContiguous>
  __device__ DenseLoader<Tile, kDepthContiguous> loader(const LinearOperand<T>& x,
                                                        int64_t sample) const {
    return {{x.values + sample * x.per_sample, x.per_position, positions, x.width, x.aligned}};
  }
};

// This thread's share of the sum of squares of row[begin ... end - 1]; threads 0 ... stride - 1
// share it.
template <class T>
__device__ __forceinline__ float thread_sum_of_squares(const T* row, int64_t begin, int64_t end,
                                                       int thread, int stride) {
  constexpr int kVector = 16 / sizeof(T);
  float sums[4] = {0, 0, 0, 0};  // four chains of additions, whose latencies overlap
  const auto add = [&](int i, T value) {
    const float v = to_float(value);
    sums[i % 4] = fmaf(v, v, sums[i % 4]);
  };
  // Up to the first 16-byte boundary and after the last, one value a thread.
  const auto misaligned =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(row + begin) / sizeof(T) % kVector);
  const int64_t body = min(begin + (misaligned == 0 ? 0 : kVector - misaligned), end);
  for (int64_t i = begin + thread; i < body; i += stride) add(0, row[i]);
  const int64_t vectors = (end - body) / kVector;
  FASTSEL_UNROLL_BY(4)
  for (int64_t v = thread; v < vectors; v += stride) {
    const auto loaded = load_vector<kVector>(row + body + v * kVector);
    FASTSEL_UNROLL
    for (int i = 0; i < kVector; ++i) add(i, loaded[i]);
  }
  for (int64_t i = body + vectors * kVector + thread; i < end; i += stride) add(1, row[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One position: kLanes threads for each of `splits` shares of a sample. With one share they finish
// the sample in `out`; with more they leave both sums of squares there, for finish_norms_kernel.
template <class T, int kLanes>
__global__ void __launch_bounds__(kGradNormThreads)
    outer_norm_kernel(LinearSource<T> source, int64_t batch, int64_t splits,
                      float* out) {  // [B], or [B, splits, 2]
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t item = (int64_t{blockIdx.x} * kGradNormThreads + threadIdx.x) / kLanes;
  const bool exists = item < batch * splits;  // all threads of the block take part in the sums
  const auto share_sum = [&](const LinearOperand<T>& x) {
    if (!exists) return 0.0f;
    const int64_t share = (x.width + splits - 1) / splits;
    const int64_t begin = min(item % splits * share, x.width), end = min(begin + share, x.width);
    return thread_sum_of_squares(x.values + item / splits * x.per_sample, begin, end, lane, kLanes);
  };
  const float a = group_sum<kLanes, kGradNormThreads>(share_sum(source.a));
  if (kLanes > kWarpSize) __syncthreads();
  const float g = group_sum<kLanes, kGradNormThreads>(share_sum(source.g));
  if (lane != 0 || !exists) return;
  if (splits == 1) {
    out[item] = a * g;
  } else {
    out[2 * item] = a;
    out[2 * item + 1] = g;
  }
}

// ---- few positions ----

// Some samples' operands as one: kRows rows a sample, of which `positions` exist.
template <class Tile>
struct PackedLoader {
  using T = typename Tile::T;
  using Layout = StageLayout<Tile, true>;
  static constexpr bool kDepthContiguous = true;
  static constexpr bool kPrepares = false;

  const LinearOperand<T>& x;
  int64_t positions, first_sample, batch;

  __device__ __forceinline__ void load(T* stage, int64_t, int64_t depth, int64_t) const {
    load_lines<Tile, Layout>(
        stage, x.values, x.aligned, x.width - depth, [&](int line) -> const T* {
          const int64_t sample = first_sample + line / Tile::kRows, position = line % Tile::kRows;
          if (sample >= batch || position >= positions) return nullptr;
          return x.values + sample * x.per_sample + position * x.per_position + depth;
        });
  }
};

// <A A^T, G G^T> of Tile::kSamples samples of at most kRows positions a block: with a tile for
// each, most of it would be padding.
template <class T, int kRows>
__global__ void __launch_bounds__(PackedTile<T, kRows>::kThreads, kProductSmallResident<T>)
    packed_norm_kernel(LinearSource<T> source, int64_t batch,
                       float* out) {  // [B]
  using Tile = PackedTile<T, kRows>;
  struct Storage {
    float sums[Tile::kWarps];
  };
  auto& shared = block_shared<Storage>();
  const int64_t blocks = (batch + Tile::kSamples - 1) / Tile::kSamples;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = block * Tile::kSamples;
    Accumulator<Tile> of_activations, of_gradients;
    clear<Tile>(of_activations);
    clear<Tile>(of_gradients);
    const auto accumulate = [&](const LinearOperand<T>& x, Accumulator<Tile>& sum) {
      const PackedLoader<Tile> loader{x, source.positions, first, batch};
      const TileRows<PackedLoader<Tile>> rows{loader, 0};
      accumulate_product<Tile>(sum, rows, rows, true, x.width, dynamic_shared<T>());
    };
    accumulate(source.a, of_activations);
    accumulate(source.g, of_gradients);
    const auto inside = [&](int row, int column) {
      return row % kRows < source.positions && column % kRows < source.positions;
    };
    const float sum = group_sum<kWarpSize, Tile::kThreads>(
        sum_of_products<Tile>(of_activations, of_gradients, inside));
    if (threadIdx.x % kWarpSize == 0) shared.sums[threadIdx.x / kWarpSize] = sum;
    __syncthreads();
    const int64_t sample = first + threadIdx.x;
    if (threadIdx.x < Tile::kSamples && sample < batch) {
      float norm = 0;
      FASTSEL_UNROLL
      for (int i = 0; i < Tile::kWarpsPerSample; ++i)
        norm += shared.sums[threadIdx.x * Tile::kWarpsPerSample + i];
      out[sample] = squared_norm(norm);
    }
  }
}

}  // namespace fastsel::cuda
