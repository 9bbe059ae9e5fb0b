// The plan and the building blocks of adaselection_'s kernels, for tests/test_adaselection_kernels.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/adaselection_launch.h"

namespace {

namespace cuda = fastsel::cuda;

pybind11::dict plan(int64_t batch, bool with_ranks, bool with_adaboost, int multiprocessors,
                    int shared_bytes) {
  static const char* const kNames[] = {"small", "block", "grid"};
  const auto chosen = cuda::choose_adaselection_plan(batch, with_ranks, with_adaboost,
                                                     {multiprocessors, shared_bytes});
  pybind11::dict out;
  out["kernel"] = kNames[static_cast<int>(chosen.kernel)];
  out["grid"] = chosen.grid;
  out["shared_bytes"] = chosen.shared_bytes;
  out["chunk"] = chosen.chunk;
  out["padded"] = chosen.padded;
  out["workspace_words"] = chosen.workspace_words;
  return out;
}

template <int kSums, int V>
__global__ void totals_kernel(const double* in, double* out) {
  double values[V];
  for (int v = 0; v < V; ++v) values[v] = in[threadIdx.x * V + v];
  out[threadIdx.x] = cuda::combine_values<kSums, V>(values);
}

template <int kSums, int V>
__global__ void parts_kernel(const double* in, unsigned count, double* out) {
  out[threadIdx.x] = cuda::totals_of_parts<kSums, V>(in, count);
}

// values [count, width]: what each lane gets of their totals, of the first `sums` columns sums. By
// lanes: a row a lane, 32 of them, the columns in registers; else in memory, any number of rows.
std::vector<double> totals(const std::vector<double>& values, int width, int sums, bool by_lanes) {
  std::vector<double> out(cuda::kWarpSize);
  const auto count = static_cast<unsigned>(values.size()) / static_cast<unsigned>(width);
  const auto run = [&](auto in_registers, auto in_memory) {
    const cuda::LaunchConfig config{1, cuda::kWarpSize};
    if (by_lanes)
      cuda::launch(in_registers, config, values.data(), out.data());
    else
      cuda::launch(in_memory, config, values.data(), count, out.data());
  };
  if (width == 1 && sums == 0)
    run(totals_kernel<0, 1>, parts_kernel<0, 1>);
  else if (width == 1 && sums == 1)
    run(totals_kernel<1, 1>, parts_kernel<1, 1>);
  else if (width == 2 && sums == 2)
    run(totals_kernel<2, 2>, parts_kernel<2, 2>);
  else if (width == 4 && sums == 2)
    run(totals_kernel<2, 4>, parts_kernel<2, 4>);
  else if (width == 8 && sums == 4)
    run(totals_kernel<4, 8>, parts_kernel<4, 8>);
  else if (width == 32 && sums == 7)
    run(totals_kernel<7, 32>, parts_kernel<7, 32>);
  else
    throw std::invalid_argument("totals: no kernel for this width and number of sums");
  return out;
}

template <class T, int kItems>
__global__ void ranks_kernel(const float* losses, unsigned batch, unsigned* out) {
  auto* shared = cuda::dynamic_shared<unsigned>();
  auto *ranks = shared + cuda::kWarpSize, *counts = ranks + batch;
  cuda::rank_losses<T, kItems>(losses, batch, ranks, counts, shared);
  for (unsigned i = threadIdx.x; i < batch; i += blockDim.x) out[i] = ranks[i];
}

// The ranks of up to 8 * 256 losses, which are of a 16-bit type if `narrow`.
std::vector<unsigned> ranks(const std::vector<float>& losses, bool narrow) {
  constexpr unsigned kThreads = 256;
  constexpr int kItems = 8;
  if (losses.size() > kThreads * kItems) throw std::invalid_argument("ranks: too many losses");
  std::vector<unsigned> out(losses.size());
  const auto batch = static_cast<unsigned>(losses.size());
  const size_t words = cuda::kWarpSize + batch + kThreads / cuda::kWarpSize * cuda::kRankBins;
  const cuda::LaunchConfig config{1, kThreads, words * sizeof(unsigned)};
  if (narrow)
    cuda::launch(ranks_kernel<fastsel::BFloat16, kItems>, config, losses.data(), batch, out.data());
  else
    cuda::launch(ranks_kernel<float, kItems>, config, losses.data(), batch, out.data());
  return out;
}

}  // namespace

void bind_adaselection(pybind11::module_& parent) {
  auto m =
      parent.def_submodule("adaselection", "The plan and the parts of adaselection_'s kernels.");
  m.def("plan", &plan);
  m.def("totals", &totals);
  m.def("ranks", &ranks);
  m.def("static_shared_bytes", &cuda::adaselection_static_bytes);
  m.attr("parts") = cuda::kAdaSelectionParts;
}
