// neighbor_sample on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// neighbor_sample.cuh.
#include "neighbor_sample.h"

#include "cuda/neighbor_sample.cuh"
#include "cuda/selection.h"

namespace fastsel {

// table: [N, K]; anchors, anchor_weights: [A]; returns indices [n] and probs [n].
std::tuple<Tensor, Tensor> neighbor_sample_cuda(const Tensor& table, const Tensor& anchors,
                                                const Tensor& anchor_weights, int64_t n,
                                                const Tensor& seed) {
  check_neighbor_sample_arguments(table, anchors, anchor_weights, n, seed);
  const DeviceGuard guard(table);
  auto [indices, probs] = empty_neighbor_sample(table, n);
  const Tensor ids = as_contiguous(table), rows = as_contiguous(anchors);
  const Tensor weights = as_contiguous(anchor_weights);
  dispatch_floating("neighbor_sample", "anchor_weights", weights.scalar_type(),
                    [&, &indices = indices, &probs = probs]<class T>(Type<T>) {
                      if (n == 0) return;
                      const auto config = warps_config(n, current_stream(table));
                      const auto run = [&]<class Id>(Type<Id>) {
                        cuda::launch(cuda::neighbor_sample_kernel<Id, T>, config, data<Id>(ids),
                                     ids.size(0), ids.size(1), data<int64_t>(rows),
                                     data<T>(weights), rows.size(0), data<int64_t>(seed), n,
                                     mutable_data<int64_t>(indices), mutable_data<float>(probs));
                      };
                      if (ids.scalar_type() == ScalarType::Long) {
                        run(Type<int64_t>{});
                      } else {
                        run(Type<int32_t>{});
                      }
                    });
  return {indices, probs};
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("neighbor_sample", TORCH_BOX(&fastsel::neighbor_sample_cuda));
}
