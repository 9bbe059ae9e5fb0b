// linear_grad_norm_sq on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// linear_grad_norm.cuh.
#include "cuda/linear_grad_norm.cuh"

#include <string>

#include "cuda/grad_norm_host.h"

namespace fastsel {

namespace {

// [B, T..., width] as B samples of T positions with unit stride along the width; copied if its
// strides cannot say so.
struct Positions {
  Tensor tensor;
  int64_t count, per_sample, per_position;
};

Positions as_positions(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  int64_t count = 1;
  for (int64_t i = 1; i < last; ++i) count *= x.size(i);
  bool uniform = x.size(last) <= 1 || x.stride(last) == 1;
  // From the last position dimension outwards each stride must continue the one before.
  int64_t per_position = 0, covered = 1;
  for (int64_t i = last - 1; i >= 1; --i) {
    if (x.size(i) == 1) continue;
    if (covered == 1)
      per_position = x.stride(i);
    else
      uniform = uniform && x.stride(i) == per_position * covered;
    covered *= x.size(i);
  }
  if (uniform) return {x, count, x.stride(0), per_position};
  return {as_contiguous(x), count, count * x.size(last), x.size(last)};
}

template <class T>
cuda::LinearOperand<T> operand(const Positions& x) {
  const int64_t width = x.tensor.size(x.tensor.dim() - 1);
  const T* values = data<T>(x.tensor);
  return {values, x.per_sample, x.per_position, width,
          starts_aligned(values, {x.per_sample, x.per_position})};
}

template <class T>
void launch_outer(const cuda::LinearSource<T>& source, const cuda::GradNormPlan& plan,
                  int64_t batch, const Tensor& out, void* stream) {
  const auto run = [&](auto kernel, float* sums) {
    cuda::launch(kernel, {plan.grid, cuda::kGradNormThreads, 0, stream}, source, batch,
                 plan.per_sample, sums);
  };
  float* norms = mutable_data<float>(out);
  if (plan.lanes == 8) return run(cuda::outer_norm_kernel<T, 8>, norms);
  if (plan.lanes == 32) return run(cuda::outer_norm_kernel<T, 32>, norms);
  if (plan.per_sample == 1) return run(cuda::outer_norm_kernel<T, cuda::kGradNormThreads>, norms);
  const Tensor sums = empty({batch, plan.per_sample, 2}, ScalarType::Float, out);
  run(cuda::outer_norm_kernel<T, cuda::kGradNormThreads>, mutable_data<float>(sums));
  cuda::launch_finish_norms<2>(data<float>(sums), plan.per_sample, batch, norms, stream);
}

template <class T>
void launch_packed(const cuda::LinearSource<T>& source, const cuda::GradNormPlan& plan,
                   int64_t batch, float* out, void* stream) {
  const auto run = [&]<class Tile>(auto kernel, Type<Tile>) {
    cuda::launch(kernel, {plan.grid, Tile::kThreads, cuda::kProductSharedBytes<Tile, true>, stream},
                 source, batch, out);
  };
  if (plan.tile == 16)
    run(cuda::packed_norm_kernel<T, 16>, Type<cuda::PackedTile<T, 16>>{});
  else
    run(cuda::packed_norm_kernel<T, 32>, Type<cuda::PackedTile<T, 32>>{});
}

}  // namespace

Tensor linear_grad_norm_sq_cuda(const Tensor& activations,   // [B, T..., d]
                                const Tensor& grad_outputs,  // [B, T..., p]
                                std::string form) {
  constexpr const char* kOp = "linear_grad_norm_sq";
  check_linear_arguments(kOp, activations, grad_outputs);
  const cuda::GradNormForm wanted = grad_norm_form(kOp, form);
  const DeviceGuard guard(activations);
  const Tensor out = empty_norms(activations);
  dispatch_floating(kOp, "activations", activations.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (out.numel() == 0) return;
    const Positions a = as_positions(activations), g = as_positions(grad_outputs);
    const cuda::LinearSource<T> source{operand<T>(a), operand<T>(g), a.count};
    const cuda::GradNormShape shape{out.size(0), 1, a.count, source.a.width, source.g.width};
    const auto plan = cuda::choose_linear_norm_plan(shape, wanted, cuda::multiprocessor_count());
    void* stream = current_stream(activations);
    if (plan.kernel == cuda::GradNormPlan::Kernel::outer)
      return launch_outer(source, plan, shape.batch, out, stream);
    with_partial_sums(plan, shape, out, stream, [&](float* partial) {
      if (plan.kernel == cuda::GradNormPlan::Kernel::packed)
        launch_packed(source, plan, shape.batch, partial, stream);
      else if (plan.tile == 64)
        cuda::launch_product<cuda::LinearSource<T>, 64>(source, plan, shape, partial, stream);
      else
        cuda::launch_product<cuda::LinearSource<T>, 128>(source, plan, shape, partial, stream);
    });
  });
  return out;
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("linear_grad_norm_sq", TORCH_BOX(&fastsel::linear_grad_norm_sq_cuda));
}
