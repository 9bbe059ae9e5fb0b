// CUDA's names for the host compiler: with these a kernel's source compiles as ordinary C++ and
// runs on fibers. Included by cuda/device.cuh where nvcc is not the compiler; not to be included by
// itself.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "simt/atomics.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"
#include "simt/machine.h"
#include "simt/memory.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FASTSEL_NOINLINE __attribute__((noinline))
#define FASTSEL_UNROLL
#define FASTSEL_UNROLL_BY(times)

#define threadIdx (::fastsel::simt::current->thread)
#define blockIdx (::fastsel::simt::current->block->index)
#define blockDim (::fastsel::simt::current->block->dim)
#define gridDim (::fastsel::simt::current->block->grid)
