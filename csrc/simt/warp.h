// Barriers and warp operations, the twins of CUDA's.
//
// Lanes that have ended or never existed take part in nothing, whatever a mask says, as on a GPU.
// Where CUDA calls a lane's result undefined (a shuffle from a lane outside the mask, or from one
// that has ended), all its bits are set: NaN or -1, so that code which uses it shows.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <type_traits>

#include "simt/machine.h"

namespace fastsel::simt {

template <class T>
uint64_t to_bits(T v) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class Function>
void for_each_lane(unsigned lanes, Function&& function) {
  for (; lanes; lanes &= lanes - 1) function(static_cast<unsigned>(std::countr_zero(lanes)));
}

inline void operation_sync(WarpExchange&, unsigned) {}

inline void operation_shuffle(WarpExchange& e, unsigned lanes) {
  for_each_lane(lanes, [&](unsigned lane) {
    const unsigned source = e.source[lane];
    e.result[lane] = lanes >> source & 1 ? e.offered[source] : ~uint64_t{0};
  });
}

inline void operation_ballot(WarpExchange& e, unsigned lanes) {
  uint64_t bits = 0;
  for_each_lane(lanes, [&](unsigned lane) { bits |= uint64_t{e.offered[lane] != 0} << lane; });
  for_each_lane(lanes, [&](unsigned lane) { e.result[lane] = bits; });
}

inline void operation_match(WarpExchange& e, unsigned lanes) {
  for_each_lane(lanes, [&](unsigned lane) {
    uint64_t bits = 0;
    for_each_lane(lanes, [&](unsigned other) {
      bits |= uint64_t{e.offered[other] == e.offered[lane]} << other;
    });
    e.result[lane] = bits;
  });
}

template <class T, class Combine>
void operation_reduce(WarpExchange& e, unsigned lanes) {
  T total = from_bits<T>(e.offered[std::countr_zero(lanes)]);
  for_each_lane(lanes & (lanes - 1),
                [&](unsigned lane) { total = Combine{}(total, from_bits<T>(e.offered[lane])); });
  for_each_lane(lanes, [&](unsigned lane) { e.result[lane] = to_bits(total); });
}

// Sums wrap around, as a GPU's do.
struct WrappingAdd {
  template <class T>
  T operator()(T a, T b) const {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  }
};
struct Smaller {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

template <class T>
T shuffle(unsigned mask, T v, unsigned source, std::source_location where) {
  return from_bits<T>(wait_for_warp(mask, operation_shuffle, to_bits(v), source, where));
}

// The lanes that a shuffle of this width may read from: [first, last].
struct Segment {
  int first, last;
  explicit Segment(int width) {
    if (width < 1 || width > 32 || (width & (width - 1)))
      throw std::runtime_error("simt: a shuffle's width must be a power of two up to 32");
    first = static_cast<int>(current->lane) & ~(width - 1);
    last = first + width - 1;
  }
};

}  // namespace fastsel::simt

#define FASTSEL_HERE std::source_location where = std::source_location::current()

inline void __syncthreads(FASTSEL_HERE) { fastsel::simt::wait_for_block(0, where); }
inline int __syncthreads_count(int predicate, FASTSEL_HERE) {
  return static_cast<int>(fastsel::simt::wait_for_block(predicate, where).predicates);
}
inline int __syncthreads_or(int predicate, FASTSEL_HERE) {
  return fastsel::simt::wait_for_block(predicate, where).predicates != 0;
}
inline int __syncthreads_and(int predicate, FASTSEL_HERE) {
  const auto count = fastsel::simt::wait_for_block(predicate, where);
  return count.predicates == count.threads;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, FASTSEL_HERE) {
  fastsel::simt::wait_for_warp(mask, fastsel::simt::operation_sync, 0, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, FASTSEL_HERE) {
  const fastsel::simt::Segment segment(width);
  return fastsel::simt::shuffle(mask, v, segment.first + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, FASTSEL_HERE) {
  const fastsel::simt::Segment segment(width);
  const int lane = static_cast<int>(fastsel::simt::current->lane), source = lane ^ lane_mask;
  return fastsel::simt::shuffle(mask, v, source > segment.last ? lane : source, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, FASTSEL_HERE) {
  const fastsel::simt::Segment segment(width);
  const int lane = static_cast<int>(fastsel::simt::current->lane),
            source = lane - static_cast<int>(delta);
  return fastsel::simt::shuffle(mask, v, source < segment.first ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, FASTSEL_HERE) {
  const fastsel::simt::Segment segment(width);
  const int lane = static_cast<int>(fastsel::simt::current->lane),
            source = lane + static_cast<int>(delta);
  return fastsel::simt::shuffle(mask, v, source > segment.last ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FASTSEL_HERE) {
  return static_cast<unsigned>(fastsel::simt::wait_for_warp(mask, fastsel::simt::operation_ballot,
                                                            predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, FASTSEL_HERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FASTSEL_HERE) {
  return __ballot_sync(mask, !predicate, where) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v, FASTSEL_HERE) {
  return static_cast<unsigned>(fastsel::simt::wait_for_warp(mask, fastsel::simt::operation_match,
                                                            fastsel::simt::to_bits(v), 0, where));
}

namespace fastsel::simt {
template <class T, class Combine>
T reduce(unsigned mask, T v, std::source_location where) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>,
                "as CUDA: int and unsigned only");
  return from_bits<T>(wait_for_warp(mask, operation_reduce<T, Combine>, to_bits(v), 0, where));
}
}  // namespace fastsel::simt

template <class T>
T __reduce_add_sync(unsigned mask, T v, FASTSEL_HERE) {
  return fastsel::simt::reduce<T, fastsel::simt::WrappingAdd>(mask, v, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, FASTSEL_HERE) {
  return fastsel::simt::reduce<T, fastsel::simt::Smaller>(mask, v, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T v, FASTSEL_HERE) {
  return fastsel::simt::reduce<T, fastsel::simt::Larger>(mask, v, where);
}

namespace fastsel::simt {

// As on a GPU both halves of a grid barrier hold a block barrier.
using GridToken = uint64_t;
inline GridToken grid_arrive(FASTSEL_HERE) {
  wait_for_block(0, where);
  return arrive_at_grid(where);
}
inline void grid_wait(GridToken token, FASTSEL_HERE) { wait_for_grid(token, where); }
inline void grid_sync(FASTSEL_HERE) { wait_for_grid(arrive_at_grid(where), where); }

}  // namespace fastsel::simt

#undef FASTSEL_HERE
