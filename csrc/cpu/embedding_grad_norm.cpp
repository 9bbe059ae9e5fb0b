// embedding_grad_norm_sq on the CPU: which positions of a sample hold the same token, threads, and
// the choice of instruction set. The loops over gradients are in embedding_grad_norm_simd.cpp.

#include "cpu/embedding_grad_norm_simd.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sum_tiles.h"
#include "grad_norm.h"
#include "grad_norm_layout.h"

namespace fastsel::cpu {

namespace {

// Positions in the order of their tokens, of which only equal ones matter: by insertion for a few,
// else a radix sort from the last digit, skipping digits that all tokens share. Both are stable.
template <class Index>
void sort_positions(const Index* tokens, std::vector<int32_t>& order, std::vector<int32_t>& other) {
  constexpr size_t kFew = 32;
  const size_t size = order.size();
  if (size <= kFew) {
    for (size_t i = 1; i < size; ++i) {
      const int32_t position = order[i];
      size_t at = i;
      for (; at > 0 && tokens[order[at - 1]] > tokens[position]; --at) order[at] = order[at - 1];
      order[at] = position;
    }
    return;
  }
  const auto bits = [&](int32_t position) { return static_cast<uint64_t>(tokens[position]); };
  uint64_t varying = 0;
  for (const int32_t position : order) varying |= bits(position) ^ bits(order[0]);
  other.resize(size);
  for (int shift = 0; shift < 64; shift += 8) {
    if ((varying >> shift & 0xff) == 0) continue;
    size_t starts[256] = {};
    for (const int32_t position : order) ++starts[bits(position) >> shift & 0xff];
    size_t start = 0;
    for (size_t& count : starts) start += std::exchange(count, start);
    for (const int32_t position : order) other[starts[bits(position) >> shift & 0xff]++] = position;
    std::swap(order, other);
  }
}

// Chains the positions of each token of one sample, in ascending order.
template <class Index>
void link_equal_tokens(const Index* tokens,  // [T]
                       int64_t positions, int64_t padding_idx, std::vector<int32_t>& order,
                       std::vector<int32_t>& other,
                       int32_t* links) {  // [T]
  order.clear();
  for (int32_t p = 0; p < positions; ++p) {
    if (tokens[p] == padding_idx) {
      links[p] = later_link(0);
    } else {
      order.push_back(p);
    }
  }
  sort_positions(tokens, order, other);
  bool first = true;
  for (size_t i = 0; i < order.size(); ++i) {
    const bool last = i + 1 == order.size() || tokens[order[i + 1]] != tokens[order[i]];
    const int32_t next = last ? 0 : order[i + 1];
    links[order[i]] = first ? first_link(next) : later_link(next);
    first = last;
  }
}

template <class Index>
void link_samples(const Tensor& indices, int64_t positions, int64_t padding_idx,
                  std::vector<int32_t>& links) {  // [B, T]
  const Index* tokens = data<Index>(indices);
  int32_t* out = links.data();
  // A token takes some twenty times as long to sort as an element to add.
  torch::stable::parallel_for(
      0, indices.size(0), tiles_per_thread(positions, 20), [=](int64_t begin, int64_t end) {
        std::vector<int32_t> order, other;
        for (int64_t sample = begin; sample < end; ++sample) {
          const int64_t at = sample * positions;
          link_equal_tokens(tokens + at, positions, padding_idx, order, other, out + at);
        }
      });
}

// float64, for checking: one plain loop a token.
void embedding_tiles(const EmbeddingArguments<double>& a, const int32_t* links,
                     const ColumnTiles& t, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / t.tiles, first = i % t.tiles * t.width;
    const int64_t width = std::min(t.width, a.columns - first);
    const double* grads = a.grad_outputs + sample * a.grad_strides.batch + first;
    const int32_t* chain = links + sample * a.positions;
    t.squares[i] = 0;
    for (int64_t p = 0; p < a.positions; ++p) {
      if (!is_first(chain[p])) continue;
      for (int64_t j = 0; j < width; ++j) {
        double sum = grads[p * a.grad_strides.position + j];
        for (int64_t q = next_position(chain[p]); q != 0; q = next_position(chain[q]))
          sum += grads[q * a.grad_strides.position + j];
        t.squares[i] += sum * sum;
      }
    }
  }
}

template <class T>
void embedding_tiles(const EmbeddingArguments<T>& a, const int32_t* links, const ColumnTiles& t,
                     int64_t begin, int64_t end) {
  FASTSEL_DISPATCH_ISA(embedding_tiles<T>, a, links, t, begin, end);
}

}  // namespace

Tensor embedding_grad_norm_sq_cpu(const Tensor& indices,       // [B, T...]
                                  const Tensor& grad_outputs,  // [B, T..., D]
                                  int64_t padding_idx) {
  const char* op = "embedding_grad_norm_sq";
  check_embedding_arguments(op, indices, grad_outputs);
  const Tensor tokens = as_contiguous(indices), grads = with_rows(grad_outputs);
  const int64_t positions = position_count(grads);
  FASTSEL_CHECK(positions <= INT32_MAX, op, ": indices must have at most ", INT32_MAX,
                " positions a sample, got ", positions);
  const Tensor norms = empty_norms(grads);
  dispatch_floating_and_double(op, "grad_outputs", grads.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::vector<int32_t> links(static_cast<size_t>(grads.size(0) * positions));
    if (tokens.scalar_type() == ScalarType::Int) {
      link_samples<int32_t>(tokens, positions, padding_idx, links);
    } else {
      link_samples<int64_t>(tokens, positions, padding_idx, links);
    }
    const auto a = embedding_arguments<T>(grads);
    sum_tiles(a, kNarrowestTile, mutable_data<NormType<T>>(norms),
              [&](const ColumnTiles& t, int64_t begin, int64_t end) {
                embedding_tiles(a, links.data(), t, begin, end);
              });
  });
  return norms;
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("embedding_grad_norm_sq", TORCH_BOX(&fastsel::cpu::embedding_grad_norm_sq_cpu));
}
