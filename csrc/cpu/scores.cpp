// sample_scores on the CPU: checks, threads, and the choice of instruction set. The loops are in
// scores_simd.cpp.

#include "scores.h"

#include <algorithm>

#include "core/scores.h"
#include "cpu/isa.h"
#include "cpu/scores_simd.h"

namespace fastsel::cpu {

namespace {

// Elements a thread should have at least: below that, handing out the work costs more than it
// saves.
constexpr int64_t kGrain = 16384;

int64_t rows_per_thread(int64_t classes) { return kGrain / (classes + 1) + 1; }

// Checked before anything is computed: the loops index by target. One pass over [B], next to
// nothing beside [B, C].
void check_targets(const char* op, const int64_t* target, int64_t count, int64_t classes,
                   int64_t ignore_index) {
  for (int64_t row = 0; row < count; ++row) {
    if (target[row] == ignore_index || (target[row] >= 0 && target[row] < classes)) continue;
    throw std::out_of_range(message(op, ": target must be in [0, ", classes, ") or ignore_index ",
                                    ignore_index, ", got ", target[row], " at position ", row));
  }
}

// float64, for checking gradients and the float32 kernels: one plain loop.
void sample_scores_rows(const ScoresArguments<double>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const double* x = a.logits + row * a.row_stride;
    const int64_t target = a.target[row];
    RowScores scores{0, 0, 0, 0};
    if (target != a.ignore_index) {
      ScoreState<double> others;
      for (int64_t j = 0; j < a.classes; ++j) {
        if (j != target) others.max = x[j] > others.max ? x[j] : others.max;
      }
      const double shift = others.max == -INFINITY ? 0 : others.max;
      for (int64_t j = 0; j < a.classes; ++j) {
        if (j == target) continue;
        const double shifted = x[j] - shift, e = exp(shifted);
        others.sum += e;
        others.sum_sq += e * e;
        others.weighted += e > 0 || e != e ? shifted * e : 0;
      }
      scores = finish_scores(others, x[target]);
    }
    a.loss[row] = scores.loss;
    a.grad_norm[row] = scores.grad_norm;
    a.entropy[row] = scores.entropy;
    a.lse[row] = scores.lse;
  }
}

void sample_scores_backward_rows(const ScoresBackwardArguments<double>& a, int64_t begin,
                                 int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const double* x = a.logits + row * a.row_stride;
    double* grad = a.grad_logits + row * a.classes;
    const int64_t target = a.target[row];
    if (target == a.ignore_index) {
      std::fill_n(grad, a.classes, 0.0);
      continue;
    }
    const auto p = probability_base(x[target], a.loss[row], a.lse[row]);
    for (int64_t j = 0; j < a.classes; ++j) {
      grad[j] = a.grad_loss[row] * exp((x[j] - p.base) - p.offset);
    }
    grad[target] = a.grad_loss[row] * expm1(-a.loss[row]);
  }
}

template <class T>
void sample_scores_rows(const ScoresArguments<T>& a, int64_t begin, int64_t end) {
  FASTSEL_DISPATCH_ISA(sample_scores_rows<T>, a, begin, end);
}

template <class T>
void sample_scores_backward_rows(const ScoresBackwardArguments<T>& a, int64_t begin, int64_t end) {
  FASTSEL_DISPATCH_ISA(sample_scores_backward_rows<T>, a, begin, end);
}

}  // namespace

SampleScores sample_scores_cpu(const Tensor& logits,  // [B, C]
                               const Tensor& target,  // [B]
                               int64_t ignore_index) {
  check_scores_arguments("sample_scores", logits, target);
  const Tensor x = with_unit_column_stride(logits), y = as_contiguous(target);
  const int64_t batch = x.size(0), classes = x.size(1);
  check_targets("sample_scores", data<int64_t>(y), batch, classes, ignore_index);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const SampleScores out = empty_scores(x, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_floating_and_double("sample_scores", "logits", x.scalar_type(), [&](auto tag) {
    const auto rows = scores_arguments<typename decltype(tag)::type>(x, y, ignore_index, out);
    torch::stable::parallel_for(
        0, batch, rows_per_thread(classes),
        [&](int64_t begin, int64_t end) { sample_scores_rows(rows, begin, end); });
  });
  return out;
}

Tensor sample_scores_backward_cpu(const Tensor& grad_loss,  // [B]
                                  const Tensor& logits,     // [B, C]
                                  const Tensor& target,     // [B]
                                  const Tensor& loss,       // [B]
                                  const Tensor& lse,        // [B]
                                  int64_t ignore_index) {
  check_scores_backward_arguments("sample_scores_backward", grad_loss, logits, target, loss, lse);
  const Tensor x = with_unit_column_stride(logits), y = as_contiguous(target);
  const Tensor grad = as_contiguous(grad_loss), nll = as_contiguous(loss);
  const Tensor log_sum = as_contiguous(lse);
  const int64_t batch = x.size(0), classes = x.size(1);
  check_targets("sample_scores_backward", data<int64_t>(y), batch, classes, ignore_index);
  const Tensor grad_logits = empty({batch, classes}, x.scalar_type(), x);
  dispatch_floating_and_double("sample_scores_backward", "logits", x.scalar_type(), [&](auto tag) {
    const auto rows = scores_backward_arguments<typename decltype(tag)::type>(
        grad, x, y, nll, log_sum, ignore_index, grad_logits);
    torch::stable::parallel_for(
        0, batch, rows_per_thread(classes),
        [&](int64_t begin, int64_t end) { sample_scores_backward_rows(rows, begin, end); });
  });
  return grad_logits;
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("sample_scores", TORCH_BOX(&fastsel::cpu::sample_scores_cpu));
  m.impl("sample_scores_backward", TORCH_BOX(&fastsel::cpu::sample_scores_backward_cpu));
}
