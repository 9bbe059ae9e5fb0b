// choose_topk_plan for tests/test_topk_kernels.py.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/topk_launch.h"

namespace {

namespace cuda = fastsel::cuda;

pybind11::dict describe(const cuda::TopkPlan& plan) {
  static const char* const kNames[] = {"small", "registers", "shared", "grid"};
  pybind11::dict out;
  out["kernel"] = kNames[static_cast<int>(plan.kernel)];
  out["grid"] = plan.grid;
  out["sort_size"] = plan.sort_size;
  out["shared_bytes"] = plan.shared_bytes;
  out["blocks_per_row"] = plan.shape.blocks_per_row;
  out["chunk"] = plan.shape.chunk;
  out["chunk_in_shared"] = plan.shape.chunk_in_shared;
  out["listed"] = plan.shape.listed;
  out["workspace_words"] = plan.workspace_words;
  out["entries"] = plan.entries;
  return out;
}

pybind11::dict plan(int64_t rows, unsigned columns, unsigned k, bool sort, int element_bytes,
                    int multiprocessors, int shared_bytes) {
  const cuda::TopkDevice device{multiprocessors, shared_bytes};
  if (element_bytes == 4)
    return describe(cuda::choose_topk_plan<cuda::TopkRow<float>>(rows, columns, k, sort, device));
  if (element_bytes == 2)
    return describe(
        cuda::choose_topk_plan<cuda::TopkRow<fastsel::Half>>(rows, columns, k, sort, device));
  throw std::invalid_argument("topk_plan: element_bytes must be 2 or 4, got " +
                              std::to_string(element_bytes));
}

}  // namespace

void bind_topk_plan(pybind11::module_& m) {
  m.def("topk_plan", &plan);
  m.attr("topk_static_shared_bytes") = sizeof(cuda::TopkStorage<cuda::kTopkDigitBits>);
  m.attr("topk_sort_limit") = cuda::kTopkSortLimit;
}
