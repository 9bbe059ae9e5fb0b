// neighbor_sample on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// neighbor_sample.cuh.
#include "neighbor_sample.h"

#include "cuda/neighbor_sample.cuh"
#include "cuda/selection.h"

namespace fastsel {

namespace {

// f(arguments) with the anchors of the table's and the weights' types.
template <class F>
void with_anchors(const char* op, const Tensor& table, const Tensor& anchors,
                  const Tensor& anchor_weights, int64_t n, F&& f) {
  const Tensor ids = as_contiguous(table), rows = as_contiguous(anchors);
  const Tensor weights = as_contiguous(anchor_weights);
  dispatch_floating(op, "anchor_weights", weights.scalar_type(), [&]<class T>(Type<T>) {
    const auto run = [&]<class Id>(Type<Id>) {
      f(cuda::NeighborArguments<Id, T>{data<Id>(ids), ids.size(0), ids.size(1), data<int64_t>(rows),
                                       data<T>(weights), rows.size(0), n});
    };
    if (ids.scalar_type() == ScalarType::Long) {
      run(Type<int64_t>{});
    } else {
      run(Type<int32_t>{});
    }
  });
}

}  // namespace

// table: [N, K]; anchors, anchor_weights: [A]; returns indices [n] and probs [n].
std::tuple<Tensor, Tensor> neighbor_sample_cuda(const Tensor& table, const Tensor& anchors,
                                                const Tensor& anchor_weights, int64_t n,
                                                const Tensor& seed) {
  check_neighbor_sample_arguments(table, anchors, anchor_weights, n, seed);
  const DeviceGuard guard(table);
  const auto result = empty_neighbor_sample(table, n);
  if (n == 0) return result;
  with_anchors("neighbor_sample", table, anchors, anchor_weights, n,
               [&]<class Id, class T>(const cuda::NeighborArguments<Id, T>& arguments) {
                 cuda::launch(cuda::neighbor_sample_kernel<Id, T>,
                              warps_config(n, current_stream(table)), arguments,
                              data<int64_t>(seed), mutable_data<int64_t>(std::get<0>(result)),
                              mutable_data<float>(std::get<1>(result)));
               });
  return result;
}

// table: [N, K]; anchors, anchor_weights: [A]; ids: [n]; returns [n].
Tensor neighbor_probs_cuda(const Tensor& table, const Tensor& anchors, const Tensor& anchor_weights,
                           const Tensor& ids) {
  check_neighbor_probs_arguments(table, anchors, anchor_weights, ids);
  const DeviceGuard guard(table);
  const Tensor wanted = as_contiguous(ids);
  const int64_t n = wanted.numel();
  const Tensor probs = empty({n}, ScalarType::Float, ids);
  if (n == 0) return probs;
  with_anchors("neighbor_probs", table, anchors, anchor_weights, n,
               [&]<class Id, class T>(const cuda::NeighborArguments<Id, T>& arguments) {
                 cuda::launch(cuda::neighbor_probs_kernel<Id, T>,
                              warps_config(n, current_stream(table)), arguments,
                              data<int64_t>(wanted), mutable_data<float>(probs));
               });
  return probs;
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("neighbor_sample", TORCH_BOX(&fastsel::neighbor_sample_cuda));
  m.impl("neighbor_probs", TORCH_BOX(&fastsel::neighbor_probs_cuda));
}
