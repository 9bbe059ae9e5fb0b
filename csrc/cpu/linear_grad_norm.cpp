// The per-sample norms of a linear layer's weight gradient on the CPU, alone or as a by-product of
// the gradient itself.

#include "cpu/grad_norm_walk.h"
#include "grad_norm.h"

namespace fastsel::cpu {

namespace {

// Rows [B, T, n] of unit stride: samples and positions may lie any distance apart, so that a layer
// whose input has time first needs no copy.
template <class T>
struct LinearRows {
  explicit LinearRows(const Tensor& tensor)
      : base(data<T>(tensor)),
        sample_stride(tensor.stride(0)),
        stride(tensor.dim() == 3 ? tensor.stride(1) : tensor.size(tensor.dim() - 1)) {}
  const T* at(int64_t sample, int64_t position) const {
    return base + sample * sample_stride + position * stride;
  }
  const T* base;
  int64_t sample_stride, stride;
};

// Activations [B, T, d] and output gradients [B, T, p].
template <class T>
class LinearSource {
 public:
  LinearSource(const Tensor& activations, const Tensor& grad_outputs, const LayerShape& shape)
      : activations_(activations), grads_(grad_outputs), shape_(shape) {}

  const LayerShape& shape() const { return shape_; }
  int64_t chunks() const { return std::max<int64_t>(ceil_div(shape_.positions, kNormChunk), 1); }
  int64_t chunk_positions() const { return kNormChunk; }

  NormOperand operand(int64_t sample, int64_t, int64_t first, int64_t count, int64_t chunk) {
    const int64_t begin = chunk * kNormChunk;
    const int64_t positions = std::min(shape_.positions - begin, kNormChunk);
    const T* rows = activations_.at(sample, begin) + first;
    columns_.resize(count);
    if constexpr (std::is_same_v<T, float>) {
      // A single panel of channels reads a row once: copying it would cost more than it saves.
      if (shape_.channels <= kNormPanel) {
        for (int64_t j = 0; j < count; ++j) columns_[j] = rows + j;
        return {columns_.data(), count, &line_, 1, positions, activations_.stride};
      }
    }
    // Rows a power of two apart would fall on each other in the first-level cache.
    const int64_t width = padded_width(count), step = width + kNormLanes;
    copied_.resize(positions * step);
    FASTSEL_DISPATCH_ISA(copy_rows<T>, rows, positions, activations_.stride, count, step,
                         copied_.data());
    for (int64_t j = 0; j < count; ++j) columns_[j] = copied_.data() + j;
    return {columns_.data(), count, &line_, 1, positions, step};
  }

  int64_t pack(int64_t sample, int64_t, int64_t first, int64_t count, int64_t chunk, int64_t width,
               float* packed, float* column_sums) {
    const int64_t begin = chunk * kNormChunk;
    const int64_t positions = std::min(shape_.positions - begin, kNormChunk);
    const T* rows = grads_.at(sample, begin) + first;
    FASTSEL_DISPATCH_ISA(pack_rows<T>, rows, positions, grads_.stride, count, width, packed,
                         column_sums);
    return positions;
  }

  void transpose_a(int64_t sample, int64_t, int64_t width, float* out) {
    transpose(activations_, sample, shape_.columns, width, out);
  }
  void transpose_g(int64_t sample, int64_t, int64_t width, float* out) {
    transpose(grads_, sample, shape_.channels, width, out);
  }

 private:
  void transpose(const LinearRows<T>& rows, int64_t sample, int64_t count, int64_t width,
                 float* out) {
    for (int64_t t = 0; t < shape_.positions; t += width, out += count * width) {
      const int64_t here = std::min(shape_.positions - t, width);
      FASTSEL_DISPATCH_ISA(pack_columns<T>, rows.at(sample, t), count, rows.stride, here, width,
                           out, nullptr);
    }
  }

