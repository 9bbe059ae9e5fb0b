// Exact selection of the k best of a row on the CPU, reading the row once: what topk and
// adaselection_ share.
//
// 1. Sample the row and take from the sample a key that, with a wide margin, more than k values
//    reach: the threshold.
// 2. Filter: one vectorised pass keeps the keys at or above it with their positions, in order; few
//    survive.
// 3. Select exactly among the survivors: the k-th best key, and how many of its equals belong to
//    the result.
// 4. Collect in index order, which settles ties in favour of the lower index.
// The sample decides only how much work step 3 has. If it misled (fewer than k survivors), the
// filter runs again and keeps everything. The result is a pure function of the input: no thread
// count or chunk size shows in it.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/topk_key.h"
#include "cpu/isa.h"
#include "cpu/topk_simd.h"
#include "torch_api.h"

namespace fastsel::cpu {

// Below this many values a row is selected from directly: the sample would cost more than it saves.
inline constexpr int64_t kSmallRow = 2048;
// One row is split over threads in pieces of this many values.
inline constexpr int64_t kRowChunk = 1 << 16;

// Keys are at least 32 bits wide: a 16-bit value is keyed as the float32 it equals.
template <class T>
using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <class T>
Key<T> key_of(T value, bool largest) {
  if constexpr (std::is_same_v<T, double>) {
    return topk_key(value, largest);
  } else {
    return topk_key(to_float(value), largest);
  }
}

template <class T>
void filter(const T* values, int64_t count, bool largest, uint32_t threshold, uint32_t* keys,
            uint32_t* offsets, int64_t* kept) {
  FASTSEL_DISPATCH_ISA(filter_block, values, count, largest, threshold, keys, offsets, kept);
}

inline void filter(const double* values, int64_t count, bool largest, uint64_t threshold,
                   uint64_t* keys, uint32_t* offsets, int64_t* kept) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[n] = topk_key(values[i], largest);
    offsets[n] = static_cast<uint32_t>(i);
    n += keys[n] >= threshold;
  }
  *kept = n;
}

inline void split(const uint32_t* keys, int64_t count, uint32_t pivot, KeySplit<uint32_t>& out) {
  FASTSEL_DISPATCH_ISA(split_keys, keys, count, pivot, out);
}

inline void split(const uint64_t* keys, int64_t count, uint64_t pivot, KeySplit<uint64_t>& out) {
  for (int64_t i = 0; i < count; ++i) {
    out.above[out.above_count] = out.below[out.below_count] = keys[i];
    out.above_count += keys[i] > pivot;
    out.below_count += keys[i] < pivot;
  }
}

// Some place in [0, range), the same every time.
inline uint64_t scattered(uint32_t i, uint64_t range) {
  uint32_t hash = i * 0x9E3779B9u;
  hash = (hash ^ hash >> 15) * 0x85EBCA6Bu;
  return (hash ^ hash >> 13) * range >> 32;
}

// What tells the k best of some keys from the rest: they are the keys above `key`, and the first
// `equal` of those equal to it.
template <class K>
struct Cut {
  K key;
  int64_t equal;
};

// For few keys: no memory, and no branches that are coin tosses.
inline Cut<uint32_t> cut_few(const uint32_t* keys, int64_t size, int64_t k) {
  Cut<uint32_t> cut{};
  FASTSEL_DISPATCH_ISA(cut_by_counting, keys, size, k, &cut.key, &cut.equal);
  return cut;
}

inline Cut<uint64_t> cut_few(const uint64_t* keys, int64_t size, int64_t k) {
  std::vector<uint64_t> rest(keys, keys + size);
  const auto kth = rest.begin() + (k - 1);
  std::nth_element(rest.begin(), kth, rest.end(), std::greater<>());
  const auto better = std::count_if(rest.begin(), kth, [=](uint64_t key) { return key > *kth; });
  return {*kth, k - better};
}

// A median of nine keys, others each round.
template <class K>
K choose_pivot(const K* keys, int64_t size, int round) {
  K sample[9];
  for (int i = 0; i < 9; ++i) sample[i] = keys[scattered(9 * round + i, size)];
  std::nth_element(sample, sample + 4, sample + 9);
  return sample[4];
}

