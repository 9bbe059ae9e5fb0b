// What the launchers of linear_grad_norm_sq and conv_grad_norm_sq share: the form, alignment, and
// the sum over a sample's items.
#pragma once

#include <initializer_list>
#include <string_view>

#include "cuda/grad_norm_product.cuh"
#include "grad_norm.h"

namespace fastsel {

inline cuda::GradNormForm grad_norm_form(const char* op, std::string_view form) {
  switch (norm_form(op, form)) {
    case NormForm::direct: return cuda::GradNormForm::direct;
    case NormForm::gram: return cuda::GradNormForm::gram;
    case NormForm::automatic: break;
  }
  return cuda::GradNormForm::automatic;
}

// Whether values + any multiples of the strides (in elements) are multiples of 16 bytes.
template <class T>
bool starts_aligned(const T* values, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
  for (const int64_t stride : strides)
    aligned = aligned && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return aligned;
}

// Calls run(partial), which leaves plan.per_sample sums a sample, and adds them up in `out`. One
// sum a sample is the result already.
template <class F>
void with_partial_sums(const cuda::GradNormPlan& plan, const cuda::GradNormShape& shape,
                       const Tensor& out,  // [B]
                       void* stream, F&& run) {
  if (plan.items > 0 && plan.per_sample == 1) return run(mutable_data<float>(out));
  const Tensor partial = empty({plan.items}, ScalarType::Float, out);
  if (plan.items > 0) run(mutable_data<float>(partial));
  cuda::launch_finish_norms<1>(data<float>(partial), plan.per_sample, shape.batch,
                               mutable_data<float>(out), stream);
}

}  // namespace fastsel
