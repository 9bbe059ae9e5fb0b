// Which kernel takes a per-sample gradient norm, on which grid: by the cost of each for this very
// call, because a layer may see a sequence of 8 positions now and one of 4096 next. No torch and
// no kernels in here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/tuning.h"

namespace fastsel::cuda {

// A group's problem is ||A^T G||^2 with A [positions, columns] and G [positions, outputs].
struct GradNormShape {
  int64_t batch;
  int64_t groups;
  int64_t positions;
  int64_t columns;
  int64_t outputs;
};

struct GradNormPlan {
  // zero: nothing to sum. outer: one position, the product of two squared norms. direct and gram:
  // grad_norm_product.cuh. packed: Gram of several samples a tile. narrow: a convolution whose
  // groups are too small for a tile.
  enum class Kernel { zero, outer, direct, gram, packed, narrow };
  Kernel kernel = Kernel::zero;
  int tile = 0;            // rows, of direct and gram; rows a sample, of packed
  int lanes = 0;           // threads an item, of outer and narrow
  int64_t per_sample = 0;  // items, each of which leaves a partial sum (outer: two)
  int64_t items = 0;       // in all
  unsigned grid = 0;
};

enum class GradNormForm { automatic, direct, gram };

// The costs below are multiply-adds at the rate of a busy GPU; a grid that leaves multiprocessors
// idle costs as if it filled them.
inline double busy_cost(int64_t items, int64_t slots, double each) {
  return static_cast<double>(std::max(items, slots)) * each;
}

inline unsigned product_grid(int64_t items, int multiprocessors) {
  return static_cast<unsigned>(
      std::min(items, int64_t{multiprocessors} * kProductBlocksPerMultiprocessor));
}

// The depth that is multiplied.
inline double whole_stages(int64_t depth) {
  return static_cast<double>((depth + kProductDepth - 1) / kProductDepth * kProductDepth);
}

struct ProductChoice {
  GradNormPlan plan;
  double cost = std::numeric_limits<double>::infinity();
};

// direct and gram with this tile, if `form` allows them and they cost less than `best`.
inline void consider_tile(const GradNormShape& s, GradNormForm form, int tile, int multiprocessors,
                          ProductChoice& best) {
  const auto tiles = [tile](int64_t rows) { return (rows + tile - 1) / tile; };
  const int64_t slots = int64_t{multiprocessors} * (tile == 64 ? kProductSmallBusy : 1);
  const double area = static_cast<double>(tile) * tile * (tile == 64 ? kProductSmallCost : 1.0);
  const auto consider = [&](GradNormPlan::Kernel kernel, int64_t per_group, double each) {
    GradNormPlan plan;
    plan.kernel = kernel;
    plan.tile = tile;
    plan.per_sample = s.groups * per_group;
    plan.items = s.batch * plan.per_sample;
    plan.grid = product_grid(plan.items, multiprocessors);
    const double cost = busy_cost(plan.items, slots, each);
    if (cost < best.cost) best = {plan, cost};
  };
  if (form != GradNormForm::gram)
    consider(GradNormPlan::Kernel::direct, tiles(s.outputs) * tiles(s.columns),
             area * whole_stages(s.positions));
  if (form != GradNormForm::direct) {
    const int64_t n = tiles(s.positions);
    consider(GradNormPlan::Kernel::gram, n * (n + 1) / 2,
             area * (whole_stages(s.columns) + whole_stages(s.outputs)) * kGramCost);
  }
}

// Several samples a tile, in linear layers of few positions.
inline void consider_packed(const GradNormShape& s, int multiprocessors, ProductChoice& best) {
  GradNormPlan plan;
  plan.kernel = GradNormPlan::Kernel::packed;
  plan.tile = s.positions <= 16 ? 16 : 32;
  const int64_t samples = 64 / plan.tile;
  plan.per_sample = 1;
  plan.items = s.batch;
  const int64_t blocks = (s.batch + samples - 1) / samples;
  plan.grid = product_grid(blocks, multiprocessors);
  const double each =
      64.0 * plan.tile * kPackedCost * (whole_stages(s.columns) + whole_stages(s.outputs));
  const double cost = busy_cost(blocks, int64_t{multiprocessors} * kProductSmallBusy, each);
  if (cost < best.cost) best = {plan, cost};
}

inline bool is_zero(const GradNormShape& s) {
  return s.batch == 0 || s.positions == 0 || s.columns == 0 || s.outputs == 0;
}

// The grid of the one-position kernel: eight lanes a sample where both vectors are short, a warp,
// or as many blocks as keep the multiprocessors busy.
inline GradNormPlan plan_outer(const GradNormShape& s, int multiprocessors) {
  GradNormPlan plan;
  plan.kernel = GradNormPlan::Kernel::outer;
  const int64_t length = s.columns + s.outputs;
  plan.lanes = length <= kOuterShort ? 8 : length <= kOuterWarp ? 32 : kGradNormThreads;
  plan.per_sample = 1;
  if (plan.lanes == kGradNormThreads) {
    const int64_t wanted = int64_t{multiprocessors} * kGradNormBlocksPerMultiprocessor / s.batch;
    plan.per_sample = std::clamp<int64_t>(wanted, 1, length / kOuterMinSplit);
  }
  plan.items = s.batch * plan.per_sample;
  const int64_t items_per_block = kGradNormThreads / plan.lanes;
  plan.grid = static_cast<unsigned>((plan.items + items_per_block - 1) / items_per_block);
  return plan;
}

inline GradNormPlan choose_linear_norm_plan(const GradNormShape& s, GradNormForm form,
                                            int multiprocessors) {
  if (is_zero(s)) return {};
  // With one position the Gram form is the product of two numbers.
  if (s.positions == 1 && form != GradNormForm::direct) return plan_outer(s, multiprocessors);
  ProductChoice best;
  if (form != GradNormForm::direct && s.positions <= kPackedMostRows)
    consider_packed(s, multiprocessors, best);
  consider_tile(s, form, 64, multiprocessors, best);
  consider_tile(s, form, 128, multiprocessors, best);
  return best.plan;
}

// Convolutions use the small tile alone: theirs is gathered value by value, and what it costs does
// not shrink with the tile.
inline GradNormPlan choose_conv_norm_plan(const GradNormShape& s, GradNormForm form,
                                          int multiprocessors) {
  if (is_zero(s)) return {};
  ProductChoice best;
  consider_tile(s, form, 64, multiprocessors, best);
  if (form == GradNormForm::gram) return best.plan;
  // A warp for a few columns of one output channel, or a block where there are too few of them.
  GradNormPlan narrow;
  narrow.kernel = GradNormPlan::Kernel::narrow;
  narrow.per_sample = s.groups * s.outputs * ((s.columns + kNarrowColumns - 1) / kNarrowColumns);
  narrow.items = s.batch * narrow.per_sample;
  const int64_t warps =
      int64_t{multiprocessors} * kGradNormBlocksPerMultiprocessor * (kGradNormThreads / 32);
  narrow.lanes = narrow.items < warps && s.positions > kNarrowWarpPositions ? kGradNormThreads : 32;
  const int64_t items_per_block = kGradNormThreads / narrow.lanes;
  narrow.grid =
      product_grid((narrow.items + items_per_block - 1) / items_per_block, multiprocessors);
  const double each =
      static_cast<double>(kNarrowColumns) * static_cast<double>(s.positions) * kNarrowCost;
  const double cost = busy_cost(narrow.items, warps * 32 / narrow.lanes, each);
  return cost < best.cost ? narrow : best.plan;
}

}  // namespace fastsel::cuda
