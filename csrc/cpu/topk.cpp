// topk on the CPU: the k best of each row, exact, deterministic, reading the row once.
//
// 1. Sample the row and take from the sample a key that, with a wide margin, more than k values
// reach: the threshold.
// 2. Filter: one vectorised pass keeps the keys at or above it with their positions, in order; few
// survive.
// 3. Select exactly among the survivors: the k-th best key, and how many of its equals belong to
// the result.
// 4. Collect in index order, which settles ties in favour of the lower index; sort by key where
// asked. The sample decides only how much work step 3 has. If it misled (fewer than k survivors),
// the filter runs again and keeps everything. The result is a pure function of the input: no thread
// count or chunk size shows in it.

#include "topk.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "core/philox.h"
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

template <class K>
struct Candidates {
  std::vector<K> keys;
  std::vector<int64_t> indices;  // ascending

  void append(const Candidates& other) {
    keys.insert(keys.end(), other.keys.begin(), other.keys.end());
    indices.insert(indices.end(), other.indices.begin(), other.indices.end());
  }
};

// Keys between which the k-th best very likely lies.
template <class K>
struct Bounds {
  K low = 0;
  K high = ~K{0};
};

// The k-th best of a row estimated from a sample of it, four standard deviations to either side.
// One value is drawn from each of the sample's strata, at a pseudo-random place, so that a periodic
// row misleads no more than a shuffled one.
template <class T>
Bounds<Key<T>> estimate_bounds(const T* values, int64_t n, int64_t k, bool largest) {
  if (n <= kSmallRow) return {};
  const int64_t size = std::clamp<int64_t>(n / 64, 1024, 16384), stratum = n / size;
  std::vector<Key<T>> sample(size);
  for (int64_t i = 0; i < size; ++i) {
    const uint64_t offset = philox(0, i).x % static_cast<uint64_t>(stratum);
    sample[i] = key_of(values[i * stratum + static_cast<int64_t>(offset)], largest);
  }
  const double share = static_cast<double>(k) / n, expected = share * size;
  const double margin = 4 * std::sqrt(expected * (1 - share)) + 4;
  Bounds<Key<T>> bounds;
  auto best_first = std::greater<Key<T>>();
  const int64_t below = static_cast<int64_t>(expected + margin),
                above = static_cast<int64_t>(expected - margin);
  if (below < size) {
    std::nth_element(sample.begin(), sample.begin() + below, sample.end(), best_first);
    bounds.low = sample[below];
  }
  if (above >= 0) {
    const auto end = sample.begin() + std::min(below, size);
    std::nth_element(sample.begin(), sample.begin() + above, end, best_first);
    bounds.high = sample[above];
  }
  return bounds;
}

// Appends the candidates of values[begin, end). Of those equal to the threshold only the first k
// can be chosen, so a row of equal values does not pile them up.
template <class T>
void collect_candidates(const T* values, int64_t begin, int64_t end, int64_t k, bool largest,
                        Key<T> threshold, Candidates<Key<T>>& out) {
  Key<T> keys[kFilterBlock + kFilterSlack];
  uint32_t offsets[kFilterBlock + kFilterSlack];
  int64_t equal = 0;
  const Key<T> first_threshold = threshold;
  for (int64_t i = begin; i < end; i += kFilterBlock) {
    int64_t kept = 0;
    filter(values + i, std::min(kFilterBlock, end - i), largest, threshold, keys, offsets, &kept);
    out.keys.insert(out.keys.end(), keys, keys + kept);
    for (int64_t j = 0; j < kept; ++j) out.indices.push_back(i + offsets[j]);
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
  for (const auto& chunk : found) all.append(chunk);
  return all;
}

// The k-th best key, and how many keys equal to it are among the k best.
template <class K>
struct Cut {
  K key;
  int64_t equal;
};

template <class K>
Cut<K> find_cut(const std::vector<K>& keys, int64_t k, K high) {
  // Most survivors are surely in; only those in the band up to `high` have to be put in order.
  std::vector<K> band;
  int64_t above = std::count_if(keys.begin(), keys.end(), [=](K key) { return key > high; });
  if (above >= k) {
    band = keys;
    above = 0;
  } else {
    std::copy_if(keys.begin(), keys.end(), std::back_inserter(band),
                 [=](K key) { return key <= high; });
  }
  const auto kth = band.begin() + (k - above - 1);
  std::nth_element(band.begin(), kth, band.end(), std::greater<K>());
  const int64_t better = std::count_if(band.begin(), kth, [=](K key) { return key > *kth; });
  return {*kth, k - above - better};
}

// Puts the chosen, which stand in index order, in order of their keys, best first; equal keys stay
// in index order.
template <class K>
void sort_by_key(std::vector<K>& keys, std::vector<int64_t>& indices) {
  std::vector<std::pair<K, int64_t>> pairs(keys.size());
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i] = {static_cast<K>(~keys[i]), indices[i]};
  std::sort(pairs.begin(), pairs.end());
  for (size_t i = 0; i < pairs.size(); ++i) indices[i] = pairs[i].second;
}

template <class T>
void topk_row(const T* row,  // [N]
              int64_t n, int64_t k, bool largest, bool sorted,
              T* values,  // [k]
              int64_t* indices) {
  if (k == 0) return;
  const auto bounds = estimate_bounds(row, n, k, largest);
  auto candidates = find_candidates(row, n, k, largest, bounds.low);
  if (static_cast<int64_t>(candidates.keys.size()) < k) {
    candidates = find_candidates(row, n, k, largest, Key<T>{0});
  }
  const auto cut = find_cut(candidates.keys, k, bounds.high);
  std::vector<Key<T>> keys;
  std::vector<int64_t> chosen;
  keys.reserve(k);
  chosen.reserve(k);
  int64_t equal_left = cut.equal;
  for (size_t i = 0; i < candidates.keys.size(); ++i) {
    const Key<T> key = candidates.keys[i];
    if (key < cut.key || (key == cut.key && equal_left-- <= 0)) continue;
    keys.push_back(key);
    chosen.push_back(candidates.indices[i]);
  }
  if (sorted) sort_by_key(keys, chosen);
  for (int64_t i = 0; i < k; ++i) {
    indices[i] = chosen[i];
    values[i] = row[chosen[i]];
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
  const Tensor x = torch::stable::contiguous(scores);
  const auto [values, indices] = empty_topk(x, k);
  const int64_t n = x.size(x.dim() - 1);
  const bool nothing = k == 0 || x.numel() == 0;
  if (x.scalar_type() == ScalarType::Double) {
    if (!nothing) topk_rows<double>(x, n, k, largest, sorted, values, indices);
    return {values, indices};
  }
  const Tensor &out = values,
               &positions =
                   indices;  // structured bindings cannot be captured before C++20's defect fix
  dispatch_floating("topk", "scores", x.scalar_type(), [&](auto tag) {
    if (!nothing) topk_rows<typename decltype(tag)::type>(x, n, k, largest, sorted, out, positions);
  });
  return {values, indices};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) { m.impl("topk", TORCH_BOX(&fastsel::cpu::topk_cpu)); }