  LinearRows<T> activations_, grads_;
  LayerShape shape_;
  int64_t line_ = 0;
  std::vector<float> copied_;
  std::vector<const float*> columns_;
};

// The tensor itself where LinearRows can read it.
Tensor as_rows(const Tensor& tensor) {
  const bool good = tensor.dim() <= 3 && tensor.stride(tensor.dim() - 1) == 1;
  return good ? tensor : as_contiguous(tensor);
}

LayerShape linear_shape(const Tensor& activations, const Tensor& grad_outputs) {
  int64_t positions = 1;
  for (int64_t i = 1; i + 1 < activations.dim(); ++i) positions *= activations.size(i);
  const int64_t last = activations.dim() - 1;
  return {activations.size(0), 1, positions, activations.size(last), grad_outputs.size(last)};
}

// T = 1: the gradient is the outer product of a row of each.
template <class T>
std::vector<double> outer_norms(const Tensor& activations, const Tensor& grad_outputs,
                                const LayerShape& s) {
  const LinearRows<T> a(activations), g(grad_outputs);
  std::vector<double> norms(s.batch);
  const double work = static_cast<double>(s.batch) * (s.columns + s.channels);
  torch::stable::parallel_for(
      0, s.batch, norm_grain(s.batch, 4 * work), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          double a_sq = 0, g_sq = 0;
          FASTSEL_DISPATCH_ISA(square_sum<T>, a.at(b, 0), s.columns, &a_sq);
          FASTSEL_DISPATCH_ISA(square_sum<T>, g.at(b, 0), s.channels, &g_sq);
          norms[b] = a_sq * g_sq;
        }
      });
  return norms;
}

// float64, for checking: one plain loop.
Tensor linear_norms_double(const Tensor& activations, const Tensor& grad_outputs,
                           const LayerShape& s) {
  const Tensor out = empty({s.batch}, ScalarType::Double, activations);
  const LinearRows<double> a(activations), g(grad_outputs);
  torch::stable::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> row(s.channels);
    for (int64_t b = begin; b < end; ++b) {
      double norm_sq = 0;
      for (int64_t j = 0; j < s.columns; ++j) {
        std::fill(row.begin(), row.end(), 0.0);
        for (int64_t t = 0; t < s.positions; ++t)
          for (int64_t i = 0; i < s.channels; ++i) row[i] += a.at(b, t)[j] * g.at(b, t)[i];
        for (const double value : row) norm_sq += value * value;
      }
      mutable_data<double>(out)[b] = norm_sq;
    }
  });
  return out;
}

}  // namespace

Tensor linear_grad_norm_sq_cpu(const Tensor& activations,   // [B, T..., d]
                               const Tensor& grad_outputs,  // [B, T..., p]
                               const std::string& form_name) {
  check_linear_arguments("linear_grad_norm_sq", activations, grad_outputs);
  const NormForm form = norm_form("linear_grad_norm_sq", form_name);
  const Tensor a = as_rows(activations), g = as_rows(grad_outputs);
  const LayerShape s = linear_shape(a, g);
  if (a.scalar_type() == ScalarType::Double) return linear_norms_double(a, g, s);
  Tensor out = empty({0}, ScalarType::Float, a);
  dispatch_floating("linear_grad_norm_sq", "activations", a.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool outer = s.positions == 1 && form == NormForm::automatic;
    out = to_tensor(outer ? outer_norms<T>(a, g, s) : weight_norms(LinearSource<T>(a, g, s), form),
                    a);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_weight_grad_cpu(
    const Tensor& activations,     // [B, T..., d]
    const Tensor& grad_outputs) {  // [B, T..., p]
  check_linear_arguments("linear_weight_grad", activations, grad_outputs);
  const Tensor a = as_rows(activations), g = as_rows(grad_outputs);
  const LayerShape s = linear_shape(a, g);
  const Tensor weight = empty({s.channels, s.columns}, ScalarType::Float, a);
  const Tensor bias = empty({s.channels}, ScalarType::Float, a);
  NormResult norms;
  dispatch_floating("linear_weight_grad", "activations", a.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    norms = direct_norms(LinearSource<T>(a, g, s),
                         {mutable_data<float>(weight), mutable_data<float>(bias)});
  });
  return {weight, bias, to_tensor(norms.weight, a), to_tensor(norms.bias, a)};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("linear_grad_norm_sq", TORCH_BOX(&fastsel::cpu::linear_grad_norm_sq_cpu));
  m.impl("linear_weight_grad", TORCH_BOX(&fastsel::cpu::linear_weight_grad_cpu));
}
