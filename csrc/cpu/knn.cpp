// knn on the CPU, exact: a filter by approximate distances (cpu/knn_simd.cpp), whose error is
// bounded, and among the few points that pass it the distances themselves (core/knn.h).
//
// Per query a list holds the k best so far, ordered by distance and then by index; the last of them
// is what a point must not exceed. Points are packed panel by panel, with a mean taken off, so that
// norms and with them the filter's error are small.

#include "knn.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "core/knn.h"
#include "cpu/isa.h"
#include "cpu/knn_nearest.h"
#include "cpu/knn_simd.h"
#include "cpu/knn_tree.h"
#include "cpu/parallel.h"

namespace fastsel::cpu {

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Norms up to this can be added and subtracted in float; of larger ones the filter rejects nothing.
constexpr double kMostNorm = 1e37;

// Queries that take turns with a panel of points: packing it takes a few percent of their time.
constexpr int64_t kQueryBlock = 1024;

// Up to so many queries the points are read as they are: packing them would take longer.
constexpr int64_t kFewQueries = 4;

// Floats at a cache line's beginning: a vector that straddles two is loaded twice.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t size) : values_(new (std::align_val_t(64)) float[size]) {}
  float* data() const { return values_.get(); }

 private:
  struct Delete {
    void operator()(float* values) const { operator delete[](values, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Delete> values_;
};

// How points and queries become what the filter wants.
template <class T>
class Packer {
 public:
  Packer(const T* points, int64_t count, int64_t dims)
      : points_(points), count_(count), dims_(dims), center_(mean(points, count, dims)) {}

  int64_t panels() const { return (count_ + kKnnPanel - 1) / kKnnPanel; }

  // Panel p of the points into `values` [dims, kKnnPanel], and their norms.
  void pack(int64_t p, float* values, float* norms) const {
    constexpr int64_t kSome = 64;  // dimensions whose part of the panel stays in cache
    const int64_t some = std::min(kKnnPanel, count_ - p * kKnnPanel);
    double sums[kKnnPanel] = {};
    if (some < kKnnPanel) std::fill_n(values, dims_ * kKnnPanel, 0.0f);
    for (int64_t begin = 0; begin < dims_; begin += kSome) {
      const int64_t end = std::min(dims_, begin + kSome);
      for (int64_t i = 0; i < some; ++i) {
        const T* point = points_ + (p * kKnnPanel + i) * dims_;
        double sum = 0;
        for (int64_t d = begin; d < end; ++d) {
          const float value = centered(point[d], d);
          values[d * kKnnPanel + i] = value;
          sum += double{value} * value;
        }
        sums[i] += sum;
      }
    }
    for (int64_t i = 0; i < kKnnPanel; ++i) {
      const double norm = sums[i] <= kMostNorm ? shortened(sums[i]) : kNan;
      norms[i] = i < some ? static_cast<float>(norm) : kInfinity;
    }
  }

  // -2 times the centered query into `out`, a column of [dims, kKnnQueries]; returns its squared
  // norm, made smaller by the share of it that the filter may be wrong by.
  double prepare(const T* query, float* out) const {
    double norm = 0;
    for (int64_t d = 0; d < dims_; ++d) {
      const float value = centered(query[d], d);
      norm += double{value} * value;
      out[d * kKnnQueries] = -2 * value;
    }
    return shortened(norm);
  }

 private:
  // What float loses of norm - 2 q x, as a share of both norms: dims + 2 roundings of half a unit
  // each, of values that were rounded themselves. Twice that.
  double shortened(double norm) const { return norm * (1 - (dims_ + 40) * 0x1p-23); }

  // Any center is right; one near the points makes norms small. The mean of some of them, zero where
  // that is not finite.
  static std::vector<float> mean(const T* points, int64_t count, int64_t dims) {
    constexpr int64_t kSome = 1024;
    const int64_t step = (count + kSome - 1) / kSome;
    std::vector<double> sums(dims, 0.0);
    int64_t seen = 0;
    for (int64_t i = 0; i < count; i += step, ++seen)
      for (int64_t d = 0; d < dims; ++d) sums[d] += as_double(points[i * dims + d]);
    std::vector<float> center(dims);
    for (int64_t d = 0; d < dims; ++d) {
      const auto value = static_cast<float>(sums[d] / static_cast<double>(seen));
      center[d] = std::isfinite(value) ? value : 0;
    }
    return center;
  }

  // The value from the center, rounded once.
  float centered(T value, int64_t d) const {
    if constexpr (std::is_same_v<T, double>) {
      return static_cast<float>(value - double{center_[d]});
    } else {
      return to_float(value) - center_[d];
    }
  }

  const T* points_;  // [count, dims]
  int64_t count_, dims_;
  std::vector<float> center_;
};

// The limit of the filter for a query: what norm - 2 q x must not exceed.
float filter_limit(float farthest, double norm, int64_t dims) {
  if (!(norm <= kMostNorm)) return kNan;
  const double limit = double{farthest} * (1 + 0x1p-20) - norm + underflow_room(dims);
  const auto rounded = static_cast<float>(limit);
  return rounded < limit ? std::nextafter(rounded, kInfinity) : rounded;
}

// What a sum of squared differences must not exceed: twice dims + 2 roundings more than it is.
float scan_limit(float farthest, int64_t dims) {
  if (!(farthest <= kMostNorm)) return kNan;
  return farthest * (1 + static_cast<float>(dims + 8) * 0x1p-22f) + underflow_room(dims);
}

template <class T>
void scan(const T* rows, int64_t count, int64_t dims, const T* query, float limit, KnnHits* hits) {
  FASTSEL_DISPATCH_ISA(knn_scan, rows, count, dims, query, limit, hits);
}

void scan(const double* rows, int64_t count, int64_t dims, const double* query, float limit,
          KnnHits* hits) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t d = 0; d < dims; ++d)
      sum += (rows[i * dims + d] - query[d]) * (rows[i * dims + d] - query[d]);
    if (!(sum > limit)) hits->offsets[hits->count++] = static_cast<uint32_t>(i);
  }
}

