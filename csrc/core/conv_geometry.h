// The shape of a convolution, for the per-sample norms of its weight's gradient on every backend.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fastsel {

// Three spatial dimensions, slowest first. Channel counts are those of one group.
struct ConvGeometry {
  int64_t batch = 0;
  int64_t groups = 1;
  int64_t in_channels = 0;
  int64_t out_channels = 0;
  int64_t in[3] = {1, 1, 1};
  int64_t out[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1};
  int64_t padding[3] = {0, 0, 0};
  int64_t dilation[3] = {1, 1, 1};

  FASTSEL_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  FASTSEL_HD int64_t positions() const { return out[0] * out[1] * out[2]; }  // T
  FASTSEL_HD int64_t in_positions() const { return in[0] * in[1] * in[2]; }
  FASTSEL_HD int64_t columns() const {
    return in_channels * taps();
  }  // d of the equal linear layer
};

}  // namespace fastsel
