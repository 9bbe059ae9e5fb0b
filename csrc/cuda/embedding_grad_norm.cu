// embedding_grad_norm_sq on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// embedding_grad_norm.cuh.

#include "cuda/embedding_grad_norm.cuh"

#include <algorithm>
#include <optional>
#include <vector>

#include "grad_norm.h"
#include "grad_norm_layout.h"

namespace fastsel {

namespace {

// Values of one 16-byte load.
template <class T>
inline constexpr int kWideLoad = 16 / static_cast<int>(sizeof(T));

int64_t divided_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// The positions of each sample in the order of their tokens: int64 [B, T].
template <class Index>
Tensor order_of(const Tensor& tokens /* [B, T] */) {
  const int64_t batch = tokens.size(0), positions = tokens.size(1);
  if (positions > cuda::kEmbeddingSortLimit) return stable_argsort(tokens);
  const Tensor order = empty({batch, positions}, ScalarType::Long, tokens);
  int size = 1;
  while (size < positions) size *= 2;
  cuda::launch(cuda::embedding_order_kernel<Index>,
               {static_cast<unsigned>(batch), cuda::kEmbeddingSortThreads,
                size * (sizeof(int64_t) + sizeof(int)), current_stream(tokens)},
               data<Index>(tokens), static_cast<int>(positions), size,
               mutable_data<int64_t>(order));
  return order;
}

// Enough chunks to fill the multiprocessors with warps, of whole rounds of 32 positions.
template <class Index, class T>
cuda::EmbeddingPlan<Index> choose_plan(const EmbeddingArguments<T>& a, int vector) {
  cuda::EmbeddingPlan<Index> plan{};
  plan.tiles = divided_up(a.columns, int64_t{cuda::kWarpSize} * vector);
  const int64_t wanted =
      int64_t{cuda::multiprocessor_count()} * cuda::kEmbeddingWarpsPerMultiprocessor;
  const int64_t chunks =
      std::clamp<int64_t>(divided_up(wanted, a.batch * plan.tiles), 1, cuda::kEmbeddingMostChunks);
  plan.per_chunk = divided_up(divided_up(a.positions, chunks), cuda::kWarpSize) * cuda::kWarpSize;
  plan.chunks = divided_up(a.positions, plan.per_chunk);
  return plan;
}

template <class T, int kVector, class Index>
void launch_embedding(const EmbeddingArguments<T>& a, const Tensor& tokens, int64_t padding_idx,
                      const Tensor& norms) {
  void* stream = current_stream(norms);
  const Tensor order = order_of<Index>(tokens);
  auto plan = choose_plan<Index>(a, kVector);
  const bool carries = plan.chunks > 1;
  const int64_t column_blocks = carries ? divided_up(a.columns, cuda::kEmbeddingThreads) : 0;
  plan.indices = data<Index>(tokens);
  plan.order = data<int64_t>(order);
  plan.padding_idx = padding_idx;
  plan.parts = plan.chunks * plan.tiles + column_blocks;
  const Tensor squares = empty({a.batch, plan.parts}, ScalarType::Double, norms);
  plan.squares = mutable_data<double>(squares);
  std::optional<Tensor> open, sums;
  if (carries) {
    open = empty({a.batch, plan.chunks}, ScalarType::Int, norms);
    sums = empty({2, a.batch, plan.chunks, a.columns}, ScalarType::Float, norms);
    plan.open = mutable_data<int>(*open);
    plan.heads = mutable_data<float>(*sums);
    plan.tails = plan.heads + a.batch * plan.chunks * a.columns;
  }
  const int64_t warps = a.batch * plan.chunks * plan.tiles;
  cuda::launch(cuda::embedding_sums_kernel<T, kVector, Index>,
               {static_cast<unsigned>(divided_up(warps * cuda::kWarpSize, cuda::kEmbeddingThreads)),
                cuda::kEmbeddingThreads, 0, stream},
               a, plan);
  if (carries) {
    cuda::launch(
        cuda::embedding_carries_kernel<Index>,
        {static_cast<unsigned>(a.batch * column_blocks), cuda::kEmbeddingThreads, 0, stream}, plan,
        a.columns, column_blocks);
  }
  cuda::launch(cuda::embedding_totals_kernel<cuda::kEmbeddingThreads>,
               {static_cast<unsigned>(a.batch), cuda::kEmbeddingThreads, 0, stream},
               static_cast<const double*>(plan.squares), plan.parts, mutable_data<float>(norms));
}

template <class T, class Index>
void choose_loads(const EmbeddingArguments<T>& a, const Tensor& tokens, int64_t padding_idx,
                  const Tensor& norms) {
  const auto whole = [](int64_t count) { return count % kWideLoad<T> == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(a.grad_outputs) % 16 == 0 && whole(a.columns) &&
                       whole(a.grad_strides.batch) && whole(a.grad_strides.position);
  if (aligned) {
    launch_embedding<T, kWideLoad<T>, Index>(a, tokens, padding_idx, norms);
  } else {
    launch_embedding<T, 1, Index>(a, tokens, padding_idx, norms);
  }
}

}  // namespace

Tensor embedding_grad_norm_sq_cuda(const Tensor& indices,       // [B, T...]
                                   const Tensor& grad_outputs,  // [B, T..., D]
                                   int64_t padding_idx) {
  const char* op = "embedding_grad_norm_sq";
  check_embedding_arguments(op, indices, grad_outputs);
  const DeviceGuard guard(grad_outputs);
  const Tensor grads = with_rows(grad_outputs);
  Tensor norms = empty_norms(grads);
  dispatch_floating(op, "grad_outputs", grads.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (grads.numel() == 0) {
      torch::stable::zero_(norms);
      return;
    }
    const auto a = embedding_arguments<T>(grads);
    const std::vector<int64_t> flat{a.batch, a.positions};
    const Tensor tokens = torch::stable::reshape(as_contiguous(indices), flat);
    if (tokens.scalar_type() == ScalarType::Int) {
      choose_loads<T, int32_t>(a, tokens, padding_idx, norms);
    } else {
      choose_loads<T, int64_t>(a, tokens, padding_idx, norms);
    }
  });
  return norms;
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("embedding_grad_norm_sq", TORCH_BOX(&fastsel::embedding_grad_norm_sq_cuda));
}
