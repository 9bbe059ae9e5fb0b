// knn on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see knn.cuh.
#include "knn.h"

#include <bit>

#include "cuda/knn.cuh"
#include "cuda/selection.h"

namespace fastsel {

namespace {

template <class T>
void search(const Tensor& queries, const Tensor& points, int64_t k, const Tensor& distances,
            const Tensor& indices) {
  void* const stream = current_stream(queries);
  const int64_t query_count = queries.size(0), count = points.size(0), dims = points.size(1);
  const Tensor query_norms = empty({query_count}, ScalarType::Float, queries);
  const Tensor point_norms = empty({count}, ScalarType::Float, queries);
  const auto norms = [&](const Tensor& rows, const Tensor& out) {
    cuda::launch(cuda::knn_norms_kernel<T>, warps_config(rows.size(0), stream), data<T>(rows),
                 rows.size(0), dims, mutable_data<float>(out));
  };
  norms(queries, query_norms);
  norms(points, point_norms);

  cuda::KnnArguments<T> arguments{};
  arguments.points = data<T>(points);
  arguments.count = static_cast<unsigned>(count);
  arguments.dims = dims;
  arguments.point_norms = data<float>(point_norms);
  arguments.k = static_cast<unsigned>(k);
  arguments.capacity = std::bit_ceil(static_cast<unsigned>(k) + 2 * cuda::kKnnTile);
  // As many queries at a time as have room for their lists.
  const int64_t list_bytes = int64_t{arguments.capacity} * sizeof(cuda::KnnEntry);
  const int64_t most = std::max<int64_t>(cuda::kKnnWorkspace / list_bytes, cuda::kKnnTile);
  const int64_t some = std::min(query_count, most / cuda::kKnnTile * cuda::kKnnTile);
  const int64_t blocks = (some + cuda::kKnnTile - 1) / cuda::kKnnTile;
  const int64_t tiles = (count + cuda::kKnnTile - 1) / cuda::kKnnTile;
  const int64_t wanted = int64_t{cuda::multiprocessor_count()} * cuda::kKnnBlocksPerMultiprocessor;
  const int64_t parts = std::clamp<int64_t>(
      wanted / blocks, 1, std::min<int64_t>(tiles, most / (blocks * cuda::kKnnTile)));
  arguments.parts = static_cast<unsigned>(std::max<int64_t>(parts, 1));
  const Tensor lists =
      empty({some * int64_t{arguments.parts} * arguments.capacity}, ScalarType::Long, queries);
  arguments.lists = reinterpret_cast<cuda::KnnEntry*>(mutable_data<int64_t>(lists));

  for (int64_t first = 0; first < query_count; first += some) {
    arguments.queries = data<T>(queries) + first * dims;
    arguments.query_count = std::min(some, query_count - first);
    arguments.query_norms = data<float>(query_norms) + first;
    arguments.distances = mutable_data<float>(distances) + first * k;
    arguments.indices = mutable_data<int64_t>(indices) + first * k;
    const auto rows =
        static_cast<unsigned>((arguments.query_count + cuda::kKnnTile - 1) / cuda::kKnnTile);
    cuda::launch(
        cuda::knn_kernel<T>,
        cuda::LaunchConfig{dim3(rows, arguments.parts), dim3(cuda::kKnnThreads), 0, stream},
        arguments);
    if (arguments.parts > 1)
      cuda::launch(cuda::knn_merge_kernel<T>, warps_config(arguments.query_count, stream),
                   arguments);
  }
}

}  // namespace

// queries: [Q, D]; data: [N, D]; returns distances [Q, k] and indices [Q, k].
std::tuple<Tensor, Tensor> knn_cuda(const Tensor& queries, const Tensor& data, int64_t k) {
  check_knn_arguments(queries, data, k);
  FASTSEL_CHECK(k <= cuda::kKnnMost, "knn: k must be at most ", cuda::kKnnMost, " on a GPU, got ",
                k);
  FASTSEL_CHECK(data.size(0) <= kMostColumns, "knn: data must have at most ", kMostColumns,
                " points, got ", data.size(0));
  const DeviceGuard guard(queries);
  auto [distances, indices] = empty_knn(queries, k);
  dispatch_floating("knn", "queries", queries.scalar_type(),
                    [&, &distances = distances, &indices = indices]<class T>(Type<T>) {
                      if (distances.numel() == 0) return;
                      search<T>(as_contiguous(queries), as_contiguous(data), k, distances, indices);
                    });
  return {distances, indices};
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("knn", TORCH_BOX(&fastsel::knn_cuda));
}
