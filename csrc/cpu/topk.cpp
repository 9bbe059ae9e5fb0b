// topk on the CPU: the k best of each row, exact, deterministic (cpu/select.h), sorted by key where
// asked.

#include "topk.h"

#include <utility>

#include "cpu/select.h"

namespace fastsel::cpu {

namespace {

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
  auto candidates = select_best(row, n, k, largest);
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
