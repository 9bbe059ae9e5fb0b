// Convolutions of narrow groups, such as depthwise ones: groups lie in the lanes.
//
// With a channel or two a group, the lanes of a product A^T G would be mostly padding. So kNormLanes
// groups are worked on side by side instead, element by element, on images whose channels come last.
#pragma once

#include <algorithm>
#include <vector>

#include "core/conv_geometry.h"
#include "cpu/grad_norm_walk.h"

namespace fastsel::cpu {

// Multiplications a sample with groups in the lanes, to be held against direct_work.
inline double narrow_work(const LayerShape& s) {
  return static_cast<double>(padded_width(s.groups)) * s.positions * s.columns * s.channels;
}

template <class T>
class NarrowConv {
 public:
  NarrowConv(const T* input, const T* grads, const ConvGeometry& geometry)
      : input_(input), grads_(grads), g_(geometry) {
    for (int axis = 0; axis < 3; ++axis) padded_[axis] = g_.in[axis] + 2 * g_.padding[axis];
    plane_ = padded_[0] * padded_[1] * padded_[2];
    for (int64_t z = 0; z < g_.out[0]; ++z)
      for (int64_t y = 0; y < g_.out[1]; ++y)
        lines_.push_back((z * g_.stride[0] * padded_[1] + y * g_.stride[1]) * padded_[2]);
    image_.resize(g_.in_channels * plane_ * kNormLanes);
    packed_.resize(g_.positions() * kNormLanes);
    columns_.resize(g_.columns());
    for (int64_t j = 0; j < g_.columns(); ++j) {
      const int64_t tap = j % g_.taps(), x = tap % g_.kernel[2];
      const int64_t y = tap / g_.kernel[2] % g_.kernel[1], z = tap / g_.kernel[2] / g_.kernel[1];
      columns_[j] = (j / g_.taps() * plane_ +
                     (z * g_.dilation[0] * padded_[1] + y * g_.dilation[1]) * padded_[2] +
                     x * g_.dilation[2]) *
                    kNormLanes;
    }
  }

  // Brings in the input of up to kNormLanes groups of a sample: [channel][position with border][lane].
  void load(int64_t sample, int64_t first_group, int64_t groups) {
    const int64_t stride = g_.in_channels * g_.in_positions();
    for (int64_t c = 0; c < g_.in_channels; ++c) {
      const T* source =
          input_ + ((sample * g_.groups + first_group) * g_.in_channels + c) * g_.in_positions();
      for (int64_t z = 0; z < g_.in[0]; ++z) {
        for (int64_t y = 0; y < g_.in[1]; ++y, source += g_.in[2]) {
          const int64_t row = (z + g_.padding[0]) * padded_[1] + y + g_.padding[1];
          float* to = image_.data() + (c * plane_ + row * padded_[2] + g_.padding[2]) * kNormLanes;
          FASTSEL_DISPATCH_ISA(pack_columns<T>, source, g_.in[2], stride, groups, kNormLanes, to,
                               nullptr);
        }
      }
    }
  }

  // A^T G of one output channel of the loaded groups, to product [d, kNormLanes], and the sums of G.
  void multiply(int64_t sample, int64_t first_group, int64_t groups, int64_t channel,
                float* product, float* sums) {
    const T* source =
        grads_ + ((sample * g_.groups + first_group) * g_.out_channels + channel) * g_.positions();
    FASTSEL_DISPATCH_ISA(pack_columns<T>, source, g_.positions(), g_.out_channels * g_.positions(),
                         groups, kNormLanes, packed_.data(), sums);
    std::vector<const float*> columns(columns_.size());
    for (size_t j = 0; j < columns.size(); ++j) columns[j] = image_.data() + columns_[j];
    const NormOperand a{columns.data(),         g_.columns(), lines_.data(),
                        int64_t(lines_.size()), g_.out[2],    g_.stride[2]};
    FASTSEL_DISPATCH_ISA(lane_product, a, packed_.data(), product);
  }

 private:
  const T* input_;
  const T* grads_;
  ConvGeometry g_;
  int64_t padded_[3];
  int64_t plane_;
  std::vector<int64_t> lines_, columns_;
  std::vector<float> image_, packed_;  // the border of the image stays zero
};

template <class T>
NormResult narrow_norms(const T* input, const T* grads, const ConvGeometry& g,
                        const WeightGrads& out) {
  const LayerShape s{g.batch, g.groups, g.positions(), g.columns(), g.out_channels};
  NormResult result{std::vector<double>(s.batch), std::vector<double>(s.batch)};
  const int64_t blocks = ceil_div(s.groups, kNormLanes);
  const int64_t block_size = s.channels * (s.columns + 1) * kNormLanes;  // weights and bias
  const int64_t copies =
      std::clamp<int64_t>(ceil_div(kNormItems, blocks), 1, std::max<int64_t>(s.batch, 1));
  const int64_t items = copies * blocks;
  std::vector<double> weight_norms(blocks * s.batch), bias_norms(blocks * s.batch);
  std::vector<float> sums(out.weight != nullptr ? items * block_size : 0);
  const double work = static_cast<double>(s.batch) * narrow_work(s);
  torch::stable::parallel_for(0, items, norm_grain(items, work), [&](int64_t begin, int64_t end) {
    NarrowConv<T> conv(input, grads, g);
    std::vector<float> product((s.columns + 1) * kNormLanes);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t copy = item / blocks, block = item % blocks;
      const int64_t first = block * kNormLanes, groups = std::min(s.groups - first, kNormLanes);
      for (int64_t b = copy * s.batch / copies; b < (copy + 1) * s.batch / copies; ++b) {
        conv.load(b, first, groups);
        for (int64_t channel = 0; channel < s.channels; ++channel) {
          std::fill(product.begin(), product.end(), 0.0f);
          float* bias = product.data() + s.columns * kNormLanes;
          conv.multiply(b, first, groups, channel, product.data(), bias);
          FASTSEL_DISPATCH_ISA(square_sum<float>, product.data(), s.columns * kNormLanes,
                               &weight_norms[block * s.batch + b]);
          FASTSEL_DISPATCH_ISA(square_sum<float>, bias, kNormLanes,
                               &bias_norms[block * s.batch + b]);
          if (out.weight == nullptr) continue;
          float* sum = sums.data() + item * block_size + channel * (s.columns + 1) * kNormLanes;
          for (int64_t i = 0; i < (s.columns + 1) * kNormLanes; ++i) sum[i] += product[i];
        }
      }
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t b = 0; b < s.batch; ++b) {
      result.weight[b] += weight_norms[block * s.batch + b];
      result.bias[b] += bias_norms[block * s.batch + b];
    }
  }
  if (out.weight == nullptr) return result;
  for (int64_t o = 0; o < s.groups * s.channels; ++o) {
    const int64_t group = o / s.channels, channel = o % s.channels;
    for (int64_t j = 0; j <= s.columns; ++j) {
      double sum = 0;
      for (int64_t copy = 0; copy < copies; ++copy) {
        const float* block = sums.data() + (copy * blocks + group / kNormLanes) * block_size;
        sum += block[(channel * (s.columns + 1) + j) * kNormLanes + group % kNormLanes];
      }
      (j < s.columns ? out.weight[o * s.columns + j] : out.bias[o]) = static_cast<float>(sum);
    }
  }
  return result;
}

}  // namespace fastsel::cpu
