// weighted_sample on the CPU.
//
// Without replacement: every thread goes through its part of the row with a reservoir of the n + 1
// smallest keys (core/weighted_sample.h). The largest of them is a threshold that only falls, and
// all but a few items are rejected by a comparison (cpu/weighted_sample_simd.cpp). The keys decide
// the result, not the parts. With replacement: sums of tiles, then a search among the sums and in
// one tile a draw.

#include "weighted_sample.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/weighted_sample.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/weighted_sample_simd.h"

namespace fastsel::cpu {

namespace {

// Keys and probabilities are computed in float, those of float64 weights in double.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

double real(double v) { return v; }
template <class T>
float real(T v) {
  return to_float(v);
}

[[noreturn]] void fail_on_row(int64_t row, const std::string& what) {
  throw std::invalid_argument(message("weighted_sample: ", what, " in row ", row));
}

template <class T>
void check_valid(const T* row,  // [N]
                 int64_t n, int64_t number) {
  for (int64_t i = 0; i < n; ++i) {
    if (!valid_weight(real(row[i])))
      fail_on_row(number, message("weights must be finite and not negative, got ", real(row[i]),
                                  " at ", i));
  }
}

// ---- without replacement ----

template <class T>
void filter(const T* weights, int64_t count, int64_t first, uint64_t seed, uint64_t stream,
            float threshold, WeightCandidates* out) {
  FASTSEL_DISPATCH_ISA(filter_weights, weights, count, first, seed, stream, threshold, out);
}

void filter(const double* weights, int64_t count, int64_t first, uint64_t seed, uint64_t stream,
            float threshold, WeightCandidates* out) {
  out->count = 0;
  out->invalid = false;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t word = item_word(seed, stream, first + i);
    const double w = weights[i];
    out->invalid |= !valid_weight(w);
    if (w > 0 && !(static_cast<double>(word) * 0x1p-32 > static_cast<double>(threshold) * w)) {
      out->words[out->count] = word;
      out->offsets[out->count++] = static_cast<uint32_t>(i);
    }
  }
}

template <class Bits>
struct Drawn {
  Bits key;
  int64_t item;
  bool operator<(const Drawn& other) const {
    return key != other.key ? key < other.key : item < other.item;
  }
};

// What a filter may reject by, of a key: a little more than the quotient it stands for, because the
// key was rounded.
template <class Bits>
float filter_threshold(Bits key) {
  const KeyValue value = key_value(key);
  const double quotient = std::ldexp(value.mantissa * (1 + 0x1p-16), value.exponent);
  constexpr double kLeast = std::numeric_limits<float>::min();
  constexpr double kMost = std::numeric_limits<float>::max();
  if (quotient > kMost) return std::numeric_limits<float>::infinity();
  return static_cast<float>(std::max(quotient, kLeast) * (1 + 0x1p-22));
}

// The `wanted` smallest keys of items [begin, end), in any order; begin is a multiple of 4.
template <class T>
class Reservoir {
 public:
  using Bits = typename RealParts<Real<T>>::Bits;

  Reservoir(const T* row, int64_t wanted, uint64_t seed, int64_t number)
      : row_(row), wanted_(wanted), seed_(seed), number_(number) {}

  void visit(int64_t begin, int64_t end) {
    const uint64_t keys = random_stream(RandomStream::weighted_keys, number_);
    uint32_t words[kWeightBlock + kWeightSlack], offsets[kWeightBlock + kWeightSlack];
    for (int64_t i = begin; i < end; i += kWeightBlock) {
      WeightCandidates found{words, offsets, 0, false};
      filter(row_ + i, std::min(kWeightBlock, end - i), i, seed_, keys, threshold_, &found);
      invalid_ |= found.invalid;
      if (invalid_) return;
      for (int64_t j = 0; j < found.count; ++j) add(i + found.offsets[j], found.words[j]);
      if (static_cast<int64_t>(drawn_.size()) >= 2 * wanted_ + kSlack) shrink();
    }
  }

  void shrink() {
    if (static_cast<int64_t>(drawn_.size()) <= wanted_) return;
    std::nth_element(drawn_.begin(), drawn_.begin() + wanted_ - 1, drawn_.end());
    drawn_.resize(wanted_);
    worst_ = drawn_.back().key;
    threshold_ = filter_threshold(worst_);
  }

  bool invalid() const { return invalid_; }
  std::vector<Drawn<Bits>>& drawn() { return drawn_; }

 private:
  static constexpr int64_t kSlack = 1024;

  void add(int64_t item, uint32_t word) {
    const auto low = [&] {
      return item_word(seed_, random_stream(RandomStream::weighted_low_bits, number_), item);
    };
    const auto w = static_cast<Real<T>>(real(row_[item]));
    const Bits key = quotient_key(exponential_of_word(Real<T>{}, word, low), w);
    if (key < worst_) drawn_.push_back({key, item});  // of equals the first, which came before
  }

