// knn in few dimensions on the CPU: a tree of boxes, so that most points are never looked at.
#pragma once

#include "core/dtypes.h"
#include "cpu/knn_nearest.h"

namespace fastsel::cpu {

// Solves the problem, or returns false where the filter of all points is the better way: in many
// dimensions, of few points or queries, of numbers that are not finite or too large to square.
bool knn_by_tree(const KnnProblem<float>& problem);
bool knn_by_tree(const KnnProblem<Half>& problem);
bool knn_by_tree(const KnnProblem<BFloat16>& problem);
// Not of float64, which the tree's boxes in float would round.
inline bool knn_by_tree(const KnnProblem<double>&) { return false; }

}  // namespace fastsel::cpu
