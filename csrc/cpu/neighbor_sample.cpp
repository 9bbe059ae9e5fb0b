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

  void insert(int64_t id) {
    if (id >= 0) ids_[slot(id)] = id;
  }

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

// The anchors of a call, whose weights add up.
template <class Id, class T>
class Anchors {
 public:
  Anchors(const char* op, const Tensor& table, const Tensor& anchors, const Tensor& weights)
      : op_(op),
        ids_(data<Id>(table)),
        rows_(table.size(0)),
        width_(table.size(1)),
        anchors_(data<int64_t>(anchors)),
        weights_(data<T>(weights)),
        sums_(anchors.size(0)) {
    for (size_t a = 0; a < sums_.size(); ++a) {
      const double w = weight_of(weights_[a]);
      if (!valid_weight(w))
        throw std::invalid_argument(
            message(op, ": anchor_weights must be finite and not negative, got ", w, " at ", a));
      if (anchors_[a] < 0 || anchors_[a] >= rows_)
        throw std::out_of_range(message(op, ": anchors must be between 0 and ", rows_ - 1, ", got ",
                                        anchors_[a], " at ", a));
      sums_[a] = total_ += w;
    }
    if (!(total_ > 0))
      throw std::invalid_argument(message(op, ": no weight of anchor_weights is positive"));
  }

  int64_t draw(uint64_t seed, int64_t number) const {
    const PhiloxWords words =
        philox(seed, static_cast<uint64_t>(number), random_stream(RandomStream::neighbor_draws, 0));
    const double target = uniform(words.x, words.y) * total_;
    const int64_t a = std::upper_bound(sums_.begin(), sums_.end(), target) - sums_.begin();
    return ids_[anchors_[a] * width_ + uniform_index(words.z, words.w, width_)];
  }

  // How probable each id is to be drawn, whichever anchor it comes from.
  void probs(const int64_t* ids, int64_t n, float* out) const {
    DrawnIds drawn(n);
    for (int64_t i = 0; i < n; ++i) drawn.insert(ids[i]);
    for (size_t a = 0; a < sums_.size(); ++a) {
      const double w = weight_of(weights_[a]);
      const Id* row = ids_ + anchors_[a] * width_;
      for (int64_t j = 0; j < width_; ++j) {
        if (row[j] < 0 || row[j] >= rows_)
          throw std::out_of_range(message(op_, ": table must hold ids between 0 and ", rows_ - 1,
                                          ", got ", row[j], " at [", anchors_[a], ", ", j, "]"));
        drawn.add(row[j], w);
      }
    }
    const double each = total_ * static_cast<double>(width_);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(drawn.weight(ids[i]) / each);
  }

 private:
  const char* op_;
  const Id* ids_;  // [rows, width]
  int64_t rows_, width_;
  const int64_t* anchors_;
  const T* weights_;
  std::vector<double> sums_;
  double total_ = 0;
};

// f(anchors) with the anchors of the table's and the weights' types.
template <class F>
void with_anchors(const char* op, const Tensor& table, const Tensor& anchors,
                  const Tensor& anchor_weights, F&& f) {
  const Tensor ids = as_contiguous(table), rows = as_contiguous(anchors);
  const Tensor weights = as_contiguous(anchor_weights);
  dispatch_floating_and_double(op, "anchor_weights", weights.scalar_type(), [&]<class T>(Type<T>) {
    if (ids.scalar_type() == ScalarType::Long) {
      f(Anchors<int64_t, T>(op, ids, rows, weights));
    } else {
      f(Anchors<int32_t, T>(op, ids, rows, weights));
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> neighbor_sample_cpu(const Tensor& table,           // [N, K]
                                               const Tensor& anchors,         // [A]
                                               const Tensor& anchor_weights,  // [A]
                                               int64_t n, const Tensor& seed) {
  check_neighbor_sample_arguments(table, anchors, anchor_weights, n, seed);
  Tensor indices, probs;
  std::tie(indices, probs) = empty_neighbor_sample(table, n);
  if (n == 0) return {indices, probs};
  with_anchors("neighbor_sample", table, anchors, anchor_weights, [&](const auto& from) {
    int64_t* out = mutable_data<int64_t>(indices);
    const auto key = static_cast<uint64_t>(*data<int64_t>(seed));
    for (int64_t i = 0; i < n; ++i) out[i] = from.draw(key, i);
    from.probs(out, n, mutable_data<float>(probs));
  });
  return {indices, probs};
}

Tensor neighbor_probs_cpu(const Tensor& table,           // [N, K]
                          const Tensor& anchors,         // [A]
                          const Tensor& anchor_weights,  // [A]
                          const Tensor& ids) {           // [n]
  check_neighbor_probs_arguments(table, anchors, anchor_weights, ids);
  const Tensor wanted = as_contiguous(ids);
  const int64_t n = wanted.numel();
  const Tensor probs = empty({n}, ScalarType::Float, ids);
  if (n == 0) return probs;
  const int64_t* values = data<int64_t>(wanted);
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] < 0 || values[i] >= table.size(0))
      throw std::out_of_range(message("neighbor_probs: ids must be between 0 and ",
                                      table.size(0) - 1, ", got ", values[i], " at ", i));
  }
  with_anchors("neighbor_probs", table, anchors, anchor_weights,
               [&](const auto& from) { from.probs(values, n, mutable_data<float>(probs)); });
  return probs;
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) {
  m.impl("neighbor_sample", TORCH_BOX(&fastsel::cpu::neighbor_sample_cpu));
  m.impl("neighbor_probs", TORCH_BOX(&fastsel::cpu::neighbor_probs_cpu));
}
