// conv_grad_norm_sq: the squared norm of each sample's weight gradient of a convolution.
//
// A convolution is a linear layer over positions: row t of A holds the values that output position
// t sees, a column for each (input channel, kernel tap); groups are separate problems whose squared
// norms add up (Rochette et al., "Efficient Per-Example Gradient Computations in Convolutional
// Neural Networks", arXiv 1912.06015). The unfolded A never exists in memory: its tiles are
// gathered into shared memory from the input, zeros beyond its edges, and go through the kernels
// of grad_norm_product.cuh. The gradient's channels are lines of positions already, and so are the
// input's where the kernel is one tap with unit stride and no padding.
// Groups of few channels would leave a tile almost empty; narrow_norm_kernel takes those.
#pragma once

#include "core/conv_geometry.h"
#include "core/divisor.h"
#include "cuda/grad_norm_product.cuh"

namespace fastsel::cuda {

// Where something lies in the input, or how far it moves what does: by axis for the bounds check,
// and as an offset in elements, in unsigned arithmetic that wraps around and back.
struct alignas(16) ConvPlace {
  int axis[3];
  uint32_t offset;
};

// Added to any place: outside the input along the first axis. All extents are below it.
inline constexpr int kConvExtent = 1 << 30;
inline constexpr ConvPlace kConvNowhere{{-kConvExtent, 0, 0}, 0};

// ConvGeometry with what the kernels divide by; in 32 bits, which the launcher has checked to be
// enough within a group.
struct ConvMap {
  int in[3], stride[3], padding[3], dilation[3];
  uint32_t positions, columns, in_positions;
  Divisor out_plane, out_width, taps, tap_plane, tap_width;

  explicit ConvMap(const ConvGeometry& g)
      : positions(static_cast<uint32_t>(g.positions())),
        columns(static_cast<uint32_t>(g.columns())),
        in_positions(static_cast<uint32_t>(g.in_positions())),
        out_plane(static_cast<uint32_t>(g.out[1] * g.out[2])),
        out_width(static_cast<uint32_t>(g.out[2])),
        taps(static_cast<uint32_t>(g.taps())),
        tap_plane(static_cast<uint32_t>(g.kernel[1] * g.kernel[2])),
        tap_width(static_cast<uint32_t>(g.kernel[2])) {
    for (int i = 0; i < 3; ++i) {
      in[i] = static_cast<int>(g.in[i]);
      stride[i] = static_cast<int>(g.stride[i]);
      padding[i] = static_cast<int>(g.padding[i]);
      dilation[i] = static_cast<int>(g.dilation[i]);
    }
  }

  // Of tap 0 of channel 0 at an output position.
  __device__ __forceinline__ ConvPlace position(int64_t t) const {
    if (t >= positions) return kConvNowhere;
    auto w = static_cast<uint32_t>(t);
    const uint32_t d = out_plane.divide(w), h = out_width.divide(w);
    return place(static_cast<int>(d) * stride[0] - padding[0],
                 static_cast<int>(h) * stride[1] - padding[1],
                 static_cast<int>(w) * stride[2] - padding[2], 0);
  }

  // How far column (channel, tap) is from that.
  __device__ __forceinline__ ConvPlace column(int64_t c) const {
    if (c >= columns) return kConvNowhere;
    auto w = static_cast<uint32_t>(c);
    const uint32_t channel = taps.divide(w), d = tap_plane.divide(w), h = tap_width.divide(w);
    return place(static_cast<int>(d) * dilation[0], static_cast<int>(h) * dilation[1],
                 static_cast<int>(w) * dilation[2], channel);
  }

  // Whether position p sees a value at column c, and where.
  __device__ __forceinline__ bool sees(const ConvPlace& p, const ConvPlace& c,
                                       uint32_t& offset) const {
    offset = p.offset + c.offset;
    bool inside = true;
    FASTSEL_UNROLL
    for (int i = 0; i < 3; ++i)
      inside =
          inside && static_cast<uint32_t>(p.axis[i] + c.axis[i]) < static_cast<uint32_t>(in[i]);
    return inside;
  }