// Some queries among the points of panels [first, last), which are packed one after another.
template <class T>
void search(const T* queries, int64_t size, const KnnProblem<T>& problem, const Packer<T>& packer,
            int64_t first, int64_t last, Nearest* nearest) {
  const int64_t dims = problem.dims, groups = (size + kKnnQueries - 1) / kKnnQueries;
  const int64_t padded = groups * kKnnQueries;
  const AlignedFloats panel(dims * kKnnPanel), norms(kKnnPanel), partial(padded * kKnnPanel);
  std::vector<float> prepared(padded * dims), limits(padded, -kInfinity);
  std::vector<double> query_norms(size);
  std::vector<uint32_t> near(padded);
  for (int64_t q = 0; q < size; ++q) {
    float* group = prepared.data() + q / kKnnQueries * kKnnQueries * dims;
    query_norms[q] = packer.prepare(queries + q * dims, group + q % kKnnQueries);
    limits[q] = query_norms[q] <= kMostNorm ? kInfinity : kNan;
  }
  for (int64_t p = first; p < last; ++p) {
    packer.pack(p, panel.data(), norms.data());
    FASTSEL_DISPATCH_ISA(knn_filter, panel.data(), norms.data(), dims, prepared.data(), groups,
                         limits.data(), partial.data(), near.data());
    for (int64_t q = 0; q < size; ++q) {
      if (near[q] == 0) continue;
      const T* query = queries + q * dims;
      for (uint32_t mask = near[q]; mask != 0; mask &= mask - 1) {
        const int64_t point = p * kKnnPanel + std::countr_zero(mask);
        if (point >= problem.count) break;
        nearest[q].offer(
            {distance_key(squared_distance(query, problem.points + point * dims, dims)), point});
      }
      if (limits[q] == limits[q])
        limits[q] = filter_limit(nearest[q].farthest(), query_norms[q], dims);
    }
  }
}

