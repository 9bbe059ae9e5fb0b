// The two product kernels of the per-sample gradient norms ||A_b^T G_b||^2, for any source of A
// [positions, columns] and G [positions, outputs] (Goodfellow, arXiv 1510.01799; Li et al.,
// "Large Language Models Can Be Strong Differentially Private Learners", 2110.05679, for the Gram
// form).
//
//   direct  sum over the elements of (A^T G)^2: a block takes a tile of the product, the depth is
//           the positions
//   Gram    <A A^T, G G^T>: a block takes a pair i <= j of position tiles, accumulates A_i A_j^T
//           over the columns and G_i G_j^T over the outputs, and multiplies the two in registers;
//           by symmetry pairs off the diagonal count twice
// Neither the gradient nor a Gram matrix ever exists in memory. A sample's groups are further
// tiles: their squared norms add up. Each block leaves its tile's share in partial[item]; a second
// kernel adds a sample's shares in order, so the result does not depend on which block came first.
//
// A Source has
//   T, kFeaturesContiguous, kGathers, kTableBytes<Tile>
//   activations<Tile, kDepthContiguous>(sample, group, table)  a loader of A
//   gradients<Tile, kDepthContiguous>(sample, group)           a loader of G
#pragma once

#include "cuda/grad_norm_operands.cuh"
#include "cuda/grad_norm_plan.h"

namespace fastsel::cuda {

struct ProductItems {
  int64_t count;       // in all: batch * per_sample
  int64_t per_sample;  // groups * per_group
  int64_t per_group;   // tiles or pairs of tiles
  GradNormShape shape;
};

// The block's partial sum; `partial` is the result itself where a sample is one item.
template <class Tile>
__device__ __forceinline__ void write_partial(float sum, const ProductItems& items, int64_t item,
                                              float* partial) {
  sum = group_sum<Tile::kThreads, Tile::kThreads>(sum);
  if (threadIdx.x == 0) partial[item] = items.per_sample == 1 ? squared_norm(sum) : sum;
}

template <class T, int kTile>
inline constexpr int kProductResident =
    kTile == 64 ? kProductSmallResident<T> : kProductLargeResident<T>;

// A gathering loader holds addresses beside the two sums.
template <class Source, int kTile>
inline constexpr int kGramResident =
    kTile == 64 ? kProductSmallResident<typename Source::T> - (Source::kGathers ? 1 : 0) : 1;

// One item after another, as many as the grid leaves to this block. Neighbouring blocks work on
// tiles of one sample that share rows of X, which then come from the cache.
template <class Source, int kTile>
__global__ void __launch_bounds__(ProductTile<typename Source::T, kTile>::kThreads,
                                  kProductResident<typename Source::T, kTile>)
    direct_norm_kernel(Source source, ProductItems items, float* partial) {  // [B, per_sample]
  using Tile = ProductTile<typename Source::T, kTile>;
  constexpr bool kDepthContiguous = !Source::kFeaturesContiguous;
  auto* stages = dynamic_shared<typename Tile::T>();
  void* table = dynamic_shared<char>() + kProductSharedBytes<Tile, kDepthContiguous>;
  const GradNormShape& shape = items.shape;
  const int64_t across = (shape.columns + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items.count; item += gridDim.x) {
    const int64_t sample = item / items.per_sample,
                  group = item % items.per_sample / items.per_group;
    const int64_t tile = item % items.per_group;  // per_sample is a multiple of per_group
    const int64_t output = tile / across * kTile, column = tile % across * kTile;
    const auto g = source.template gradients<Tile, kDepthContiguous>(sample, group);
    const auto a = source.template activations<Tile, kDepthContiguous>(sample, group, table);
    Accumulator<Tile> sum;
    clear<Tile>(sum);
    accumulate_product<Tile>(sum, TileRows<decltype(g)>{g, output},
                             TileRows<decltype(a)>{a, column}, false, shape.positions, stages);
    const int64_t outputs = shape.outputs - output, columns = shape.columns - column;
    const auto inside = [&](int row, int y_row) { return row < outputs && y_row < columns; };
    write_partial<Tile>(sum_of_products<Tile>(sum, sum, inside), items, item, partial);
  }
}

// Pairs i <= j in the order (0, 0), (0, 1), (1, 1), (0, 2), ...: the larger is the last number
// whose triangle begins at or before the pair.
__device__ __forceinline__ void tile_pair(int64_t pair, int64_t& smaller, int64_t& larger) {
  larger = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(pair) + 1.0) - 1.0) * 0.5);
  while (larger * (larger + 1) / 2 > pair) --larger;  // the root may be rounded either way
  while ((larger + 1) * (larger + 2) / 2 <= pair) ++larger;
  smaller = pair - larger * (larger + 1) / 2;
}

