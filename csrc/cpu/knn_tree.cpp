// A k-d tree (Friedman, Bentley, Finkel: "An algorithm for finding best matches in logarithmic
// expected time", 1977) whose leaves are panels that vectors compare at once.
//
// Every node is the box of its points, halved at the median of its longest side. A query goes to the
// nearer half first, and leaves out boxes that are farther than the k-th best point so far. Nothing
// is rounded but distances, by shares of themselves, so bounds with a little room keep it exact.

#include "cpu/knn_tree.h"

#include <cmath>
#include <memory>
#include <numeric>

#include "cpu/isa.h"
#include "cpu/knn_simd.h"
#include "cpu/parallel.h"

namespace fastsel::cpu {

namespace {

// Up to so many dimensions boxes leave out most points; of fewer points or queries it does not pay
// to build a tree.
constexpr int64_t kTreeDims = 8;
constexpr int64_t kTreePoints = 4096;
constexpr int64_t kTreeQueries = 256;

// Values up to this can be squared and added in float.
constexpr float kMostValue = 1e18f;

// Room for the rounding of distances and bounds.
constexpr float kShorter = 1 - 0x1p-20f, kLonger = 1 + 0x1p-20f;

constexpr int64_t kLeafPanels = 2;
constexpr int64_t kLeaf = kLeafPanels * kKnnPanel;

struct Node {
  float low[kTreeDims], high[kTreeDims];
  int64_t begin, end;  // of the ordered points; of a leaf at most kLeaf
  int64_t least;       // index among them
  int64_t left;        // the other child follows it; 0 of a leaf
  int64_t panel;       // a leaf's first
};

// A box that is still to be looked at, and how far it is at least.
struct Visit {
  float bound;
  int64_t node;
};

class Tree {
 public:
  Tree(std::vector<float> points, int64_t dims)  // [count, dims]
      : points_(std::move(points)), dims_(dims), order_(points_.size() / dims) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    const auto count = static_cast<int64_t>(order_.size());
    nodes_.reserve(4 * (count / kLeaf + 1));
    nodes_.push_back(box(0, count));
    for (size_t n = 0; n < nodes_.size(); ++n) split(n);
    pack();
  }

  // Offers to `nearest` every point that can be among the k best. `exact` gives a point's distance.
  template <class Exact>
  void search(const float* query, std::vector<Visit>& stack, Nearest& nearest,
              Exact&& exact) const {
    uint32_t offsets[kLeaf];
    stack.assign(1, {0, 0});
    while (!stack.empty()) {
      const Visit next = stack.back();
      stack.pop_back();
      if (out_of_reach(next, nearest)) continue;
      const Node& node = nodes_[next.node];
      if (node.left == 0) {
        KnnHits hits{offsets, 0};
        FASTSEL_DISPATCH_ISA(knn_leaf, panels_.get() + node.panel * dims_ * kKnnPanel,
                             node.end - node.begin, dims_, query,
                             nearest.farthest() * kLonger + underflow_room(dims_), &hits);
        for (int64_t h = 0; h < hits.count; ++h) {
          const int64_t point = order_[node.begin + hits.offsets[h]];
          nearest.offer({distance_key(exact(point)), point});
        }
        if (hits.count > 0) nearest.shrink();
        continue;
      }
      Visit near{bound(node.left, query), node.left},
          far{bound(node.left + 1, query), node.left + 1};
      if (far.bound < near.bound ||
          (far.bound == near.bound && nodes_[far.node].least < nodes_[near.node].least))
        std::swap(near, far);
      if (!out_of_reach(far, nearest)) stack.push_back(far);
      stack.push_back(near);
    }
  }

  // The points in the order of their leaves: neighbours stand near each other.
  const std::vector<int64_t>& order() const { return order_; }

 private:
  bool out_of_reach(const Visit& visit, const Nearest& nearest) const {
    const float farthest = nearest.farthest();
    if (visit.bound > farthest) return true;
    return visit.bound == farthest && !nearest.wants_tie(nodes_[visit.node].least);
  }

  float bound(int64_t n, const float* query) const {
    const Node& node = nodes_[n];
    float sum = 0;
    for (int64_t d = 0; d < dims_; ++d) {
      const float outside =
          std::max(std::max(node.low[d] - query[d], query[d] - node.high[d]), 0.0f);
      sum += outside * outside;
    }
    return std::max(sum * kShorter - underflow_room(dims_), 0.0f);
  }

