// The one door between the kernels and the machine they run on.
//
// Kernels (csrc/cuda/*.cuh) and their launchers (csrc/cuda/*.cu) include this header and nothing
// else of CUDA. nvcc gets thin wrappers around CUDA itself; any other compiler gets simt/simt.h,
// which gives the same names and runs the same source on the host, so that a machine without a GPU
// tests the very kernels a GPU runs. No torch in here.
//
// What a kernel may use, the same under both:
//   CUDA's own names   __global__ __device__ __host__ __launch_bounds__ __forceinline__, dim3,
//                      threadIdx blockIdx blockDim gridDim, __syncthreads(_count|_and|_or),
//                      __syncwarp, __shfl(_xor|_up|_down)_sync, __ballot_sync __any_sync __all_sync
//                      __match_any_sync, __reduce_(add|min|max)_sync, atomicAdd (Min Max Exch CAS
//                      Or And Inc), __threadfence(_block|_system), __ldg, __popc(ll) __ffs(ll)
//                      __clz(ll) __brev(ll), __float_as_uint and its kin, min and max
//   shared memory      block_shared<T>(), dynamic_shared<T>(); never __shared__: the host has no
//                      such storage
//   memory             Vector<T, N>, load_vector, store_vector, load_streaming
//   arithmetic         fast_exp2
//   cooperative grid   grid_sync(), grid_arrive() and grid_wait()
//   tensor cores       and asynchronous copies into shared memory: cuda/mma.cuh
//   loops              FASTSEL_UNROLL, FASTSEL_UNROLL_BY(n) in front of a loop
//   calls              FASTSEL_NOINLINE in front of a function
// What a launcher may use:
//   launch(kernel, LaunchConfig{grid, block, shared_bytes, stream}, arguments...),
//   launch_cooperative(...), multiprocessor_count(), max_shared_bytes_per_block()
// Threads must not spin on memory that another thread writes: on the host nobody else runs
// meanwhile.
#pragma once

#ifdef __CUDACC__
#include "cuda/device_nvcc.cuh"
#else
#include "simt/simt.h"

namespace fastsel::cuda {
using simt::block_shared;
using simt::dynamic_shared;
using simt::fast_exp2;
using simt::grid_arrive;
using simt::grid_sync;
using simt::grid_wait;
using simt::GridToken;
using simt::launch;
using simt::launch_cooperative;
using simt::LaunchConfig;
using simt::load_streaming;
using simt::load_vector;
using simt::max_shared_bytes_per_block;
using simt::multiprocessor_count;
using simt::store_vector;
using simt::Vector;
}  // namespace fastsel::cuda
#endif

namespace fastsel::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

}  // namespace fastsel::cuda
