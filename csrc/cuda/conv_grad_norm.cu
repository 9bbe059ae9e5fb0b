// conv_grad_norm_sq on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// conv_grad_norm.cuh.
#include "cuda/conv_grad_norm.cuh"

#include <string>
#include <vector>

#include "cuda/grad_norm_host.h"

namespace fastsel {

namespace {

// Inside a sample's group offsets are 32 bits wide, and padded coordinates must not pass
// kConvExtent.
void check_extents(const char* op, const ConvGeometry& g) {
  constexpr int64_t kMost = INT32_MAX;
  FASTSEL_CHECK(g.in_channels * g.in_positions() <= kMost && g.positions() <= kMost &&
                    g.columns() <= kMost && g.out_channels <= kMost,
                op, ": a group of one sample must have at most ", kMost,
                " input values, output positions and weights of an output channel");
  for (int i = 0; i < 3; ++i)
    FASTSEL_CHECK(g.in[i] + 2 * g.padding[i] < cuda::kConvExtent, op,
                  ": a padded spatial dimension must be below ", cuda::kConvExtent, ", got ",
                  g.in[i] + 2 * g.padding[i]);
}

bool is_dense(const ConvGeometry& g) {
  bool dense = true;
  for (int i = 0; i < 3; ++i)
    dense = dense && g.kernel[i] == 1 && g.stride[i] == 1 && g.padding[i] == 0;
  return dense;
}

template <class T>
void launch_conv(const cuda::ConvArguments<T>& a, const cuda::GradNormPlan& plan,
                 const cuda::GradNormShape& shape, bool dense, float* partial, void* stream) {
  if (plan.kernel == cuda::GradNormPlan::Kernel::narrow) {
    const cuda::LaunchConfig config{plan.grid, cuda::kGradNormThreads, 0, stream};
    if (plan.lanes == cuda::kWarpSize)
      return cuda::launch(cuda::narrow_norm_kernel<T, cuda::kWarpSize>, config, a, plan.items,
                          plan.per_sample, partial);
    return cuda::launch(cuda::narrow_norm_kernel<T, cuda::kGradNormThreads>, config, a, plan.items,
                        plan.per_sample, partial);
  }
  if (dense)
    return cuda::launch_product<cuda::ConvSource<T, true>, 64>({a}, plan, shape, partial, stream);
  cuda::launch_product<cuda::ConvSource<T, false>, 64>({a}, plan, shape, partial, stream);
}

}  // namespace

Tensor conv_grad_norm_sq_cuda(const Tensor& input,         // [B, C_in, spatial...]
                              const Tensor& grad_outputs,  // [B, C_out, spatial...]
                              std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups, std::string form) {
  constexpr const char* kOp = "conv_grad_norm_sq";
  const ConvGeometry g =
      conv_geometry(kOp, input, grad_outputs, kernel_size, stride, padding, dilation, groups);
  const cuda::GradNormForm wanted = grad_norm_form(kOp, form);
  const DeviceGuard guard(input);
  const Tensor out = empty_norms(input);
  dispatch_floating(kOp, "input", input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (out.numel() == 0) return;
    const cuda::GradNormShape shape{g.batch, g.groups, g.positions(), g.columns(), g.out_channels};
    const auto plan = cuda::choose_conv_norm_plan(shape, wanted, cuda::multiprocessor_count());
    void* stream = current_stream(input);
    with_partial_sums(plan, shape, out, stream, [&](float* partial) {
      check_extents(kOp, g);
      const Tensor x = as_contiguous(input), grad = as_contiguous(grad_outputs);
      const T *values = data<T>(x), *gradients = data<T>(grad);
      const cuda::ConvArguments<T> arguments{values,
                                             gradients,
                                             g.groups,
                                             g.in_channels,
                                             g.out_channels,
                                             starts_aligned(values, {g.in_positions()}),
                                             starts_aligned(gradients, {g.positions()}),
                                             cuda::ConvMap(g)};
      launch_conv(arguments, plan, shape, is_dense(g), partial, stream);
    });
  });
  return out;
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("conv_grad_norm_sq", TORCH_BOX(&fastsel::conv_grad_norm_sq_cuda));
}