  Node box(int64_t begin, int64_t end) const {
    Node node{};
    node.begin = begin;
    node.end = end;
    node.least = std::numeric_limits<int64_t>::max();
    std::fill_n(node.low, kTreeDims, kInfinity);
    std::fill_n(node.high, kTreeDims, -kInfinity);
    for (int64_t i = begin; i < end; ++i) {
      node.least = std::min(node.least, order_[i]);
      for (int64_t d = 0; d < dims_; ++d) {
        const float value = points_[order_[i] * dims_ + d];
        node.low[d] = std::min(node.low[d], value);
        node.high[d] = std::max(node.high[d], value);
      }
    }
    return node;
  }

  void split(size_t n) {
    const int64_t begin = nodes_[n].begin, end = nodes_[n].end;
    if (end - begin <= kLeaf) {
      std::sort(order_.begin() + begin,
                order_.begin() + end);  // of equals the first is offered first
      return;
    }
    int64_t side = 0;
    for (int64_t d = 1; d < dims_; ++d) {
      if (nodes_[n].high[d] - nodes_[n].low[d] > nodes_[n].high[side] - nodes_[n].low[side])
        side = d;
    }
    // Whole leaves on the left.
    const int64_t half = ((end - begin) / 2 + kLeaf - 1) / kLeaf * kLeaf, middle = begin + half;
    const auto value = [&](int64_t point) { return points_[point * dims_ + side]; };
    std::nth_element(
        order_.begin() + begin, order_.begin() + middle, order_.begin() + end,
        [&](int64_t a, int64_t b) { return value(a) != value(b) ? value(a) < value(b) : a < b; });
    nodes_[n].left = static_cast<int64_t>(nodes_.size());
    nodes_.push_back(box(begin, middle));
    nodes_.push_back(box(middle, end));
  }

  void pack() {
    int64_t panels = 0;
    for (Node& node : nodes_) {
      if (node.left != 0) continue;
      node.panel = panels;
      panels += kLeafPanels;
    }
    panels_.reset(new float[panels * dims_ * kKnnPanel]());
    for (const Node& node : nodes_) {
      if (node.left != 0) continue;
      for (int64_t i = node.begin; i < node.end; ++i) {
        const int64_t at = i - node.begin;
        float* panel = panels_.get() + (node.panel + at / kKnnPanel) * dims_ * kKnnPanel;
        for (int64_t d = 0; d < dims_; ++d)
          panel[d * kKnnPanel + at % kKnnPanel] = points_[order_[i] * dims_ + d];
      }
    }
  }

  std::vector<float> points_;
  int64_t dims_;
  std::vector<int64_t> order_;
  std::vector<Node> nodes_;
  std::unique_ptr<float[]> panels_;  // [panels, dims, kKnnPanel]
};

// The values in float, empty if one of them is out of range.
template <class T>
std::vector<float> in_float(const T* values, int64_t count) {
  std::vector<float> out(count);
  bool fine = true;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = to_float(values[i]);
    fine &= std::abs(out[i]) <= kMostValue;
  }
  if (!fine) out.clear();
  return out;
}

template <class T>
bool search_tree(const KnnProblem<T>& problem) {
  const int64_t dims = problem.dims, count = problem.count, query_count = problem.query_count;
  if (dims < 1 || dims > kTreeDims || count < kTreePoints || query_count < kTreeQueries)
    return false;
  auto points = in_float(problem.points, count * dims);
  const auto queries = in_float(problem.queries, query_count * dims);
  if (points.empty() || queries.empty()) return false;
  const Tree tree(std::move(points), dims);
  // The points themselves are searched for in the tree's order, in which one query's boxes are the
  // next one's.
  const bool same = problem.queries == problem.points && query_count == count;
  parallel_for(0, query_count, 512, [&](int64_t begin, int64_t end) {
    std::vector<Visit> stack;
    std::vector<Nearest> nearest(1, Nearest(problem.k));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t q = same ? tree.order()[i] : i;
      nearest[0].clear();
      tree.search(queries.data() + q * dims, stack, nearest[0], [&](int64_t point) {
        return squared_distance(problem.queries + q * dims, problem.points + point * dims, dims);
      });
      write(nearest, q, problem.k, problem.distances, problem.indices);
    }
  });
  return true;
}

}  // namespace

bool knn_by_tree(const KnnProblem<float>& problem) { return search_tree(problem); }
bool knn_by_tree(const KnnProblem<Half>& problem) { return search_tree(problem); }
bool knn_by_tree(const KnnProblem<BFloat16>& problem) { return search_tree(problem); }

}  // namespace fastsel::cpu
