// The twins of device.cuh's launches and device queries. A stream means nothing here: launches run
// at once, in order.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "simt/machine.h"

namespace fastsel::simt {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  void* stream = nullptr;
};

template <class... Parameters, class... Arguments>
void launch_grid(void (*kernel)(Parameters...), const LaunchConfig& config, bool cooperative,
                 Arguments&&... arguments) {
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  auto body = [&] {
    std::apply(kernel, values);
  };  // each thread gets its own copy of the parameters
  run_grid(
      {config.grid, config.block, config.shared_bytes, cooperative},
      [](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  launch_grid(kernel, config, false, std::forward<Arguments>(arguments)...);
}

template <class... Parameters, class... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), const LaunchConfig& config,
                        Arguments&&... arguments) {
  launch_grid(kernel, config, true, std::forward<Arguments>(arguments)...);
}

inline int multiprocessor_count() { return device.multiprocessors; }
inline int max_shared_bytes_per_block() { return device.shared_bytes_per_block; }

}  // namespace fastsel::simt
