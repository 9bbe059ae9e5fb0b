// Tensor cores and asynchronous copies behind thin wrappers, so that kernels hold no PTX.
//
// nvcc gets the instructions (sm_80 and newer), any other compiler simt/mma.h, whose fragments are
// laid out as PTX lays them out. All of a warp's 32 lanes take part in each matrix operation. With
// g = lane / 4 and t = lane % 4:
//   mma_m16n8k16       C[16, 8] += A[16, 16] B[16, 8] of 16-bit values, two to a register
//                      a: rows g, g + 8, g, g + 8; columns 2t.., 2t.., 2t + 8.., 2t + 8..
//                      b: depths 2t.., 2t + 8..; column g
//   mma_m16n8k8_tf32   C[16, 8] += A[16, 8] B[8, 8] of TF32, floats whose lower 13 bits are zero
//                      a: rows g, g + 8, g, g + 8; columns t, t, t + 4, t + 4
//                      b: depths t, t + 4; column g
//   in both            c: row g, columns 2t and 2t + 1; row g + 8, the same columns
//   ldmatrix_x4        four 8 x 8 matrices of 16-bit values from shared memory; lane 8 m + r names
//                      row r of matrix m (16 bytes, aligned); out[m]: row g, columns 2t, 2t + 1
//   ldmatrix_x4_trans  the same of the transposed matrices
//   cp_async_16        starts a copy of 16 aligned bytes, of which the first `valid` bytes are
//                      read from global memory and the rest are zero
//   cp_async_commit    makes a group of the thread's copies so far
//   cp_async_wait<n>   until all but the thread's n newest groups are there; other threads see
//                      them after a barrier that follows
#pragma once

#include "core/dtypes.h"
#include "cuda/device.cuh"

#ifdef __CUDACC__
namespace fastsel::cuda {

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Volatile and with memory clobbered: they must stay between the barriers around them.
template <class T>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const T* row) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const T* row) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Past the first-level cache (.cg): each tile is used from shared memory.
template <class T>
__device__ __forceinline__ void cp_async_16(T* shared, const T* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

}  // namespace fastsel::cuda
#else
#include "simt/mma.h"

namespace fastsel::cuda {
using simt::cp_async_16;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;
using simt::mma_m16n8k16;
using simt::mma_m16n8k8_tf32;
}  // namespace fastsel::cuda
#endif

namespace fastsel::cuda {

// A float as the sum of two TF32 values, to 22 bits above 1e-31 (below, the second is subnormal).
// With the three larger of the four products of two such sums, tensor cores multiply with almost
// float32's accuracy (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores
// while surpassing the FP32 theoretical peak performance", 2022).
struct Tf32Pair {
  uint32_t big, small;
};

FASTSEL_HD uint32_t round_to_tf32(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  // What would round to infinity is cut off instead, and the second value makes up for it; so is a
  // NaN, whose payload must not carry over into the sign.
  const bool near_end = (bits & 0x7fffffffu) >= 0x7f7ff000u;
  return (near_end ? bits : bits + 0x1000u) & 0xffffe000u;
}

// Of an infinity the second value is NaN, and so is what it is multiplied with.
FASTSEL_HD Tf32Pair split_tf32(float v) {
  const uint32_t big = round_to_tf32(v);
  return {big, round_to_tf32(v - bit_cast<float>(big))};
}

}  // namespace fastsel::cuda
