// neighbor_sample on the CPU: draws from the cumulated weights of the anchors, then one pass over
// all the anchors' neighbours, which adds up the weight of each id that was drawn.

#include "neighbor_sample.h"

#include <algorithm>
#include <bit>

#include "core/random.h"
#include "core/weighted_sample.h"
#include "cpu/parallel.h"

namespace fastsel::cpu {

namespace {

double weight_of(double v) { return v; }
template <class T>
double weight_of(T v) {
  return to_float(v);
}

// The distinct ids drawn, and a weight for each: a hash table of twice their number at least.
class DrawnIds {
 public:
  explicit DrawnIds(int64_t most)
      : shift_(64 - std::bit_width(static_cast<uint64_t>(2 * most))),
        ids_(size_t{1} << (64 - shift_), -1),
        weights_(ids_.size(), 0.0) {}

  void insert(int64_t id) { ids_[slot(id)] = id; }

  // Adds to the weight of an id, if it was drawn.
  void add(int64_t id, double weight) {
    const size_t at = slot(id);
    if (ids_[at] == id) weights_[at] += weight;
  }

  double weight(int64_t id) const { return weights_[slot(id)]; }

 private:
  // Where the id is, or would be.
  size_t slot(int64_t id) const {
    size_t at = static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> shift_;
    while (ids_[at] != -1 && ids_[at] != id) at = (at + 1) & (ids_.size() - 1);
    return at;
  }

  int shift_;
  std::vector<int64_t> ids_;
  std::vector<double> weights_;
};

template <class Id, class T>
void sample(const Tensor& table, const Tensor& anchors, const Tensor& anchor_weights, int64_t n,
            uint64_t seed, int64_t* indices, float* probs) {
  const int64_t rows = table.size(0), width = table.size(1), count = anchors.size(0);
  const Id* ids = data<Id>(table);
  const int64_t* anchor = data<int64_t>(anchors);
  const T* weights = data<T>(anchor_weights);

  std::vector<double> sums(count);
  double total = 0;
  for (int64_t a = 0; a < count; ++a) {
    const double w = weight_of(weights[a]);
    if (!valid_weight(w))
      throw std::invalid_argument(message(
          "neighbor_sample: anchor_weights must be finite and not negative, got ", w, " at ", a));
    if (anchor[a] < 0 || anchor[a] >= rows)
      throw std::out_of_range(message("neighbor_sample: anchors must be between 0 and ", rows - 1,
                                      ", got ", anchor[a], " at ", a));
    sums[a] = total += w;
  }
  if (!(total > 0))
    throw std::invalid_argument("neighbor_sample: no weight of anchor_weights is positive");

  DrawnIds drawn(n);
  for (int64_t i = 0; i < n; ++i) {
    const PhiloxWords words =
        philox(seed, static_cast<uint64_t>(i), random_stream(RandomStream::neighbor_draws, 0));
    const double target = uniform(words.x, words.y) * total;
    const int64_t a = std::upper_bound(sums.begin(), sums.end(), target) - sums.begin();
    indices[i] = ids[anchor[a] * width + uniform_index(words.z, words.w, width)];
    drawn.insert(indices[i]);
  }
  for (int64_t a = 0; a < count; ++a) {
    const double w = weight_of(weights[a]);
    const Id* row = ids + anchor[a] * width;
    for (int64_t j = 0; j < width; ++j) {
      if (row[j] < 0 || row[j] >= rows)
        throw std::out_of_range(message("neighbor_sample: table must hold ids between 0 and ",
                                        rows - 1, ", got ", row[j], " at [", anchor[a], ", ", j,
                                        "]"));
      drawn.add(row[j], w);
    }
  }
  const double each = total * static_cast<double>(width);
  for (int64_t i = 0; i < n; ++i) probs[i] = static_cast<float>(drawn.weight(indices[i]) / each);
}

}  // namespace

std::tuple<Tensor, Tensor> neighbor_sample_cpu(const Tensor& table,           // [N, K]
                                               const Tensor& anchors,         // [A]
                                               const Tensor& anchor_weights,  // [A]
                                               int64_t n, const Tensor& seed) {
  check_neighbor_sample_arguments(table, anchors, anchor_weights, n, seed);
  Tensor indices, probs;
  std::tie(indices, probs) = empty_neighbor_sample(table, n);
  const Tensor ids = as_contiguous(table), rows = as_contiguous(anchors);
  const Tensor weights = as_contiguous(anchor_weights);
  const auto key = static_cast<uint64_t>(*data<int64_t>(seed));
  dispatch_floating_and_double("neighbor_sample", "anchor_weights", weights.scalar_type(),
                               [&]<class T>(Type<T>) {
                                 if (n == 0) return;
                                 int64_t* out = mutable_data<int64_t>(indices);
                                 float* out_probs = mutable_data<float>(probs);
                                 if (ids.scalar_type() == ScalarType::Long) {
                                   sample<int64_t, T>(ids, rows, weights, n, key, out, out_probs);
                                 } else {
                                   sample<int32_t, T>(ids, rows, weights, n, key, out, out_probs);
                                 }
                               });
  return {indices, probs};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("neighbor_sample", TORCH_BOX(&fastsel::cpu::neighbor_sample_cpu));
}
