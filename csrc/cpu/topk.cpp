// topk on the CPU: the k best of each row, exact, deterministic, reading the row once.
//
// 1. Sample the row and take from the sample a key that, with a wide margin, more than k values
//    reach: the threshold.
// 2. Filter: one vectorised pass keeps the keys at or above it with their positions, in order; few
//    survive.
// 3. Select exactly among the survivors: the k-th best key, and how many of its equals belong to
//    the result.
// 4. Collect in index order, which settles ties in favour of the lower index; sort by key where
//    asked.
// The sample decides only how much work step 3 has. If it misled (fewer than k survivors), the
// filter runs again and keeps everything. The result is a pure function of the input: no thread
// count or chunk size shows in it.

#include "topk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "core/topk_key.h"
#include "cpu/isa.h"
#include "cpu/topk_simd.h"

namespace fastsel::cpu {

namespace {

// Below this many values a row is selected from directly: the sample would cost more than it saves.
constexpr int64_t kSmallRow = 2048;
// One row is split over threads in pieces of this many values.
constexpr int64_t kChunk = 1 << 16;

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

void filter(const double* values, int64_t count, bool largest, uint64_t threshold, uint64_t* keys,
            uint32_t* offsets, int64_t* kept) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[n] = topk_key(values[i], largest);
    offsets[n] = static_cast<uint32_t>(i);
    n += keys[n] >= threshold;
  }
  *kept = n;
}

void split(const uint32_t* keys, int64_t count, uint32_t pivot, KeySplit<uint32_t>& out) {
  FASTSEL_DISPATCH_ISA(split_keys, keys, count, pivot, out);
}

void split(const uint64_t* keys, int64_t count, uint64_t pivot, KeySplit<uint64_t>& out) {
  for (int64_t i = 0; i < count; ++i) {
    out.above[out.above_count] = out.below[out.below_count] = keys[i];
    out.above_count += keys[i] > pivot;
    out.below_count += keys[i] < pivot;
  }
}

// Some place in [0, range), the same every time.
uint64_t scattered(uint32_t i, uint64_t range) {
  uint32_t hash = i * 0x9E3779B9u;
  hash = (hash ^ hash >> 15) * 0x85EBCA6Bu;
  return (hash ^ hash >> 13) * range >> 32;
}

// The k-th best of some keys, and how many keys equal to it are among the k best.
template <class K>
struct Cut {
  K key;
  int64_t equal;
};

// A median of nine keys, others each round.
template <class K>
K choose_pivot(const K* keys, int64_t size, int round) {
  K sample[9];
  for (int i = 0; i < 9; ++i) sample[i] = keys[scattered(9 * round + i, size)];
  std::nth_element(sample, sample + 4, sample + 9);
  return sample[4];
}

