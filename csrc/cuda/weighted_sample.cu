// weighted_sample on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// weighted_sample.cuh.
#include "weighted_sample.h"

#include <algorithm>
#include <optional>

#include "cuda/selection.h"
#include "cuda/topk_launch.h"
#include "cuda/weighted_sample.cuh"

namespace fastsel {

namespace {

struct Drawing {
  const Tensor& weights;  // [rows, items], contiguous
  const Tensor& seed;
  const Tensor& indices;  // [rows, n]
  const Tensor& probs;
  int64_t rows, items, n;
};

template <class T>
void sample_without(const Drawing& d) {
  const int64_t k = std::min(d.n + 1, d.items);
  const bool sort_here = k <= cuda::kTopkSortLimit;
  const cuda::TopkPlan plan = cuda::choose_topk_plan<cuda::WeightedRow<T>>(
      d.rows, static_cast<unsigned>(d.items), static_cast<unsigned>(k), sort_here,
      {cuda::multiprocessor_count(), cuda::max_shared_bytes_per_block()});
  std::optional<Tensor> entries, workspace, ranks;
  if (plan.entries) entries = empty({plan.entries}, ScalarType::Long, d.weights);
  if (plan.workspace_words) workspace = empty({plan.workspace_words}, ScalarType::Int, d.weights);
  if (!sort_here) ranks = empty({d.rows, k}, ScalarType::Int, d.weights);
  Tensor keys = empty({d.rows, k}, ScalarType::Int, d.weights);
  Tensor items = empty({d.rows, k}, ScalarType::Long, d.weights);
  cuda::WeightedArguments<T> arguments{};
  arguments.rows = d.rows;
  arguments.columns = static_cast<unsigned>(d.items);
  arguments.k = static_cast<unsigned>(k);
  arguments.weights = data<T>(d.weights);
  arguments.seed = data<int64_t>(d.seed);
  arguments.keys = reinterpret_cast<unsigned*>(mutable_data<int32_t>(keys));
  arguments.items = mutable_data<int64_t>(items);
  arguments.ranks = optional_data<int>(ranks);
  void* const stream = current_stream(d.weights);
  cuda::launch_topk(arguments, plan, optional_data<unsigned>(workspace),
                    optional_data<unsigned long long>(entries), stream);
  if (!sort_here) {
    const Tensor order = stable_argsort(*ranks);
    keys = gather_last(keys, order);
    items = gather_last(items, order);
  }
  const int64_t warps = (d.rows * d.n + cuda::kWarpSize - 1) / cuda::kWarpSize;
  cuda::launch(cuda::weighted_finish_kernel<T>, warps_config(warps, stream), data<T>(d.weights),
               reinterpret_cast<const unsigned*>(data<int32_t>(keys)), data<int64_t>(items), d.rows,
               d.items, d.n, k, mutable_data<int64_t>(d.indices), mutable_data<float>(d.probs));
}

template <class T>
void sample_with(const Drawing& d) {
  cuda::SumsTree tree{};
  int64_t words = 0;
  for (int64_t count = d.items; tree.levels == 0 || count > cuda::kSumsFanOut;) {
    count = (count + cuda::kSumsFanOut - 1) / cuda::kSumsFanOut;
    tree.counts[tree.levels++] = count;
    words += d.rows * count;
  }
  const Tensor sums = empty({words}, ScalarType::Double, d.weights);
  double* at = mutable_data<double>(sums);
  void* const stream = current_stream(d.weights);
  for (int level = 0; level < tree.levels; ++level) {
    const int64_t nodes = tree.counts[level];
    tree.sums[level] = at;
    at += d.rows * nodes;
    const auto config = warps_config(d.rows * nodes, stream);
    if (level == 0) {
      cuda::launch(cuda::sum_nodes_kernel<T>, config, data<T>(d.weights), d.rows, d.items,
                   tree.sums[level], nodes);
    } else {
      cuda::launch(cuda::sum_nodes_kernel<double>, config,
                   static_cast<const double*>(tree.sums[level - 1]), d.rows, tree.counts[level - 1],
                   tree.sums[level], nodes);
    }
  }
  cuda::launch(cuda::descend_kernel<T>, warps_config(d.rows * d.n, stream), data<T>(d.weights),
               d.rows, d.items, tree, data<int64_t>(d.seed), d.n, mutable_data<int64_t>(d.indices),
               mutable_data<float>(d.probs));
}

}  // namespace

// weights: [..., N]; returns indices [..., n] and probs [..., n].
std::tuple<Tensor, Tensor> weighted_sample_cuda(const Tensor& weights, int64_t n,
                                                const Tensor& seed, bool replacement) {
  check_weighted_sample_arguments(weights, n, seed, replacement);
  const int64_t items = weights.size(-1);
  FASTSEL_CHECK(replacement || items <= kMostColumns,
                "weighted_sample: the last dimension must be at most ", kMostColumns,
                " without replacement, got ", items);
  const DeviceGuard guard(weights);
  auto [indices, probs] = empty_weighted_sample(weights, n);
  dispatch_floating("weighted_sample", "weights", weights.scalar_type(),
                    [&, &indices = indices, &probs = probs]<class T>(Type<T>) {
                      if (indices.numel() == 0) return;
                      const Tensor x = as_contiguous(weights);
                      const Drawing drawing{x, seed, indices, probs, x.numel() / items, items, n};
                      replacement ? sample_with<T>(drawing) : sample_without<T>(drawing);
                    });
  return {indices, probs};
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("weighted_sample", TORCH_BOX(&fastsel::weighted_sample_cuda));
}
