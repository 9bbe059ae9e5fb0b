// The vectorised part of embedding_grad_norm_sq, one build an instruction set.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/grad_norm_arguments.h"
#include "cpu/column_tiles.h"

namespace fastsel::cpu {

// How the positions of a sample that hold one token hang together, a number a position: the first
// of them has the next one's index, or 0 where there is none; the others have its complement. What
// padding holds has the complement of 0 too: no chain leads there.
FASTSEL_HD int32_t first_link(int32_t next) { return next; }
FASTSEL_HD int32_t later_link(int32_t next) { return ~next; }
FASTSEL_HD int32_t next_position(int32_t link) { return link < 0 ? ~link : link; }
FASTSEL_HD bool is_first(int32_t link) { return link >= 0; }

#define FASTSEL_DECLARE_EMBEDDING_GRAD_NORM(ISA)                                                   \
  namespace ISA {                                                                                  \
  template <class T>                                                                               \
  void embedding_tiles(const EmbeddingArguments<T>& a, const int32_t* links, const ColumnTiles& t, \
                       int64_t begin, int64_t end);                                                \
  }

FASTSEL_DECLARE_EMBEDDING_GRAD_NORM(baseline)
FASTSEL_DECLARE_EMBEDDING_GRAD_NORM(avx2)
FASTSEL_DECLARE_EMBEDDING_GRAD_NORM(avx512)
#undef FASTSEL_DECLARE_EMBEDDING_GRAD_NORM

}  // namespace fastsel::cpu
