// topk on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see topk.cuh.
#include <optional>
#include <tuple>

#include "cuda/selection.h"
#include "cuda/topk_launch.h"
#include "topk.h"

namespace fastsel {

namespace {

// The input as rows with unit stride along columns, any distance apart; copied if it is not that
// already.
struct Rows {
  Tensor tensor;
  int64_t count, columns, stride;
};

Rows as_rows(const Tensor& scores) {
  const int64_t columns = scores.size(-1);
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < scores.dim(); ++d) count *= scores.size(d);
  const bool unit = columns <= 1 || scores.stride(-1) == 1;
  if (unit && scores.dim() == 1) return {scores, count, columns, columns};
  if (unit && scores.dim() == 2) return {scores, count, columns, scores.stride(0)};
  return {as_contiguous(scores), count, columns, columns};
}

}  // namespace

// scores: [..., N]; returns values [..., k] and indices [..., k].
std::tuple<Tensor, Tensor> topk_cuda(const Tensor& scores, int64_t k, bool largest, bool sorted) {
  check_topk_arguments(scores, k);
  const int64_t columns = scores.size(-1);
  FASTSEL_CHECK(columns <= kMostColumns, "topk: the last dimension must be at most ", kMostColumns,
                ", got ", columns);
  const DeviceGuard guard(scores);
  auto [values, indices] = empty_topk(scores, k);
  dispatch_floating(
      "topk", "scores", scores.scalar_type(),
      [&, &values = values, &indices = indices]<class T>(Type<T>) {
        if (values.numel() == 0) return;
        const Rows rows = as_rows(scores);
        const bool sort_here = sorted && k <= cuda::kTopkSortLimit;
        const bool sort_later = sorted && !sort_here;
        const cuda::TopkPlan plan = cuda::choose_topk_plan<cuda::TopkRow<T>>(
            rows.count, static_cast<unsigned>(columns), static_cast<unsigned>(k), sort_here,
            {cuda::multiprocessor_count(), cuda::max_shared_bytes_per_block()});
        // An allocation costs as much as a short kernel, so there is none that is not needed.
        std::optional<Tensor> entries, workspace, ranks;
        if (plan.entries) entries = empty({plan.entries}, ScalarType::Long, scores);
        if (plan.workspace_words)
          workspace = empty({plan.workspace_words}, ScalarType::Int, scores);
        if (sort_later) ranks = torch::stable::new_empty(indices, indices.sizes(), ScalarType::Int);
        cuda::TopkArguments<T> arguments{};
        arguments.scores = data<T>(rows.tensor);
        arguments.row_stride = rows.stride;
        arguments.rows = rows.count;
        arguments.columns = static_cast<unsigned>(columns);
        arguments.k = static_cast<unsigned>(k);
        arguments.largest = largest;
        arguments.values = mutable_data<T>(values);
        arguments.indices = mutable_data<int64_t>(indices);
        arguments.ranks = optional_data<int>(ranks);
        cuda::launch_topk(arguments, plan, optional_data<unsigned>(workspace),
                          optional_data<unsigned long long>(entries), current_stream(scores));
        if (!sort_later) return;
        // Results come in index order, so a stable sort breaks ties by index. The ranks and not the
        // values are sorted, because torch's sorts disagree about NaNs with a sign.
        const Tensor order = stable_argsort(*ranks);
        values = gather_last(values, order);
        indices = gather_last(indices, order);
      });
  return {values, indices};
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("topk", TORCH_BOX(&fastsel::topk_cuda));
}