// Quickselect: splits the keys at a pivot and goes on with the side that holds the k-th best, until
// few are left or the pivots keep falling badly. `guess` is the first pivot.
template <class K>
Cut<K> find_cut(const K* keys, int64_t size, int64_t k, std::optional<K> guess = std::nullopt) {
  constexpr int64_t kFew = sizeof(K) == 4 ? kSmallRow : 64;
  constexpr int kRounds = 40;
  std::vector<K> current, above, below;
  for (int round = 0; size > kFew && round < kRounds; ++round) {
    above.resize(size + kFilterSlack);
    below.resize(size + kFilterSlack);
    const K pivot = round == 0 && guess.has_value() ? *guess : choose_pivot(keys, size, round);
    KeySplit<K> parts{above.data(), below.data()};
    split(keys, size, pivot, parts);
    const int64_t equal = size - parts.above_count - parts.below_count;
    if (k > parts.above_count && k <= parts.above_count + equal) {
      return {pivot, k - parts.above_count};
    }
    const bool is_above = k <= parts.above_count;
    if (!is_above) k -= parts.above_count + equal;
    size = is_above ? parts.above_count : parts.below_count;
    current.swap(is_above ? above : below);
    keys = current.data();
  }
  return cut_few(keys, size, k);
}

// Memory that grows without being initialised: the filter writes whole vectors past what it keeps.
template <class V>
class Buffer {
 public:
  V* data() { return data_.get(); }
  const V* data() const { return data_.get(); }

  // Makes room for `capacity` values and keeps the first `used`.
  void reserve(int64_t capacity, int64_t used) {
    if (capacity <= capacity_) return;
    capacity_ = std::max(capacity, 2 * capacity_);
    std::unique_ptr<V[]> grown(new V[capacity_]);
    std::copy_n(data_.get(), used, grown.get());
    data_ = std::move(grown);
  }

 private:
  std::unique_ptr<V[]> data_;
  int64_t capacity_ = 0;
};

// Keys and where they stand in the row, in ascending order of position.
template <class K>
struct Candidates {
  Buffer<K> keys;
  Buffer<int64_t> indices;
  int64_t size = 0;

  void reserve(int64_t capacity) {
    keys.reserve(capacity, size);
    indices.reserve(capacity, size);
  }

  void append(const Candidates& other) {
    std::copy_n(other.keys.data(), other.size, keys.data() + size);
    std::copy_n(other.indices.data(), other.size, indices.data() + size);
    size += other.size;
  }
};

// Keys between which the k-th best very likely lies.
template <class K>
struct Bounds {
  K low = 0;
  std::optional<K> high;
};

// The k-th best of a row estimated from a sample of it, four standard deviations to either side.
// One value is drawn from each of the sample's strata, at a scattered place, so that a periodic row
// misleads no more than a shuffled one.
template <class T>
Bounds<Key<T>> estimate_bounds(const T* values, int64_t n, int64_t k, bool largest) {
  if (n <= kSmallRow) return {};
  const int64_t size = std::clamp<int64_t>(n / 64, 1024, 16384), stratum = n / size;
  std::vector<Key<T>> sample(size);
  for (int64_t i = 0; i < size; ++i) {
    const auto offset = scattered(static_cast<uint32_t>(i), static_cast<uint64_t>(stratum));
    sample[i] = key_of(values[i * stratum + static_cast<int64_t>(offset)], largest);
  }
  const double share = static_cast<double>(k) / n, expected = share * size;
  const double margin = 4 * std::sqrt(expected * (1 - share)) + 4;
  Bounds<Key<T>> bounds;
  const auto below = static_cast<int64_t>(expected + margin);
  if (below < size) bounds.low = find_cut(sample.data(), size, below + 1).key;
  if (expected >= margin) {
    const auto above = static_cast<int64_t>(expected - margin);
    bounds.high = find_cut(sample.data(), size, above + 1).key;
  }
  return bounds;
}

