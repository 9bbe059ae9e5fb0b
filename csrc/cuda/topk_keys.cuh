// Where the keys of a row lie while topk works on them: registers, shared memory, global memory, or
// a list of the few that still matter. All of them hand the keys of one warp's segment to a
// function, in one order: a warp takes 32 * V neighbouring keys at a time, lane l the V keys from
// 32 * V * step + V * l on. So the order of (step, lane, position) is the order of the indices,
// loads are 16 bytes wide and coalesced, and results can be written in index order after a scan
// inside the warp.
//
// for_each(f) calls f(keys, first, valid) in all 32 lanes together: keys[0..valid) are the keys of
// columns first, first + 1, ...; valid may be 0.
#pragma once

#include "core/dtypes.h"
#include "core/topk_key.h"
#include "cuda/device.cuh"

namespace fastsel::cuda {

// The columns [begin, end) of a row that one warp works on; begin is a multiple of 32 * Row::V.
struct WarpSegment {
  unsigned begin, end;
};

// How many of the V columns from `first` on lie before `end`.
template <int V>
__device__ __forceinline__ int valid_columns(unsigned first, unsigned end) {
  if (first >= end) return 0;
  return end - first < V ? static_cast<int>(end - first) : V;
}

// A row of values in memory, read in vectors of kWidth values where it is aligned. A Row is one of these
// with two things more: Key, the type that holds its keys, and to_keys, which makes keys of the
// values from column `first` on; a larger key is a better one.
template <class T, int kWidth>
struct RowValues {
  using Value = T;
  static constexpr int V = kWidth;

  const T* values;  // [columns]
  bool aligned;

  __device__ explicit RowValues(const T* row)
      : values(row), aligned(reinterpret_cast<uintptr_t>(row) % (V * sizeof(T)) == 0) {}

  // Loads the columns from first(0), first(1), ... on, V each, those from `end` on left zero. All
  // loads are under way before one of them is needed: that takes predicates where it can, not
  // branches.
  template <int kLoads, class First>
  __device__ __forceinline__ void load(First first, unsigned end,
                                       Vector<T, V> (&loaded)[kLoads]) const {
    FASTSEL_UNROLL
    for (int l = 0; l < kLoads; ++l) loaded[l] = {};
    if (aligned) {
      FASTSEL_UNROLL
      for (int l = 0; l < kLoads; ++l)
        if (valid_columns<V>(first(l), end) == V) loaded[l] = load_vector<V>(values + first(l));
      if (end % V == 0) return;
    }
    FASTSEL_UNROLL
    for (int l = 0; l < kLoads; ++l) {
      const int valid = valid_columns<V>(first(l), end);
      if (aligned && valid == V) continue;
      FASTSEL_UNROLL
      for (int v = 0; v < V; ++v)
        if (v < valid) loaded[l][v] = values[first(l) + v];
    }
  }
};

// The scores of topk.
template <class T>
struct TopkRow : RowValues<T, 16 / sizeof(T)> {
  using Key = typename TopkKey<T>::type;
  using Values = RowValues<T, 16 / sizeof(T)>;
  using Values::V;

  bool largest;

  __device__ TopkRow(const T* row, bool largest_first) : Values(row), largest(largest_first) {}

  __device__ __forceinline__ void to_keys(const Vector<T, V>& scores, unsigned /*first*/,
                                          unsigned (&keys)[V]) const {
    FASTSEL_UNROLL
    for (int v = 0; v < V; ++v) keys[v] = topk_key(scores[v], largest);
  }
};

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ unsigned warp_index() { return threadIdx.x / kWarpSize; }

// Up to kPerThread keys in each thread's registers.
template <class Row, int kPerThread>
class RegisterKeys {
 public:
  static constexpr int V = Row::V;
  static constexpr int kLoads = kPerThread / V;
  static constexpr int kBytesPerKey = 0;  // of shared memory

