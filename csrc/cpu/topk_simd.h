// The vectorised part of topk, one build an instruction set.
#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastsel::cpu {

// How many values one call of filter_block may see, and how much longer than that its outputs must
// be.
constexpr int64_t kFilterBlock = 4096;
constexpr int64_t kFilterSlack = 16;

// The keys of an array above and below a pivot. Both outputs need room for kFilterSlack keys more
// than the array holds.
template <class K>
struct KeySplit {
  K* above;
  K* below;
  int64_t above_count = 0;
  int64_t below_count = 0;
};

#define FASTSEL_DECLARE_TOPK(ISA)                                                                  \
  namespace ISA {                                                                                  \
  template <class T>                                                                               \
  void filter_block(const T* values, int64_t count, bool largest, uint32_t threshold,              \
                    uint32_t* keys, uint32_t* offsets, int64_t* kept);                             \
  void split_keys(const uint32_t* keys, int64_t count, uint32_t pivot, KeySplit<uint32_t>& split); \
  void cut_by_counting(const uint32_t* keys, int64_t count, int64_t k, uint32_t* key,              \
                       int64_t* equal);                                                            \
  }

// filter_block writes the keys (core/topk_key.h, of the value as float32) that are at least
// `threshold`, and their positions in `values`, in ascending order of position; `kept` receives how
// many. cut_by_counting finds the k best of few keys, k at least 1: those above `key`, and the first
// `equal` of those equal to it.
FASTSEL_DECLARE_TOPK(baseline)
FASTSEL_DECLARE_TOPK(avx2)
FASTSEL_DECLARE_TOPK(avx512)
#undef FASTSEL_DECLARE_TOPK

}  // namespace fastsel::cpu
