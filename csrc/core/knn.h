// The distance that knn orders by, the same bits on every host and device.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/exact.h"
#include "core/macros.h"

namespace fastsel {

FASTSEL_HD double as_double(double v) { return v; }
template <class T>
FASTSEL_HD double as_double(T v) {
  return static_cast<double>(to_float(v));
}

// The squared L2 distance of two vectors of `dims` values. In double, in eight interleaved sums that
// are added in pairs: enough that no float32 result is off by more than its rounding.
template <class T>
FASTSEL_HD float squared_distance(const T* a, const T* b, int64_t dims) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= dims; d += 8) {
    for (int i = 0; i < 8; ++i) {
      const double difference = as_double(a[d + i]) - as_double(b[d + i]);
      sums[i] = add_rn(sums[i], mul_rn(difference, difference));
    }
  }
  for (int i = 0; d + i < dims; ++i) {
    const double difference = as_double(a[d + i]) - as_double(b[d + i]);
    sums[i] = add_rn(sums[i], mul_rn(difference, difference));
  }
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] = add_rn(sums[i], sums[i + width]);
  return static_cast<float>(sums[0]);
}

// What a float sum of `dims` products, and the norms it is of, may be wrong by where they are too
// small for a share of themselves to say it: half the least number for each rounding. Four times that.
FASTSEL_HD float underflow_room(int64_t dims) {
  return static_cast<float>(2 * dims + 16) * 0x1p-149f;
}

// A distance as an integer of the same order, NaN after infinity.
FASTSEL_HD uint32_t distance_key(float distance) {
  return distance == distance ? bit_cast<uint32_t>(distance) : 0x7fc00000u;
}

FASTSEL_HD float key_distance(uint32_t key) { return bit_cast<float>(key); }

}  // namespace fastsel
