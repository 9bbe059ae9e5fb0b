// affine_grad_norm_sq and bias_grad_norm_sq on CUDA tensors (and, compiled for the host emulation, on
// CPU tensors): see affine_grad_norm.cuh.

#include "cuda/affine_grad_norm.cuh"

#include <algorithm>
#include <optional>

#include "grad_norm.h"
#include "grad_norm_layout.h"

namespace fastsel {

namespace {

// Values of one 16-byte load.
template <class T>
inline constexpr int kWideLoad = 16 / static_cast<int>(sizeof(T));

bool divides(int64_t divisor, const PositionStrides& strides, bool along_positions) {
  return strides.batch % divisor == 0 &&
         (along_positions ? strides.column : strides.position) % divisor == 0;
}

// Whether all 16-byte loads of the kernels would be aligned.
template <class T>
bool may_load_wide(const AffineArguments<T>& a, bool along_positions) {
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!aligned(a.grad_outputs) || !divides(kWideLoad<T>, a.grad_strides, along_positions))
    return false;
  if (a.normalized &&
      (!aligned(a.normalized) || !divides(kWideLoad<T>, a.normalized_strides, along_positions)))
    return false;
  return along_positions || a.columns % kWideLoad<T> == 0;
}

int64_t divided_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// A power of two of at least `count`, at most a warp.
int lanes_for(int64_t count) {
  int lanes = 1;
  while (lanes < cuda::kWarpSize && lanes < count) lanes *= 2;
  return lanes;
}

// A block takes a sample where there are enough samples, or too little to do to share it. Otherwise
// blocks share the columns first, because that costs nothing, and then the positions.
template <class T>
cuda::AffinePlan choose_plan(const AffineArguments<T>& a, bool along_positions, int vector) {
  cuda::AffinePlan plan{};
  plan.lanes = lanes_for(divided_up(along_positions ? a.positions : a.columns, vector));
  plan.tiles = plan.splits = 1;
  plan.per_split = std::max<int64_t>(a.positions, 1);
  const int64_t wanted =
      int64_t{cuda::multiprocessor_count()} * cuda::kAffineBlocksPerMultiprocessor;
  if (a.batch >= wanted || a.positions * a.columns <= cuda::kAffineLittleWork) return plan;
  const int64_t columns_at_once =
      along_positions ? cuda::kAffineThreads / plan.lanes : int64_t{plan.lanes} * vector;
  // Each block takes as many tiles as the next, or the one with more would keep the rest waiting.
  const int64_t tiles = divided_up(a.columns, columns_at_once);
  const int64_t blocks = std::clamp<int64_t>(divided_up(wanted, a.batch), 1, tiles);
  plan.tiles = divided_up(tiles, divided_up(tiles, blocks));
  const int64_t most =
      std::max<int64_t>(a.positions * columns_at_once / cuda::kAffineLittleWork, 1);
  const int64_t splits = std::clamp<int64_t>(wanted / (a.batch * plan.tiles), 1, most);
  plan.per_split = divided_up(divided_up(a.positions, splits), vector) * vector;  // stays aligned
  plan.splits = divided_up(a.positions, plan.per_split);
  return plan;
}

template <class T, int kVector, bool kWeighted>
void launch_affine(const AffineArguments<T>& a, bool along_positions, const Tensor& norms) {
  void* stream = current_stream(norms);
  cuda::AffinePlan plan = choose_plan(a, along_positions, kVector);
  const bool shared = plan.tiles * plan.splits > 1;
  std::optional<Tensor> sums;
  if (shared) {
    sums = empty({a.batch, plan.splits, a.columns}, ScalarType::Double, norms);
    plan.sums = mutable_data<double>(*sums);
  }
  const cuda::LaunchConfig config{static_cast<unsigned>(a.batch * plan.tiles * plan.splits),
                                  cuda::kAffineThreads, 0, stream};
  if (along_positions) {
    cuda::launch(cuda::affine_positions_kernel<T, kVector, kWeighted>, config, a, plan,
                 mutable_data<float>(norms));
  } else {
    cuda::launch(cuda::affine_columns_kernel<T, kVector, kWeighted>, config, a, plan,
                 mutable_data<float>(norms));
  }
  if (!shared) return;
  cuda::launch(cuda::affine_squares_kernel<cuda::kAffineSquaresThreads>,
               {static_cast<unsigned>(a.batch), cuda::kAffineSquaresThreads, 0, stream},
               static_cast<const double*>(plan.sums), a.columns, plan.splits,
               mutable_data<float>(norms));
}

template <class T, bool kWeighted>
void choose_loads(const AffineArguments<T>& a, bool along_positions, const Tensor& norms) {
  if (may_load_wide(a, along_positions)) {
    launch_affine<T, kWideLoad<T>, kWeighted>(a, along_positions, norms);
  } else {
    launch_affine<T, 1, kWeighted>(a, along_positions, norms);
  }
}

template <bool kWeighted>
Tensor column_norms(const char* op, const char* argument, const std::optional<Tensor>& normalized,
                    const Tensor& grad_outputs) {
  const DeviceGuard guard(grad_outputs);
  const AffineLayout layout = affine_layout(normalized, grad_outputs);
  const Tensor norms = empty_norms(grad_outputs);
  dispatch_floating(op, argument, grad_outputs.scalar_type(), [&](auto tag) {
    if (norms.numel() == 0) return;
    using T = typename decltype(tag)::type;
    choose_loads<T, kWeighted>(affine_arguments<T>(layout), layout.along_positions, norms);
  });
  return norms;
}

}  // namespace

Tensor affine_grad_norm_sq_cuda(const Tensor& normalized,      // [B, T..., D]
                                const Tensor& grad_outputs) {  // [B, T..., D]
  check_affine_arguments("affine_grad_norm_sq", normalized, grad_outputs);
  return column_norms<true>("affine_grad_norm_sq", "normalized", normalized, grad_outputs);
}

Tensor bias_grad_norm_sq_cuda(const Tensor& grad_outputs) {  // [B, T..., p]
  check_bias_arguments("bias_grad_norm_sq", grad_outputs);
  return column_norms<false>("bias_grad_norm_sq", "grad_outputs", std::nullopt, grad_outputs);
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("affine_grad_norm_sq", TORCH_BOX(&fastsel::affine_grad_norm_sq_cuda));
  m.impl("bias_grad_norm_sq", TORCH_BOX(&fastsel::bias_grad_norm_sq_cuda));
}