  __device__ RegisterKeys(const Row& row, WarpSegment segment, void* /*shared*/)
      : segment_(segment) {
    Vector<typename Row::Value, V> values[kLoads];
    row.load([this](int l) { return column(l); }, segment_.end, values);
    FASTSEL_UNROLL
    for (int l = 0; l < kLoads; ++l) row.to_keys(values[l], column(l), keys_[l]);
  }

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    FASTSEL_UNROLL
    for (int l = 0; l < kLoads; ++l) {
      const unsigned first = column(l);
      if (first - lane_index() * V < segment_.end)
        f(keys_[l], first, valid_columns<V>(first, segment_.end));
    }
  }

 private:
  __device__ __forceinline__ unsigned column(int load) const {
    return segment_.begin + (static_cast<unsigned>(load) * kWarpSize + lane_index()) * V;
  }

  WarpSegment segment_;
  unsigned keys_[kLoads][V];
};

// Keys read from global memory anew each time, a few loads in flight.
template <class Row>
class GlobalKeys {
 public:
  static constexpr int V = Row::V;
  static constexpr int kInFlight = V > 4 ? 2 : 4;

  __device__ GlobalKeys(const Row& row, WarpSegment segment) : row_(row), segment_(segment) {}

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    constexpr unsigned kStep = kWarpSize * V;
    for (unsigned base = segment_.begin; base < segment_.end; base += kStep * kInFlight) {
      const auto column = [base](int i) {
        return base + static_cast<unsigned>(i) * kStep + lane_index() * V;
      };
      Vector<typename Row::Value, V> values[kInFlight];
      row_.load(column, segment_.end, values);
      FASTSEL_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        unsigned keys[V];
        row_.to_keys(values[i], column(i), keys);
        f(keys, column(i), valid_columns<V>(column(i), segment_.end));
      }
    }
  }

 private:
  Row row_;
  WarpSegment segment_;
};

// Keys kept in shared memory, in the narrowest type that holds them. A lane reads back only what it
// wrote itself, so no barrier is needed between loading and reading.
template <class Row>
class SharedKeys {
 public:
  using Key = typename Row::Key;
  static constexpr int V = Row::V;
  static constexpr int kBytesPerKey = sizeof(Key);

  // `shared` has room for the block's columns from `block_begin` on, each warp's part rounded up to
  // 32 * V keys.
  __device__ SharedKeys(WarpSegment segment, unsigned block_begin, void* shared)
      : segment_(segment), keys_(static_cast<Key*>(shared) + (segment.begin - block_begin)) {}

  __device__ SharedKeys(const Row& row, WarpSegment segment, void* shared)
      : SharedKeys(segment, 0, shared) {
    load(row);
  }

  __device__ void load(const Row& row) {
    GlobalKeys<Row>(row, segment_)
        .for_each([this](const unsigned (&keys)[V], unsigned first, int valid) {
          if (valid == 0) return;
          Vector<Key, V> packed;
          FASTSEL_UNROLL
          for (int v = 0; v < V; ++v) packed[v] = static_cast<Key>(keys[v]);
          store_vector(keys_ + (first - segment_.begin), packed);
        });
  }

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    for (unsigned base = segment_.begin; base < segment_.end; base += kWarpSize * V) {
      const unsigned first = base + lane_index() * V;
      const int valid = valid_columns<V>(first, segment_.end);
      unsigned keys[V] = {};
      if (valid > 0) {
        const auto packed = load_vector<V>(keys_ + (first - segment_.begin));
        FASTSEL_UNROLL
        for (int v = 0; v < V; ++v) keys[v] = packed[v];
      }
      f(keys, first, valid);
    }
  }

 private:
  WarpSegment segment_;
  Key* keys_;
};

// A warp's list of keys with their columns, in column order.
struct KeyAndColumn {
  unsigned key, column;
};

class ListedKeys {
 public:
  __device__ ListedKeys(const KeyAndColumn* list, unsigned count) : list_(list), count_(count) {}

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    for (unsigned base = 0; base < count_; base += kWarpSize) {
      const unsigned i = base + lane_index();
      const KeyAndColumn entry = i < count_ ? list_[i] : KeyAndColumn{0, 0};
      const unsigned keys[1] = {entry.key};
      f(keys, entry.column, i < count_ ? 1 : 0);
    }
  }

 private:
  const KeyAndColumn* list_;
  unsigned count_;
};

}  // namespace fastsel::cuda