  const T* row_;
  int64_t wanted_;
  uint64_t seed_;
  int64_t number_;
  Bits worst_ = static_cast<Bits>(~Bits{0});
  float threshold_ = std::numeric_limits<float>::infinity();
  bool invalid_ = false;
  std::vector<Drawn<Bits>> drawn_;
};

template <class T>
void sample_without(const T* row,  // [N]
                    int64_t items, int64_t n, uint64_t seed, int64_t number,
                    int64_t* indices,  // [n]
                    float* probs) {
  constexpr int64_t kLeastPart = 1 << 15;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(items / kLeastPart, 1, threads);
  const int64_t part = ((items + parts - 1) / parts + 3) & ~int64_t{3};
  std::vector<Reservoir<T>> reservoirs(parts, Reservoir<T>(row, n + 1, seed, number));
  const auto visit = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      reservoirs[p].visit(p * part, std::min(items, (p + 1) * part));
  };
  if (parts == 1) {
    visit(0, 1);
  } else {
    parallel_for(0, parts, 1, visit);
  }
  auto& drawn = reservoirs.front().drawn();
  for (auto& reservoir : reservoirs) {
    if (reservoir.invalid()) check_valid(row, items, number);
    if (&reservoir == &reservoirs.front()) continue;
    drawn.insert(drawn.end(), reservoir.drawn().begin(), reservoir.drawn().end());
  }
  reservoirs.front().shrink();
  const auto found = static_cast<int64_t>(drawn.size());
  if (found < n)
    fail_on_row(number, message("n must be at most the number of positive weights without "
                                "replacement, got ",
                                n, " of ", found));
  std::sort(drawn.begin(), drawn.end());
  for (int64_t i = 0; i < n; ++i) {
    indices[i] = drawn[i].item;
    probs[i] = found == n
                   ? 1.0f
                   : inclusion_probability(real(row[drawn[i].item]), key_value(drawn[n].key));
  }
}

// ---- with replacement ----

template <class T>
void sum_tiles(const T* weights, int64_t count, double* sums, bool* invalid) {
  FASTSEL_DISPATCH_ISA(sum_weights, weights, count, sums, invalid);
}

void sum_tiles(const double* weights, int64_t count, double* sums, bool* invalid) {
  *invalid = false;
  for (int64_t begin = 0; begin < count; begin += kWeightTile) {
    double sum = 0;
    for (int64_t i = begin; i < std::min(count, begin + kWeightTile); ++i) {
      *invalid |= !valid_weight(weights[i]);
      sum += weights[i];
    }
    *sums++ = sum;
  }
}

// Where the sum of the weights first exceeds `target`, which `before` tells of; the last of positive
// weight, should rounding leave the sum below it. A weight of zero is never that place.
template <class T>
int64_t find_in_tile(const T* weights, int64_t begin, int64_t end, double before, double target) {
  int64_t last = begin;
  for (int64_t i = begin; i < end; ++i) {
    const double w = real(weights[i]);
    before += w;
    if (w > 0) last = i;
    if (before > target) return last;
  }
  return last;
}

template <class T>
void sample_with(const T* row,  // [N]
                 int64_t items, int64_t n, uint64_t seed, int64_t number,
                 int64_t* indices,  // [n]
                 float* probs) {
  constexpr int64_t kTilesAPart = 256;
  const int64_t tiles = (items + kWeightTile - 1) / kWeightTile;
  std::vector<double> sums(tiles + 1, 0.0);  // behind them the total
  std::vector<char> invalid(tiles / kTilesAPart + 1, 0);
  parallel_for(0, static_cast<int64_t>(invalid.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kTilesAPart, last = std::min(tiles, first + kTilesAPart);
      if (first >= last) continue;
      bool wrong = false;
      sum_tiles(row + first * kWeightTile,
                std::min(items, last * kWeightTile) - first * kWeightTile, sums.data() + first,
                &wrong);
      invalid[p] = wrong;
    }
  });
  if (std::any_of(invalid.begin(), invalid.end(), [](char wrong) { return wrong != 0; }))
    check_valid(row, items, number);
  double total = 0;
  for (double& sum : sums) total += std::exchange(sum, total);
  if (!(total > 0)) fail_on_row(number, "no weight is positive");
  if (total - total != 0) fail_on_row(number, "the sum of the weights overflows");
  parallel_for(0, n, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const PhiloxWords words = philox(seed, static_cast<uint64_t>(i),
                                       random_stream(RandomStream::weighted_draws, number));
      const double target = uniform(words.x, words.y) * total;
      // The last tile that begins at or before the target and is not empty.
      int64_t tile = std::upper_bound(sums.begin(), sums.end() - 1, target) - sums.begin() - 1;
      while (sums[tile] == sums[tile + 1]) --tile;
      const int64_t item = find_in_tile(
          row, tile * kWeightTile, std::min(items, (tile + 1) * kWeightTile), sums[tile], target);
      indices[i] = item;
      probs[i] = static_cast<float>(real(row[item]) / total);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> weighted_sample_cpu(const Tensor& weights,  // [..., N]
                                               int64_t n, const Tensor& seed, bool replacement) {
  check_weighted_sample_arguments(weights, n, seed, replacement);
  const Tensor x = as_contiguous(weights);
  Tensor indices, probs;
  std::tie(indices, probs) = empty_weighted_sample(x, n);
  const int64_t items = x.size(x.dim() - 1);
  const auto key = static_cast<uint64_t>(*data<int64_t>(seed));
  dispatch_floating_and_double(
      "weighted_sample", "weights", x.scalar_type(), [&]<class T>(Type<T>) {
        if (indices.numel() == 0) return;
        const T* in = data<T>(x);
        int64_t* out = mutable_data<int64_t>(indices);
        float* out_probs = mutable_data<float>(probs);
        const auto sample = replacement ? sample_with<T> : sample_without<T>;
        const int64_t rows = x.numel() / items;
        const auto run = [=](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r)
            sample(in + r * items, items, n, key, r, out + r * n, out_probs + r * n);
        };
        if (rows == 1) {
          run(0, 1);  // threads share the row
        } else {
          parallel_for(0, rows, 4096 / items + 1, run);
        }
      });
  return {indices, probs};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("weighted_sample", TORCH_BOX(&fastsel::cpu::weighted_sample_cpu));
}
