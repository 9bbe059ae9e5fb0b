// adaselection_ on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// adaselection.cuh.
#include "adaselection.h"

#include <tuple>
#include <utility>

#include "cuda/adaselection_launch.h"
#include "topk.h"

namespace fastsel {

namespace {

// topk's limit: positions are 32 bits wide.
constexpr int64_t kMaxBatch = 4'000'000'000;

// The state and the scores by a cooperative grid, before that the samples' order if coreset1 wants
// it, after that the choice. Returns the indices [k].
template <class T>
Tensor decide_on_grid(const AdaSelectionArguments<T>& a, const cuda::AdaSelectionPlan& plan,
                      bool with_ranks, bool with_adaboost, const Tensor& losses) {
  void* stream = current_stream(losses);
  const Tensor keys = empty({plan.padded}, ScalarType::Float, losses);
  const Tensor workspace = empty({plan.workspace_words}, ScalarType::Double, losses);
  std::optional<Tensor> order;
  if (with_ranks) {
    const Tensor sort_keys = empty({a.batch}, ScalarType::Int, losses);
    cuda::launch_adaselection_sort_keys(a, mutable_data<int>(sort_keys), stream);
    order = stable_argsort(sort_keys);
  }
  const cuda::AdaSelectionGrid grid = cuda::adaselection_grid(
      plan, with_ranks, with_adaboost, mutable_data<float>(keys), mutable_data<double>(workspace),
      order ? data<int64_t>(*order) : nullptr);
  cuda::launch_adaselection_grid(a, plan, grid, stream);
  return std::get<1>(topk_cuda(keys, a.k, true, false));
}

}  // namespace

std::tuple<Tensor, Tensor> adaselection_cuda(Tensor losses,                           // [B]
                                             std::optional<Tensor> grad_norms,        // [B]
                                             std::optional<Tensor> reference_losses,  // [B]
                                             std::vector<int64_t> methods,            // [M]
                                             Tensor method_weights,                   // [M]
                                             Tensor method_losses,                    // [M]
                                             Tensor step,                             // [1]
                                             int64_t k, double beta, double curriculum_power,
                                             bool standardize,
                                             std::optional<Tensor> statistics,  // [S, B]
                                             std::optional<Tensor> excluded) {  // [1]
  AdaSelectionCall call{std::move(losses),
                        std::move(grad_norms),
                        std::move(reference_losses),
                        std::move(methods),
                        std::move(method_weights),
                        std::move(method_losses),
                        std::move(step),
                        k,
                        beta,
                        curriculum_power,
                        standardize,
                        std::move(statistics),
                        std::move(excluded)};
  check_adaselection_arguments(call);
  FASTSEL_CHECK(call.losses.size(0) <= kMaxBatch, "adaselection_: losses must be at most ",
                kMaxBatch, ", got ", call.losses.size(0));
  const DeviceGuard guard(call.losses);
  make_unit_stride(call);
  auto [indices, scores] = empty_adaselection(call);
  dispatch_floating("adaselection_", "losses", call.losses.scalar_type(),
                    [&, &indices = indices, &scores = scores]<class T>(Type<T>) {
                      const auto a = adaselection_arguments<T>(call, indices, scores);
                      if (a.batch == 0) return;
                      const bool with_ranks = has_method(call, Method::coreset1);
                      const bool with_adaboost = has_method(call, Method::adaboost);
                      const cuda::AdaSelectionPlan plan = cuda::choose_adaselection_plan(
                          a.batch, with_ranks, with_adaboost,
                          {cuda::multiprocessor_count(), cuda::max_shared_bytes_per_block()});
                      if (plan.kernel == cuda::AdaSelectionPlan::Kernel::grid)
                        indices = decide_on_grid(a, plan, with_ranks, with_adaboost, call.losses);
                      else
                        cuda::launch_adaselection_block(a, plan, with_ranks, with_adaboost,
                                                        current_stream(call.losses));
                    });
  return {indices, scores};
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("adaselection_", TORCH_BOX(&fastsel::adaselection_cuda));
}
