// sample_scores on CUDA tensors (and, compiled for the host emulation, on CPU tensors): see
// scores.cuh.

#include "cuda/scores.cuh"

#include <algorithm>

#include "scores.h"

namespace fastsel {

namespace {

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + cuda::kScoresThreads - 1) / cuda::kScoresThreads);
}

// Short rows: enough groups to fill the multiprocessors come first, rows that share their last step
// second.
template <class T, int kLanes>
void launch_short_rows(const ScoresArguments<T>& a, void* stream) {
  const int64_t resident_groups = int64_t{cuda::multiprocessor_count()} *
                                  cuda::kScoresBlocksPerMultiprocessor *
                                  (cuda::kScoresThreads / kLanes);
  const int rows_per_group =
      static_cast<int>(std::clamp<int64_t>(a.rows / resident_groups, 1, kLanes));
  const int64_t groups = (a.rows + rows_per_group - 1) / rows_per_group;
  cuda::launch(cuda::scores_short_rows_kernel<T, kLanes>,
               {blocks_for(groups * kLanes), cuda::kScoresThreads, 0, stream}, a, rows_per_group);
}

// Long rows: a block each, or, where that leaves multiprocessors idle, several.
int choose_splits(int64_t rows, int64_t classes) {
  const int64_t wanted =
      int64_t{cuda::multiprocessor_count()} * cuda::kScoresBlocksPerMultiprocessor;
  const int64_t most = std::max<int64_t>(classes / cuda::kScoresMinSplit, 1);
  return static_cast<int>(std::clamp<int64_t>(wanted / rows, 1, most));
}

template <class T>
void launch_scores(const ScoresArguments<T>& a, const Tensor& like) {
  void* stream = current_stream(like);
  if (a.classes <= cuda::kScoresShortRow) return launch_short_rows<T, 8>(a, stream);
  if (a.classes <= cuda::kScoresWarpRow) return launch_short_rows<T, cuda::kWarpSize>(a, stream);
  const int splits = choose_splits(a.rows, a.classes);
  constexpr int64_t kFloats = sizeof(ScoreState<float>) / sizeof(float);
  const Tensor partial =
      empty({splits > 1 ? a.rows * splits * kFloats : 0}, ScalarType::Float, like);
  auto* states = reinterpret_cast<ScoreState<float>*>(mutable_data<float>(partial));
  cuda::launch(cuda::scores_long_rows_kernel<T>,
               {static_cast<unsigned>(a.rows * splits), cuda::kScoresThreads, 0, stream}, a, splits,
               states);
  if (splits > 1) {
    cuda::launch(cuda::scores_merge_kernel<T>,
                 {blocks_for(a.rows), cuda::kScoresThreads, 0, stream}, a, splits,
                 static_cast<const ScoreState<float>*>(states));
  }
}

}  // namespace

SampleScores sample_scores_cuda(const Tensor& logits,  // [B, C]
                                const Tensor& target,  // [B]
                                int64_t ignore_index) {
  check_scores_arguments("sample_scores", logits, target);
  const DeviceGuard guard(logits);
  const Tensor x = with_unit_column_stride(logits), y = as_contiguous(target);
  const SampleScores out = empty_scores(x, ScalarType::Float);
  dispatch_floating("sample_scores", "logits", x.scalar_type(), [&](auto tag) {
    if (x.size(0) == 0) return;
    launch_scores(scores_arguments<typename decltype(tag)::type>(x, y, ignore_index, out), x);
  });
  return out;
}

Tensor sample_scores_backward_cuda(const Tensor& grad_loss,  // [B]
                                   const Tensor& logits,     // [B, C]
                                   const Tensor& target,     // [B]
                                   const Tensor& loss,       // [B]
                                   const Tensor& lse,        // [B]
                                   int64_t ignore_index) {
  check_scores_backward_arguments("sample_scores_backward", grad_loss, logits, target, loss, lse);
  const DeviceGuard guard(logits);
  const Tensor x = with_unit_column_stride(logits), y = as_contiguous(target);
  const Tensor grad = as_contiguous(grad_loss), nll = as_contiguous(loss);
  const Tensor log_sum = as_contiguous(lse);
  const int64_t batch = x.size(0), classes = x.size(1);
  const Tensor grad_logits = empty({batch, classes}, x.scalar_type(), x);
  dispatch_floating("sample_scores_backward", "logits", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (batch == 0) return;
    const auto arguments =
        scores_backward_arguments<T>(grad, x, y, nll, log_sum, ignore_index, grad_logits);
    const int64_t chunks = (classes + cuda::kScoresBackwardChunk - 1) / cuda::kScoresBackwardChunk;
    cuda::launch(
        cuda::scores_backward_kernel<T>,
        {blocks_for(batch * chunks * cuda::kWarpSize), cuda::kScoresThreads, 0, current_stream(x)},
        arguments, chunks);
  });
  return grad_logits;
}

}  // namespace fastsel

STABLE_TORCH_LIBRARY_IMPL(FASTSEL_NAMESPACE, FASTSEL_DEVICE, m) {
  m.impl("sample_scores", TORCH_BOX(&fastsel::sample_scores_cuda));
  m.impl("sample_scores_backward", TORCH_BOX(&fastsel::sample_scores_backward_cuda));
}