// The candidates of values[begin, end). Of those equal to the threshold only the first k can be
// chosen, so a row of equal values does not pile them up.
template <class T>
void collect_candidates(const T* values, int64_t begin, int64_t end, int64_t k, bool largest,
                        Key<T> threshold, Candidates<Key<T>>& out) {
  uint32_t offsets[kFilterBlock + kFilterSlack];
  const Key<T> first_threshold = threshold;
  int64_t equal = 0;
  for (int64_t i = begin; i < end; i += kFilterBlock) {
    const int64_t count = std::min(kFilterBlock, end - i);
    out.reserve(out.size + count + kFilterSlack);
    Key<T>* keys = out.keys.data() + out.size;
    int64_t* indices = out.indices.data() + out.size;
    int64_t kept = 0;
    filter(values + i, count, largest, threshold, keys, offsets, &kept);
    for (int64_t j = 0; j < kept; ++j) indices[j] = i + offsets[j];
    out.size += kept;
    if (threshold != first_threshold) continue;
    equal += std::count(keys, keys + kept, threshold);
    if (equal >= k) {
      if (++threshold == 0) return;  // nothing is better than the best key
    }
  }
}

template <class T>
Candidates<Key<T>> find_candidates(const T* values, int64_t n, int64_t k, bool largest,
                                   Key<T> threshold) {
  Candidates<Key<T>> all;
  if (n < 2 * kRowChunk || torch::stable::get_num_threads() == 1) {
    collect_candidates(values, 0, n, k, largest, threshold, all);
    return all;
  }
  const int64_t chunks = (n + kRowChunk - 1) / kRowChunk;
  std::vector<Candidates<Key<T>>> found(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      collect_candidates(values, c * kRowChunk, std::min(n, (c + 1) * kRowChunk), k, largest,
                         threshold, found[c]);
    }
  });
  int64_t size = 0;
  for (const auto& chunk : found) size += chunk.size;
  all.reserve(size);
  for (const auto& chunk : found) all.append(chunk);
  return all;
}

// Leaves the candidates that are among the k best, still in order of position.
template <class K>
void keep_best(Candidates<K>& candidates, Cut<K> cut) {
  K* keys = candidates.keys.data();
  int64_t* indices = candidates.indices.data();
  int64_t kept = 0, equal = 0;
  for (int64_t i = 0; i < candidates.size; ++i) {  // without branches: they would be coin tosses
    const K key = keys[i];
    const bool take = (key > cut.key) | ((key == cut.key) & (equal < cut.equal));
    equal += key == cut.key;
    keys[kept] = key;
    indices[kept] = indices[i];
    kept += take;
  }
  candidates.size = kept;
}

// The positions of those that a cut chooses from a row, in ascending order.
template <class T>
void collect_best(const T* row,  // [N]
                  int64_t n, Cut<Key<T>> cut, bool largest, int64_t* indices) {
  Key<T> keys[kFilterBlock + kFilterSlack];
  uint32_t offsets[kFilterBlock + kFilterSlack];
  int64_t chosen = 0;
  for (int64_t begin = 0; begin < n; begin += kFilterBlock) {
    int64_t kept = 0;
    filter(row + begin, std::min(kFilterBlock, n - begin), largest, cut.key, keys, offsets, &kept);
    for (int64_t i = 0; i < kept; ++i) {
      if (keys[i] > cut.key || cut.equal-- > 0) indices[chosen++] = begin + offsets[i];
    }
  }
}

// The k best of a row, k at least 1, in ascending order of position.
template <class T>
Candidates<Key<T>> select_best(const T* row,  // [N]
                               int64_t n, int64_t k, bool largest) {
  const auto bounds = estimate_bounds(row, n, k, largest);
  auto candidates = find_candidates(row, n, k, largest, bounds.low);
  if (candidates.size < k) candidates = find_candidates(row, n, k, largest, Key<T>{0});
  keep_best(candidates, find_cut(candidates.keys.data(), candidates.size, k, bounds.high));
  return candidates;
}

}  // namespace fastsel::cpu
