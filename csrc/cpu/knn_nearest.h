// What the ways to find neighbours on the CPU share: the problem, the list of the nearest so far, and
// the order in which they come out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/knn.h"

namespace fastsel::cpu {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
struct KnnProblem {
  const T* queries;  // [query_count, dims]
  int64_t query_count;
  const T* points;  // [count, dims]
  int64_t count;
  int64_t dims;
  int64_t k;
  float* distances;  // [query_count, k]
  int64_t* indices;
};

struct Neighbor {
  uint32_t key;  // of the distance
  int64_t index;
  bool operator<(const Neighbor& other) const {
    return key != other.key ? key < other.key : index < other.index;
  }
};

// The k best of the points offered so far.
class Nearest {
 public:
  explicit Nearest(int64_t k) : k_(k) { found_.reserve(most()); }

  void offer(Neighbor point) {
    if (full_ && !(point < worst_)) return;
    found_.push_back(point);
    const auto size = static_cast<int64_t>(found_.size());
    if (full_ ? size >= most() : size >= k_) shrink();
  }

  void clear() {
    found_.clear();
    full_ = false;
  }

  void shrink() {
    if (static_cast<int64_t>(found_.size()) < k_) return;
    std::nth_element(found_.begin(), found_.begin() + (k_ - 1), found_.end());
    found_.resize(k_);
    worst_ = found_.back();
    full_ = true;
  }

  // No point farther than this is wanted; infinite while there are fewer than k.
  float farthest() const { return full_ ? key_distance(worst_.key) : kInfinity; }

  // Whether a point of this index is wanted if it is as far as the farthest.
  bool wants_tie(int64_t index) const { return !full_ || index < worst_.index; }

  std::vector<Neighbor>& found() { return found_; }

 private:
  // Entries before the list is cut: the sooner, the fewer points pass for near.
  int64_t most() const { return k_ + k_ / 2 + 8; }

  int64_t k_;
  bool full_ = false;
  Neighbor worst_{};
  std::vector<Neighbor> found_;
};

// The results of queries from `begin` on, in order.
inline void write(std::vector<Nearest>& lists, int64_t begin, int64_t k, float* distances,
                  int64_t* indices) {
  for (size_t q = 0; q < lists.size(); ++q) {
    lists[q].shrink();
    auto& found = lists[q].found();
    std::sort(found.begin(), found.end());
    const int64_t row = (begin + static_cast<int64_t>(q)) * k;
    for (int64_t i = 0; i < k; ++i) {
      distances[row + i] = key_distance(found[i].key);
      indices[row + i] = found[i].index;
    }
  }
}

}  // namespace fastsel::cpu
