// The state of the emulated multiprocessor and the turns of its fibers, for machine.cpp, which runs
// grids, and barriers.cpp, where fibers wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <source_location>
#include <string>

#include "simt/machine.h"

namespace fastsel::simt {

// Everything of one process; `turn` is held while a grid runs.
struct Machine {
  std::mutex turn;
  Order order = Order::forward;
  uint64_t random_state = 0;
  std::deque<Block>
      blocks;  // kept between launches for their stacks and shared memory; a deque never moves them
  size_t resident = 0;  // how many of them belong to the running grid
  Context scheduler;
  void (*body)(void*) = nullptr;
  void* data = nullptr;
  std::exception_ptr thrown;
  bool cooperative = false;
  size_t grid_threads = 0;
  size_t grid_arrived = 0;
  uint64_t grid_barriers = 0;  // completed so far
};
extern Machine& machine;

uint64_t next_random();

// Which of the lanes that can run has the next turn, in the order set; there must be one.
unsigned choose_lane(unsigned runnable);

void begin_waiting(Fiber& fiber, State state);

// Hands the turn on; returns when this fiber is runnable and has been chosen again. A neighbour in
// the warp is switched to directly; the scheduler takes over when the warp has nobody left, or to
// start a lane's first flow.
void hand_over(Fiber& fiber);

// The end of a thread can be what others wait for: ended threads take part in nothing any more.
void end_thread(Fiber& fiber);

// For messages.
std::string describe(const std::source_location& where);
std::string describe(const dim3& d);

}  // namespace fastsel::simt