// Quickselect: splits the keys at a pivot and goes on with the side that holds the k-th best.
// `guess` is the first pivot. std::nth_element ends it, and takes over where the pivots keep
// falling badly.
template <class K>
Cut<K> find_cut(const K* keys, int64_t size, int64_t k, std::optional<K> guess = std::nullopt) {
  constexpr int64_t kFew = 64;
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
  std::vector<K> rest(keys, keys + size);
  const auto kth = rest.begin() + (k - 1);
  std::nth_element(rest.begin(), kth, rest.end(), std::greater<K>());
  const int64_t better = std::count_if(rest.begin(), kth, [=](K key) { return key > *kth; });
  return {*kth, k - better};
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
  if (n < 2 * kChunk || torch::stable::get_num_threads() == 1) {
    collect_candidates(values, 0, n, k, largest, threshold, all);
    return all;
  }
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<Candidates<Key<T>>> found(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      collect_candidates(values, c * kChunk, std::min(n, (c + 1) * kChunk), k, largest, threshold,
                         found[c]);
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

// Orders the chosen by key, best first. Both sorts are stable, so equal keys stay in order of
// position: insertion for a few, for more a radix sort from the last digit.
template <class K>
void sort_by_key(Candidates<K>& chosen) {
  constexpr int kDigits = sizeof(K);
  constexpr int64_t kFew = 48;
  const int64_t size = chosen.size;
  if (size <= kFew) {
    K* keys = chosen.keys.data();
    int64_t* indices = chosen.indices.data();
    for (int64_t i = 1; i < size; ++i) {
      const K key = keys[i];
      const int64_t index = indices[i];
      int64_t at = i;
      for (; at > 0 && keys[at - 1] < key; --at) {
        keys[at] = keys[at - 1];
        indices[at] = indices[at - 1];
      }
      keys[at] = key;
      indices[at] = index;
    }
    return;
  }
  int64_t counts[kDigits][256] = {};
  for (int64_t i = 0; i < size; ++i) {
    for (int d = 0; d < kDigits; ++d)
      ++counts[d][static_cast<uint8_t>(~chosen.keys.data()[i] >> 8 * d)];
  }
  Candidates<K> sorted;
  sorted.reserve(size);
  for (int d = 0; d < kDigits; ++d) {
    int64_t start = 0;
    bool one_digit = false;
    for (int64_t& count : counts[d]) {
      one_digit |= count == size;
      start += std::exchange(count, start);
    }
    if (one_digit) continue;
    for (int64_t i = 0; i < size; ++i) {
      const K key = chosen.keys.data()[i];
      const int64_t at = counts[d][static_cast<uint8_t>(~key >> 8 * d)]++;
      sorted.keys.data()[at] = key;
      sorted.indices.data()[at] = chosen.indices.data()[i];
    }
    std::swap(chosen.keys, sorted.keys);
    std::swap(chosen.indices, sorted.indices);
  }
}

template <class T>
void topk_row(const T* row,  // [N]
              int64_t n, int64_t k, bool largest, bool sorted,
              T* values,  // [k]
              int64_t* indices) {
  const auto bounds = estimate_bounds(row, n, k, largest);
  auto candidates = find_candidates(row, n, k, largest, bounds.low);
  if (candidates.size < k) candidates = find_candidates(row, n, k, largest, Key<T>{0});
  keep_best(candidates, find_cut(candidates.keys.data(), candidates.size, k, bounds.high));
  if (sorted) sort_by_key(candidates);
  for (int64_t i = 0; i < k; ++i) {
    indices[i] = candidates.indices.data()[i];
    values[i] = row[indices[i]];
  }
}

template <class T>
void topk_rows(const Tensor& scores, int64_t n, int64_t k, bool largest, bool sorted,
               const Tensor& values, const Tensor& indices) {
  const int64_t rows = scores.numel() / n;
  const T* in = data<T>(scores);
  T* out = mutable_data<T>(values);
  int64_t* out_indices = mutable_data<int64_t>(indices);
  const auto run = [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      topk_row(in + r * n, n, k, largest, sorted, out + r * k, out_indices + r * k);
    }
  };
  if (rows == 1) {
    run(0, 1);  // threads share the row
  } else {
    torch::stable::parallel_for(0, rows, kSmallRow / n + 1, run);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> topk_cpu(const Tensor& scores,  // [..., N]
                                    int64_t k, bool largest, bool sorted) {
  check_topk_arguments(scores, k);
  const Tensor x = as_contiguous(scores);
  Tensor values, indices;  // not a structured binding: clang captures none in a lambda
  std::tie(values, indices) = empty_topk(x, k);
  const int64_t n = x.size(x.dim() - 1);
  const bool nothing = k == 0 || x.numel() == 0;
  dispatch_floating_and_double("topk", "scores", x.scalar_type(), [&](auto tag) {
    if (!nothing)
      topk_rows<typename decltype(tag)::type>(x, n, k, largest, sorted, values, indices);
  });
  return {values, indices};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) { m.impl("topk", TORCH_BOX(&fastsel::cpu::topk_cpu)); }
