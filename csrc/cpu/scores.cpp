// sample_scores on the CPU: checks, threads, and the choice of instruction set. The loops are in
// scores_simd.cpp.

#include "scores.h"

#include <atomic>

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
void sample_scores_double(const Tensor& logits, const int64_t* target, int64_t ignore_index,
                          double* loss, double* grad_norm, double* entropy, double* lse) {
  const int64_t classes = logits.size(1), row_stride = logits.stride(0);
  const double* first = data<double>(logits);
  torch::stable::parallel_for(0, logits.size(0), rows_per_thread(classes),
                              [=](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) {
                                  const double* x = first + row * row_stride;
                                  RowScores<double> scores{0, 0, 0, 0};
                                  if (target[row] != ignore_index) {
                                    ScoreState<double> others;
                                    for (int64_t j = 0; j < classes; ++j) {
                                      if (j != target[row])
                                        others.max = x[j] > others.max ? x[j] : others.max;
                                    }
                                    const double shift = others.max == -INFINITY ? 0 : others.max;
                                    for (int64_t j = 0; j < classes; ++j) {
                                      if (j == target[row]) continue;
                                      const double shifted = x[j] - shift, e = exp(shifted);
                                      others.sum += e;
                                      others.sum_sq += e * e;
                                      others.weighted += e > 0 || e != e ? shifted * e : 0;
                                    }
                                    scores = finish_scores(others, x[target[row]]);
                                  }
                                  loss[row] = scores.loss;
                                  grad_norm[row] = scores.grad_norm;
                                  entropy[row] = scores.entropy;
                                  lse[row] = scores.lse;
                                }
                              });
}

void sample_scores_backward_double(const double* grad_loss, const Tensor& logits,
                                   const int64_t* target, const double* loss, const double* lse,
                                   int64_t ignore_index, double* grad_logits) {
  const int64_t classes = logits.size(1), row_stride = logits.stride(0);
  const double* first = data<double>(logits);
  torch::stable::parallel_for(
      0, logits.size(0), rows_per_thread(classes), [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const double* x = first + row * row_stride;
          double* grad = grad_logits + row * classes;
          const bool ignored = target[row] == ignore_index;
          const auto p = ignored ? ProbabilityBase<double>{0, 0}
                                 : probability_base(x[target[row]], loss[row], lse[row]);
          for (int64_t j = 0; j < classes; ++j) {
            grad[j] = ignored ? 0 : grad_loss[row] * exp((x[j] - p.base) - p.offset);
          }
          if (!ignored) grad[target[row]] = grad_loss[row] * expm1(-loss[row]);
        }
      });
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
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = empty({batch}, type, x), grad_norm = empty({batch}, type, x);
  const Tensor entropy = empty({batch}, type, x), lse = empty({batch}, type, x);
  if (is_double) {
    sample_scores_double(x, data<int64_t>(y), ignore_index, mutable_data<double>(loss),
                         mutable_data<double>(grad_norm), mutable_data<double>(entropy),
                         mutable_data<double>(lse));
    return {loss, grad_norm, entropy, lse};
  }
  dispatch_floating("sample_scores", "logits", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ScoreRows<T> rows{data<T>(x),
                            data<int64_t>(y),
                            classes,
                            x.stride(0),
                            ignore_index,
                            mutable_data<float>(loss),
                            mutable_data<float>(grad_norm),
                            mutable_data<float>(entropy),
                            mutable_data<float>(lse)};
    torch::stable::parallel_for(0, batch, rows_per_thread(classes),
                                [&](int64_t begin, int64_t end) {
                                  FASTSEL_DISPATCH_ISA(sample_scores_rows<T>, rows, begin, end);
                                });
  });
  return {loss, grad_norm, entropy, lse};
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
  if (x.scalar_type() == ScalarType::Double) {
    sample_scores_backward_double(data<double>(grad), x, data<int64_t>(y), data<double>(nll),
                                  data<double>(log_sum), ignore_index,
                                  mutable_data<double>(grad_logits));
    return grad_logits;
  }
  dispatch_floating("sample_scores_backward", "logits", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ScoreGradRows<T> rows{
        data<float>(grad), data<T>(x),           data<int64_t>(y),
        data<float>(nll),  data<float>(log_sum), classes,
        x.stride(0),       ignore_index,         mutable_data<T>(grad_logits)};
    torch::stable::parallel_for(
        0, batch, rows_per_thread(classes), [&](int64_t begin, int64_t end) {
          FASTSEL_DISPATCH_ISA(sample_scores_backward_rows<T>, rows, begin, end);
        });
  });
  return grad_logits;
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("sample_scores", TORCH_BOX(&fastsel::cpu::sample_scores_cpu));
  m.impl("sample_scores_backward", TORCH_BOX(&fastsel::cpu::sample_scores_backward_cpu));
}
