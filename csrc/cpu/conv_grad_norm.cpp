// The per-sample norms of a convolution's weight gradient on the CPU, alone or as a by-product of the
// gradient itself.
//
// Column (channel, tap) of the unfolded input is the input shifted by the tap, so it is read in place
// and the input is never unfolded: only a copy with its zero border is made, a sample at a time.

#include "core/conv_geometry.h"
#include "cpu/conv_grad_norm_narrow.h"
#include "cpu/grad_norm_walk.h"
#include "grad_norm.h"

namespace fastsel::cpu {

namespace {

// Input [B, C_in, spatial...] and output gradients [B, C_out, spatial...], both contiguous.
template <class T>
class ConvSource {
 public:
  ConvSource(const Tensor& input, const Tensor& grad_outputs, const ConvGeometry& geometry)
      : input_(data<T>(input)), grads_(data<T>(grad_outputs)), g_(geometry) {
    shape_ = {g_.batch, g_.groups, g_.positions(), g_.columns(), g_.out_channels};
    for (int axis = 0; axis < 3; ++axis) {
      padded_[axis] = g_.in[axis] + 2 * g_.padding[axis];
      needs_copy_ = needs_copy_ || g_.padding[axis] > 0;
    }
    plane_ = padded_[0] * padded_[1] * padded_[2];
    lines_in_chunk_ = std::max<int64_t>(kNormChunk / std::max<int64_t>(g_.out[2], 1), 1);
    for (int64_t z = 0; z < g_.out[0]; ++z)
      for (int64_t y = 0; y < g_.out[1]; ++y)
        lines_.push_back((z * g_.stride[0] * padded_[1] + y * g_.stride[1]) * padded_[2]);
  }

  const LayerShape& shape() const { return shape_; }
  int64_t chunks() const {
    const auto lines = static_cast<int64_t>(lines_.size());
    return std::max<int64_t>(ceil_div(lines, lines_in_chunk_), 1);
  }
  int64_t chunk_positions() const { return lines_in_chunk_ * g_.out[2]; }

  NormOperand operand(int64_t sample, int64_t group, int64_t first, int64_t count, int64_t chunk) {
    if (count == 0) return {nullptr, 0, lines_.data(), 0, 0, 1};
    const int64_t taps = g_.taps();
    const int64_t first_channel = first / taps, end_channel = (first + count - 1) / taps + 1;
    const int64_t channel = (sample * g_.groups + group) * g_.in_channels + first_channel;
    const float* base = copy(channel, end_channel - first_channel);
    columns_.resize(count);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t tap = (first + j) % taps;
      const int64_t x = tap % g_.kernel[2], y = tap / g_.kernel[2] % g_.kernel[1];
      const int64_t z = tap / g_.kernel[2] / g_.kernel[1];
      columns_[j] = base + ((first + j) / taps - first_channel) * plane_ +
                    (z * g_.dilation[0] * padded_[1] + y * g_.dilation[1]) * padded_[2] +
                    x * g_.dilation[2];
    }
    const int64_t begin = chunk * lines_in_chunk_;
    const int64_t lines = std::min(static_cast<int64_t>(lines_.size()) - begin, lines_in_chunk_);
    return {columns_.data(), count, lines_.data() + begin, lines, g_.out[2], g_.stride[2]};
  }

  int64_t pack(int64_t sample, int64_t group, int64_t first, int64_t count, int64_t chunk,
               int64_t width, float* packed, float* column_sums) {
    const int64_t begin = chunk * lines_in_chunk_;
    const int64_t lines = std::min(static_cast<int64_t>(lines_.size()) - begin, lines_in_chunk_);
    const int64_t positions = lines * g_.out[2];
    const T* rows = grads(sample, group) + first * shape_.positions + begin * g_.out[2];
    FASTSEL_DISPATCH_ISA(pack_columns<T>, rows, positions, shape_.positions, count, width, packed,
                         column_sums);
    return positions;
  }

  void transpose_a(int64_t sample, int64_t group, int64_t width, float* out) {
    const NormOperand all = operand(sample, group, 0, shape_.columns, 0);
    std::fill_n(out, ceil_div(shape_.positions, width) * width * shape_.columns, 0.0f);
    for (int64_t j = 0; j < shape_.columns; ++j) {
      float* to = out + j * width;
      int64_t place = 0;
      for (const int64_t line : lines_) {
        const float* from = all.columns[j] + line;
        for (int64_t x = 0; x < g_.out[2]; ++x, from += all.step) {
          to[place] = *from;
          if (++place == width) place = 0, to += shape_.columns * width;
        }
      }
    }
  }
  void transpose_g(int64_t sample, int64_t group, int64_t width, float* out) {
    for (int64_t t = 0; t < shape_.positions; t += width, out += shape_.channels * width) {
      const int64_t here = std::min(shape_.positions - t, width);
      FASTSEL_DISPATCH_ISA(pack_rows<T>, grads(sample, group) + t, shape_.channels,
                           shape_.positions, here, width, out, nullptr);
    }
  }

 private:
  const T* grads(int64_t sample, int64_t group) const {
    return grads_ + (sample * g_.groups + group) * shape_.channels * shape_.positions;
  }

