// The twins of cuda/mma.cuh: matrix products of a warp, and loads of their fragments.
//
// The layouts of the fragments are the PTX manual's ("Matrix fragments for mma.m16n8k16", "...
// .m16n8k8", "ldmatrix"), register for register, because a GPU uses the real ones. Each lane
// offers the address of its operands, which lie on its fiber's stack, and the last lane to arrive
// does the work of all.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>

#include "core/dtypes.h"
#include "simt/async_copy.h"
#include "simt/machine.h"
#include "simt/memory.h"

namespace fastsel::simt {

struct MmaLane {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

struct LdmatrixLane {
  const void* row;
  uint32_t* out;
};

template <class Lane>
Lane& offered_by(const WarpExchange& e, unsigned lane) {
  Lane* pointer;
  static_assert(sizeof(pointer) == sizeof(e.offered[lane]));
  std::memcpy(&pointer, &e.offered[lane], sizeof pointer);
  return *pointer;
}

// Runs `operation` with what every lane of the warp offers.
template <class Lane>
void with_whole_warp(WarpOperation operation, Lane lane, std::source_location where) {
  const Lane* pointer = &lane;
  uint64_t bits;
  std::memcpy(&bits, &pointer, sizeof bits);
  wait_for_warp(0xffffffffu, operation, bits, 0, where);
}

inline void need_whole_warp(unsigned lanes) {
  if (lanes != 0xffffffffu) throw std::runtime_error("simt: a matrix operation needs all 32 lanes");
}

template <class T>
float half_of_register(uint32_t bits, int upper) {
  return to_float(T{static_cast<uint16_t>(bits >> (16 * upper))});
}

// C[16, 8] += A[16, depth] B[depth, 8], where `place` says which register and half of it holds an
// element: rows and columns as the manual numbers them. The sum is rounded once; a GPU may round
// otherwise in its last bits.
template <int kDepth, class ElementA, class ElementB>
void multiply(const WarpExchange& e, ElementA&& element_a, ElementB&& element_b) {
  float a[16][kDepth], b[kDepth][8];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k) a[i][k] = element_a(i, k);
  for (int k = 0; k < kDepth; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = element_b(k, j);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      // c0, c1: row lane / 4, columns 2 * (lane % 4) and the next; c2, c3: the row 8 further down.
      float& c = offered_by<MmaLane>(e, i % 8 * 4 + j / 2).c[i / 8 * 2 + j % 2];
      double sum = c;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[i][k]) * b[k][j];
      c = static_cast<float>(sum);
    }
}

template <class T>
void operation_mma_m16n8k16(WarpExchange& e, unsigned lanes) {
  need_whole_warp(lanes);
  multiply<16>(
      e,
      [&](int i, int k) {
        const MmaLane& lane = offered_by<MmaLane>(e, i % 8 * 4 + k % 8 / 2);
        return half_of_register<T>(lane.a[k / 8 * 2 + i / 8], k % 2);
      },
      [&](int k, int j) {
        const MmaLane& lane = offered_by<MmaLane>(e, j * 4 + k % 8 / 2);
        return half_of_register<T>(lane.b[k / 8], k % 2);
      });
}

// The unit reads the upper 19 bits of a register.
inline float tf32_value(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

inline void operation_mma_m16n8k8(WarpExchange& e, unsigned lanes) {
  need_whole_warp(lanes);
  multiply<8>(
      e,
      [&](int i, int k) {
        const MmaLane& lane = offered_by<MmaLane>(e, i % 8 * 4 + k % 4);
        return tf32_value(lane.a[k / 4 * 2 + i / 8]);
      },
      [&](int k, int j) { return tf32_value(offered_by<MmaLane>(e, j * 4 + k % 4).b[k / 4]); });
}

// Lane 8 m + r gives the address of row r of matrix m: eight 16-bit elements. Each lane gets two
// neighbours of every matrix (transposed: of a column of it).
template <bool kTranspose>
void operation_ldmatrix(WarpExchange& e, unsigned lanes) {
  need_whole_warp(lanes);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int r = 0; r < 8; ++r)
      std::memcpy(values[r], offered_by<LdmatrixLane>(e, 8 * matrix + r).row, sizeof values[r]);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t first = kTranspose ? values[j][i] : values[i][j];
      const uint16_t second = kTranspose ? values[j + 1][i] : values[i][j + 1];
      offered_by<LdmatrixLane>(e, lane).out[matrix] = first | uint32_t{second} << 16;
    }
  }
}

#define FASTSEL_HERE std::source_location where = std::source_location::current()

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTSEL_HERE) {
  with_whole_warp(operation_mma_m16n8k16<T>, MmaLane{c, a, b}, where);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             FASTSEL_HERE) {
  with_whole_warp(operation_mma_m16n8k8, MmaLane{c, a, b}, where);
}

template <class T>
void ldmatrix_x4(uint32_t (&out)[4], const T* row, FASTSEL_HERE) {
  static_assert(sizeof(T) == 2);
  check_alignment(row, 16);
  with_whole_warp(operation_ldmatrix<false>, LdmatrixLane{row, out}, where);
}

template <class T>
void ldmatrix_x4_trans(uint32_t (&out)[4], const T* row, FASTSEL_HERE) {
  static_assert(sizeof(T) == 2);
  check_alignment(row, 16);
  with_whole_warp(operation_ldmatrix<true>, LdmatrixLane{row, out}, where);
}

#undef FASTSEL_HERE

template <class T>
void cp_async_16(T* shared, const T* global, int valid) {
  async_copy_16(shared, global, valid);
}
inline void cp_async_commit() { async_copy_commit(); }
template <int kPending>
void cp_async_wait() {
  async_copy_wait(kPending);
}

}  // namespace fastsel::simt
