// Qualifiers for functions that the host compiler, nvcc and the host emulation all compile.
#pragma once

// Always inlined, for two reasons: a kernel must not pay for a call, and the CPU kernels compile
// the same headers once per instruction set, where an out-of-line copy from the AVX-512 unit could
// be the one the linker keeps for every machine.
#if defined(__CUDACC__)
#define FASTSEL_HD __host__ __device__ __forceinline__
#else
#define FASTSEL_HD inline __attribute__((always_inline))
#endif
