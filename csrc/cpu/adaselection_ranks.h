// The statistic of coreset1 for many losses, which takes a sort.
#pragma once

#include <cstdint>

namespace fastsel::cpu {

// `out` receives how far each loss's rank lies from the middle of all ranks: ranks ascend with the
// loss, equal losses rank in order of position. Losses are finite and lie between `smallest` and
// `largest`; n is below 2^31.
void coreset1_by_sorting(const float* losses, int64_t n, float smallest, float largest, float* out);

}  // namespace fastsel::cpu