template <class Source, int kTile>
__global__ void __launch_bounds__(ProductTile<typename Source::T, kTile>::kThreads,
                                  kGramResident<Source, kTile>)
    gram_norm_kernel(Source source, ProductItems items, float* partial) {  // [B, per_sample]
  using Tile = ProductTile<typename Source::T, kTile>;
  constexpr bool kDepthContiguous = Source::kFeaturesContiguous;
  auto* stages = dynamic_shared<typename Tile::T>();
  void* table = dynamic_shared<char>() + kProductSharedBytes<Tile, kDepthContiguous>;
  const GradNormShape& shape = items.shape;
  for (int64_t item = blockIdx.x; item < items.count; item += gridDim.x) {
    const int64_t sample = item / items.per_sample,
                  group = item % items.per_sample / items.per_group;
    int64_t i, j;
    tile_pair(item % items.per_group, i, j);
    const int64_t first = i * kTile, second = j * kTile;
    Accumulator<Tile> of_activations, of_gradients;
    clear<Tile>(of_activations);
    clear<Tile>(of_gradients);
    const auto a = source.template activations<Tile, kDepthContiguous>(sample, group, table);
    using A = TileRows<decltype(a)>;
    accumulate_product<Tile>(of_activations, A{a, first}, A{a, second}, i == j, shape.columns,
                             stages);
    const auto g = source.template gradients<Tile, kDepthContiguous>(sample, group);
    using G = TileRows<decltype(g)>;
    accumulate_product<Tile>(of_gradients, G{g, first}, G{g, second}, i == j, shape.outputs,
                             stages);
    const int64_t rows = shape.positions - first, columns = shape.positions - second;
    const auto inside = [&](int row, int column) { return row < rows && column < columns; };
    const float sum = sum_of_products<Tile>(of_activations, of_gradients, inside);
    write_partial<Tile>(i == j ? sum : 2 * sum, items, item, partial);
  }
}

// ---- launches (host) ----

template <class Source, int kTile>
void launch_product(const Source& source, const GradNormPlan& plan, const GradNormShape& shape,
                    float* partial, void* stream) {
  using Tile = ProductTile<typename Source::T, kTile>;
  const ProductItems items{plan.items, plan.per_sample, plan.per_sample / shape.groups, shape};
  const bool gram = plan.kernel == GradNormPlan::Kernel::gram;
  const size_t stages = gram == Source::kFeaturesContiguous ? kProductSharedBytes<Tile, true>
                                                            : kProductSharedBytes<Tile, false>;
  const LaunchConfig config{plan.grid, Tile::kThreads, stages + Source::template kTableBytes<Tile>,
                            stream};
  if (gram)
    launch(gram_norm_kernel<Source, kTile>, config, source, items, partial);
  else
    launch(direct_norm_kernel<Source, kTile>, config, source, items, partial);
}

template <int kFactors>
void launch_finish_norms(const float* partial,  // [B, count, kFactors]
                         int64_t count, int64_t batch,
                         float* out,  // [B]
                         void* stream) {
  const auto blocks = [&](int lanes) {
    const int64_t groups = kGradNormThreads / lanes;
    return static_cast<unsigned>((batch + groups - 1) / groups);
  };
  if (count <= kFinishWarpPartials) {
    launch(finish_norms_kernel<kWarpSize, kFactors>,
           {blocks(kWarpSize), kGradNormThreads, 0, stream}, partial, count, batch, out);
  } else {
    launch(finish_norms_kernel<kGradNormThreads, kFactors>,
           {blocks(kGradNormThreads), kGradNormThreads, 0, stream}, partial, count, batch, out);
  }
}

}  // namespace fastsel::cuda
