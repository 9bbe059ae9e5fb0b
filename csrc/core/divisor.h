// Division of 31-bit integers by a number known before the kernel starts, as a multiplication and a
// shift (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fastsel {

class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {  // 1 ... 2^31 - 1
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t power = uint64_t{1} << shift_;
    magic_ = static_cast<uint32_t>(((power - divisor) << 32) / divisor + 1);
  }

  FASTSEL_HD uint32_t value() const { return divisor_; }

  // Replaces n < 2^31 by its remainder and returns the quotient.
  FASTSEL_HD uint32_t divide(uint32_t& n) const {
    const auto high = static_cast<uint32_t>((uint64_t{n} * magic_) >> 32);
    const uint32_t quotient = (high + n) >> shift_;
    n -= quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t magic_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace fastsel