 private:
  __device__ __forceinline__ ConvPlace place(int d, int h, int w, uint32_t channel) const {
    const auto row =
        static_cast<uint32_t>(d) * static_cast<uint32_t>(in[1]) + static_cast<uint32_t>(h);
    return {{d, h, w},
            channel * in_positions + row * static_cast<uint32_t>(in[2]) + static_cast<uint32_t>(w)};
  }
};

// A with positions contiguous, gathered. A thread keeps one position of the stage and takes every
// kStride-th column, so that neighbouring threads read neighbouring values. What the columns mean
// is worked out once for all threads, in `table`: in the direct form for the tile, in the Gram
// form, where columns are the depth, for each step ahead of its load.
template <class Tile, bool kDepthContiguous_>
struct ConvLoader {
  using T = typename Tile::T;
  using Layout = StageLayout<Tile, kDepthContiguous_>;
  static constexpr bool kDepthContiguous = kDepthContiguous_;
  static constexpr bool kPrepares = true;
  static constexpr int kStride = Tile::kThreads / Layout::kLength;
  static constexpr int kRounds = Layout::kLines / kStride;
  static_assert(kStride * Layout::kLength == Tile::kThreads &&
                kRounds * kStride == Layout::kLines && Layout::kLines <= Tile::kThreads);

  const ConvMap& map;
  const T* input;    // of a sample's group: [channels, positions]
  ConvPlace* table;  // [kConvTableEntries<Tile>]

  __device__ __forceinline__ ConvPlace* step_table(int64_t step) const {
    return kDepthContiguous ? table : table + step % kProductStages * Layout::kLines;
  }

  __device__ __forceinline__ void prepare(int64_t row, int64_t depth, int64_t step) const {
    if (kDepthContiguous && step > 0) return;
    if (threadIdx.x < Layout::kLines)
      step_table(step)[threadIdx.x] = map.column((kDepthContiguous ? row : depth) + threadIdx.x);
  }

  __device__ __forceinline__ void load(T* stage, int64_t row, int64_t depth, int64_t step) const {
    const int along = static_cast<int>(threadIdx.x) % Layout::kLength;
    const int first = static_cast<int>(threadIdx.x) / Layout::kLength;
    const ConvPlace position = map.position((kDepthContiguous ? depth : row) + along);
    const ConvPlace* columns = step_table(step);
    // Eight loads before their first store, so that their latencies overlap; more take too many
    // registers for addresses.
    constexpr int kAtOnce = 8;
    static_assert(kRounds % kAtOnce == 0);
    FASTSEL_UNROLL_BY(1)
    for (int start = first; start < Layout::kLines; start += kAtOnce * kStride) {
      T values[kAtOnce];
      FASTSEL_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        uint32_t offset;
        const bool inside = map.sees(position, columns[start + i * kStride], offset);
        values[i] = inside ? input[offset] : T{};
      }
      FASTSEL_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        stage[(start + i * kStride) * Layout::kPitch + along] = values[i];
    }
  }
};

template <class Tile>
inline constexpr int kConvTableEntries =
    Tile::kTile > kProductStages* Tile::kDepth ? Tile::kTile : kProductStages * Tile::kDepth;

template <class T>
struct ConvArguments {
  const T* input;         // [B, groups, channels, in_positions]
  const T* grad_outputs;  // [B, groups, outputs, positions]
  int64_t groups, channels, outputs;
  bool input_aligned, grad_aligned;  // every channel starts at a multiple of 16 bytes
  ConvMap map;

  __device__ __forceinline__ const T* group_input(int64_t sample, int64_t group) const {
    return input + (sample * groups + group) * channels * map.in_positions;
  }
  __device__ __forceinline__ const T* group_gradient(int64_t sample, int64_t group) const {
    return grad_outputs + (sample * groups + group) * outputs * map.positions;
  }
};