  // Some channels of the input in float32 within their border of zeros; kept while the next call asks
  // for the same.
  const float* copy(int64_t channel, int64_t count) {
    const T* source = input_ + channel * g_.in_positions();
    if constexpr (std::is_same_v<T, float>)
      if (!needs_copy_) return source;
    if (channel == copied_ && count == copied_count_) return border_.data();
    copied_ = channel;
    if (count != copied_count_) border_.assign(count * plane_, 0.0f);
    copied_count_ = count;
    const int64_t width = g_.in[2];
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t z = 0; z < g_.in[0]; ++z) {
        float* row = border_.data() + c * plane_ +
                     ((z + g_.padding[0]) * padded_[1] + g_.padding[1]) * padded_[2] +
                     g_.padding[2];
        for (int64_t y = 0; y < g_.in[1]; ++y, row += padded_[2], source += width)
          for (int64_t x = 0; x < width; ++x) row[x] = to_float(source[x]);
      }
    }
    return border_.data();
  }

  const T* input_;
  const T* grads_;
  ConvGeometry g_;
  LayerShape shape_{};
  int64_t padded_[3];
  int64_t plane_ = 0;  // elements of a channel with its border
  int64_t lines_in_chunk_ = 1;
  bool needs_copy_ = false;
  std::vector<int64_t> lines_;
  std::vector<const float*> columns_;
  std::vector<float> border_;
  int64_t copied_ = -1, copied_count_ = 0;
};

bool is_narrow(const LayerShape& s) { return s.positions > 0 && narrow_work(s) < direct_work(s); }

// float64, for checking: one plain loop.
Tensor conv_norms_double(const Tensor& input, const Tensor& grad_outputs, const ConvGeometry& g) {
  const Tensor out = empty({g.batch}, ScalarType::Double, input);
  const double* x = data<double>(input);
  const double* y = data<double>(grad_outputs);
  const int64_t in_plane = g.in_positions(), out_plane = g.positions();
  // The product of one output channel with one input channel at one tap.
  const auto entry = [&](const double* from, const double* to, int64_t tap) {
    const int64_t tx = tap % g.kernel[2], ty = tap / g.kernel[2] % g.kernel[1];
    const int64_t tz = tap / g.kernel[2] / g.kernel[1];
    double sum = 0;
    for (int64_t t = 0; t < out_plane; ++t) {
      const int64_t at[3] = {t / g.out[2] / g.out[1], t / g.out[2] % g.out[1], t % g.out[2]};
      const int64_t shift[3] = {tz, ty, tx};
      int64_t place = 0;
      bool inside = true;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t i =
            at[axis] * g.stride[axis] + shift[axis] * g.dilation[axis] - g.padding[axis];
        inside = inside && i >= 0 && i < g.in[axis];
        place = place * g.in[axis] + i;
      }
      if (inside) sum += from[place] * to[t];
    }
    return sum;
  };
  torch::stable::parallel_for(0, g.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double norm_sq = 0;
      for (int64_t o = 0; o < g.groups * g.out_channels; ++o) {
        const int64_t group = o / g.out_channels;
        for (int64_t i = 0; i < g.in_channels; ++i) {
          const double* from = x + ((b * g.groups + group) * g.in_channels + i) * in_plane;
          const double* to = y + (b * g.groups * g.out_channels + o) * out_plane;
          for (int64_t tap = 0; tap < g.taps(); ++tap) {
            const double value = entry(from, to, tap);
            norm_sq += value * value;
          }
        }
      }
      mutable_data<double>(out)[b] = norm_sq;
    }
  });
  return out;
}

}  // namespace

Tensor conv_grad_norm_sq_cpu(const Tensor& input,         // [B, C_in, spatial...]
                             const Tensor& grad_outputs,  // [B, C_out, spatial...]
                             const std::vector<int64_t>& kernel_size,
                             const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups,
                             const std::string& form_name) {
  const ConvGeometry geometry = conv_geometry("conv_grad_norm_sq", input, grad_outputs, kernel_size,
                                              stride, padding, dilation, groups);
  const NormForm form = norm_form("conv_grad_norm_sq", form_name);
  const Tensor x = as_contiguous(input), g = as_contiguous(grad_outputs);
  if (x.scalar_type() == ScalarType::Double) return conv_norms_double(x, g, geometry);
  Tensor out = empty({0}, ScalarType::Float, x);
  dispatch_floating("conv_grad_norm_sq", "input", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ConvSource<T> source(x, g, geometry);
    const LayerShape& s = source.shape();
    const bool narrow = is_narrow(s) && form != NormForm::gram &&
                        (form == NormForm::direct || narrow_work(s) < gram_work(s));
    out = to_tensor(narrow ? narrow_norms(data<T>(x), data<T>(g), geometry, {}).weight
                           : weight_norms(source, form),
                    x);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_weight_grad_cpu(
    const Tensor& input,         // [B, C_in, spatial...]
    const Tensor& grad_outputs,  // [B, C_out, spatial...]
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvGeometry geometry = conv_geometry("conv_weight_grad", input, grad_outputs, kernel_size,
                                              stride, padding, dilation, groups);
  const Tensor x = as_contiguous(input), g = as_contiguous(grad_outputs);
  std::vector<int64_t> size{grad_outputs.size(1), input.size(1) / groups};
  size.insert(size.end(), kernel_size.begin(), kernel_size.end());
  const Tensor weight = empty(size, ScalarType::Float, x);
  const Tensor bias = empty({grad_outputs.size(1)}, ScalarType::Float, x);
  NormResult norms;
  dispatch_floating("conv_weight_grad", "input", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ConvSource<T> source(x, g, geometry);
    const WeightGrads grads{mutable_data<float>(weight), mutable_data<float>(bias)};
    norms = is_narrow(source.shape()) ? narrow_norms(data<T>(x), data<T>(g), geometry, grads)
                                      : direct_norms(source, grads);
  });
  return {weight, bias, to_tensor(norms.weight, x), to_tensor(norms.bias, x)};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("conv_grad_norm_sq", TORCH_BOX(&fastsel::cpu::conv_grad_norm_sq_cpu));
  m.impl("conv_weight_grad", TORCH_BOX(&fastsel::cpu::conv_weight_grad_cpu));
}
