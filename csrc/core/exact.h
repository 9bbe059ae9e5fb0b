// Arithmetic that no compiler contracts, so that every host and device rounds it alike.
#pragma once

#include "core/macros.h"

namespace fastsel {

#if defined(__CUDA_ARCH__)
FASTSEL_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FASTSEL_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
FASTSEL_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
FASTSEL_HD double add_rn(double a, double b) { return __dadd_rn(a, b); }
#else
// Files that use these are not among those compiled for instruction sets with fused operations
// (csrc/cpu/*_simd.cpp).
FASTSEL_HD float mul_rn(float a, float b) { return a * b; }
FASTSEL_HD float add_rn(float a, float b) { return a + b; }
FASTSEL_HD double mul_rn(double a, double b) { return a * b; }
FASTSEL_HD double add_rn(double a, double b) { return a + b; }
#endif

}  // namespace fastsel