// kDense: one tap, unit stride, no padding, so that A's columns are the input's channels as they
// lie in memory.
template <class T_, bool kDense>
struct ConvSource {
  using T = T_;
  static constexpr bool kFeaturesContiguous = false;
  static constexpr bool kGathers = !kDense;
  template <class Tile>
  static constexpr size_t kTableBytes = kDense ? 0 : kConvTableEntries<Tile> * sizeof(ConvPlace);

  ConvArguments<T> a;

  template <class Tile, bool kDepthContiguous>
  __device__ auto activations(int64_t sample, int64_t group, void* table) const {
    const T* values = a.group_input(sample, group);
    if constexpr (kDense) {
      return DenseLoader<Tile, kDepthContiguous>{
          {values, a.map.in_positions, a.channels, a.map.in_positions, a.input_aligned}};
    } else {
      return ConvLoader<Tile, kDepthContiguous>{a.map, values, static_cast<ConvPlace*>(table)};
    }
  }
  template <class Tile, bool kDepthContiguous>
  __device__ auto gradients(int64_t sample, int64_t group) const {
    return DenseLoader<Tile, kDepthContiguous>{{a.group_gradient(sample, group), a.map.positions,
                                                a.outputs, a.map.positions, a.grad_aligned}};
  }
};

// Groups of few channels: kLanes threads sum kNarrowColumns columns of one output channel's weight
// gradient over the positions, all for one read of the gradient, and leave the sum of their
// squares.
template <class T, int kLanes>
__global__ void __launch_bounds__(kGradNormThreads)
    narrow_norm_kernel(ConvArguments<T> a, int64_t items, int64_t per_sample,
                       float* partial) {  // [B, per_sample]
  constexpr int kGroups = kGradNormThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t blocks = (int64_t{a.map.columns} + kNarrowColumns - 1) / kNarrowColumns;
  const int64_t per_round = int64_t{gridDim.x} * kGroups;
  // The block's threads stay together: they all take part in the sums.
  for (int64_t first = int64_t{blockIdx.x} * kGroups; first < items; first += per_round) {
    const int64_t item = first + threadIdx.x / kLanes;
    float sums[kNarrowColumns];
    FASTSEL_UNROLL
    for (int c = 0; c < kNarrowColumns; ++c) sums[c] = 0;
    if (item < items) {
      const int64_t sample = item / per_sample, rest = item % per_sample;
      const int64_t channel = rest / blocks;  // of all groups' outputs
      const T* gradient = a.group_gradient(sample, 0) + channel * a.map.positions;
      const T* input = a.group_input(sample, channel / a.outputs);
      ConvPlace columns[kNarrowColumns];
      FASTSEL_UNROLL
      for (int c = 0; c < kNarrowColumns; ++c)
        columns[c] = a.map.column(rest % blocks * kNarrowColumns + c);
      for (int64_t t = lane; t < a.map.positions; t += kLanes) {
        const float g = to_float(gradient[t]);
        const ConvPlace position = a.map.position(t);
        FASTSEL_UNROLL
        for (int c = 0; c < kNarrowColumns; ++c) {
          uint32_t offset;
          if (a.map.sees(position, columns[c], offset))
            sums[c] = fmaf(g, to_float(input[offset]), sums[c]);
        }
      }
    }
    float norm = 0;
    FASTSEL_UNROLL
    for (int c = 0; c < kNarrowColumns; ++c) {
      const float sum = group_sum<kLanes, kGradNormThreads>(sums[c]);
      if (kLanes > kWarpSize) __syncthreads();
      norm = fmaf(sum, sum, norm);
    }
    if (lane == 0 && item < items) partial[item] = norm;
  }
}

}  // namespace fastsel::cuda