// The points as they are, in a row: a few queries.
template <class T>
void knn_by_scan(const KnnProblem<T>& problem) {
  const auto& [queries, query_count, points, count, dims, k, distances, indices] = problem;
  constexpr int64_t kRows = 1024, kPart = 16 * kRows;
  const int64_t parts = std::clamp<int64_t>(count / kPart, 1, torch::stable::get_num_threads());
  std::vector<Nearest> lists(query_count * parts, Nearest(k));
  parallel_for(
      0, query_count * parts, 1,
      [&, queries = queries, points = points, count = count, dims = dims](int64_t begin,
                                                                          int64_t end) {
        std::vector<uint32_t> offsets(kRows);
        for (int64_t task = begin; task < end; ++task) {
          const T* query = queries + task / parts * dims;
          const int64_t last = count * (task % parts + 1) / parts;
          // Few rows first: of the first ones nothing is rejected.
          int64_t rows = 0, wanted = kRows / 8;
          for (int64_t first = count * (task % parts) / parts; first < last;
               first += rows, wanted = std::min(2 * wanted, kRows)) {
            rows = std::min(wanted, last - first);
            KnnHits hits{offsets.data(), 0};
            scan(points + first * dims, rows, dims, query, scan_limit(lists[task].farthest(), dims),
                 &hits);
            for (int64_t h = 0; h < hits.count; ++h) {
              const int64_t point = first + hits.offsets[h];
              lists[task].offer(
                  {distance_key(squared_distance(query, points + point * dims, dims)), point});
            }
            if (hits.count > 0) lists[task].shrink();
          }
        }
      });
  for (int64_t q = 0; q < query_count; ++q) {
    std::vector<Nearest> whole(1, std::move(lists[q * parts]));
    for (int64_t part = 1; part < parts; ++part)
      for (const Neighbor& point : lists[q * parts + part].found()) whole[0].offer(point);
    write(whole, q, k, distances, indices);
  }
}

template <class T>
void knn_by_filter(const KnnProblem<T>& problem) {
  const auto& [queries, query_count, points, count, dims, k, distances, indices] = problem;
  const Packer<T> packer(points, count, dims);
  // Where there are fewer blocks of queries than threads, threads share the points.
  const int64_t threads = torch::stable::get_num_threads(), panels = packer.panels();
  const int64_t blocks = (query_count + kQueryBlock - 1) / kQueryBlock;
  const int64_t parts = std::clamp<int64_t>((threads + blocks - 1) / blocks, 1, panels);
  std::vector<std::vector<Nearest>> lists(blocks * parts);
  const auto finish = [&, first = indices](int64_t block) {
    auto& whole = lists[block * parts];
    for (int64_t part = 1; part < parts; ++part) {
      for (size_t q = 0; q < whole.size(); ++q)
        for (const Neighbor& point : lists[block * parts + part][q].found()) whole[q].offer(point);
    }
    write(whole, block * kQueryBlock, problem.k, problem.distances, first);
    whole = {};
  };
  parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, part = task % parts, from = block * kQueryBlock;
      const int64_t size = std::min(kQueryBlock, problem.query_count - from);
      lists[task].assign(size, Nearest(problem.k));
      search(problem.queries + from * problem.dims, size, problem, packer, panels * part / parts,
             panels * (part + 1) / parts, lists[task].data());
      if (parts == 1) finish(block);
    }
  });
  for (int64_t block = 0; parts > 1 && block < blocks; ++block) finish(block);
}

}  // namespace

std::tuple<Tensor, Tensor> knn_cpu(const Tensor& queries,  // [Q, D]
                                   const Tensor& data,     // [N, D]
                                   int64_t k) {
  check_knn_arguments(queries, data, k);
  const Tensor from = as_contiguous(queries), points = as_contiguous(data);
  Tensor distances, indices;
  std::tie(distances, indices) = empty_knn(from, k);
  dispatch_floating_and_double("knn", "queries", from.scalar_type(), [&]<class T>(Type<T>) {
    if (distances.numel() == 0) return;
    const KnnProblem<T> problem{fastsel::data<T>(from),
                                from.size(0),
                                fastsel::data<T>(points),
                                points.size(0),
                                points.size(1),
                                k,
                                mutable_data<float>(distances),
                                mutable_data<int64_t>(indices)};
    if (problem.query_count <= kFewQueries) {
      knn_by_scan(problem);
    } else if (!knn_by_tree(problem)) {
      knn_by_filter(problem);
    }
  });
  return {distances, indices};
}

}  // namespace fastsel::cpu

STABLE_TORCH_LIBRARY_IMPL(fastsel, CPU, m) { m.impl("knn", TORCH_BOX(&fastsel::cpu::knn_cpu)); }
