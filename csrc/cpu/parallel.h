// torch's threads, through which exceptions come whole.
#pragma once

#include <exception>
#include <limits>
#include <mutex>

#include "torch_api.h"

namespace fastsel::cpu {

// f(begin, end) over parts of [begin, end), as torch's parallel_for, which turns what a part throws
// into an error of its own. Here the exception of the first part that threw comes out.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  if (end - begin <= grain) {  // one part: torch's way there takes microseconds
    if (begin < end) f(begin, end);
    return;
  }
  std::mutex mutex;
  std::exception_ptr error;
  int64_t error_at = std::numeric_limits<int64_t>::max();
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (first < error_at) {
        error_at = first;
        error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace fastsel::cpu
