// Runs grids: gives blocks, warps and threads their turns, and says who waits where when nobody can
// have one.
#include "simt/machine.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "simt/machine_state.h"

namespace fastsel::simt {

Fiber* current = nullptr;
Device device;

Machine& machine =
    *new Machine;  // never destroyed: fibers and their stacks live as long as the process

uint64_t next_random() {  // splitmix64
  uint64_t z = machine.random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

std::string describe(const std::source_location& where) {
  const std::string_view file = where.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(where.line());
}

std::string describe(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

namespace {

constexpr unsigned kMaxGridYZ = 65535;

// The bottom of every fiber's stack: one round is the life of one CUDA thread.
void fiber_main() {
  arrive_in_context();
  for (;;) {
    Fiber& fiber = *current;
    try {
      machine.body(machine.data);
      begin_waiting(fiber, State::ended);
      end_thread(fiber);
    } catch (...) {
      machine.thrown = std::current_exception();
    }
    hand_over(fiber);
  }
}

// ---- scheduling ----

void run_fiber(Fiber& fiber) {
  if (!fiber.started) {
    void* bottom = fiber.context.stack_bottom;
    size_t bytes = fiber.context.stack_bytes;
    if (bottom == nullptr) {
      const Stack stack = new_stack();
      bottom = stack.bottom;
      bytes = stack.bytes;
    }
    make_context(fiber.context, bottom, bytes, fiber_main);
    fiber.started = true;
  }
  current = &fiber;
  switch_context(machine.scheduler, fiber.context);
  current = nullptr;
  if (machine.thrown) std::rethrow_exception(std::exchange(machine.thrown, nullptr));
}

// 0..n-1 in the order set.
void fill_turns(std::vector<size_t>& turns, size_t n) {
  turns.resize(n);
  for (size_t i = 0; i < n; ++i) turns[i] = machine.order == Order::reverse ? n - 1 - i : i;
  if (machine.order == Order::random)
    for (size_t i = n; i > 1; --i) std::swap(turns[i - 1], turns[next_random() % i]);
}

// Lets a block run until all of its threads wait or have ended. Returns whether any of them moved.
bool run_block(Block& block) {
  static std::vector<size_t> turns;
  bool moved = false;
  for (bool again = true; again; moved |= again) {
    again = false;
    fill_turns(turns, block.warp_count);
    for (const size_t turn : turns) {
      Warp& warp = *block.warps[turn];
      while (warp.runnable) {
        run_fiber(warp.fibers[choose_lane(warp.runnable)]);
        again = true;
      }
    }
  }
  return moved;
}

const char* name_of(State state) {
  switch (state) {
    case State::runnable: return "can run";
    case State::warp_operation: return "in a warp operation";
    case State::block_barrier: return "at a block barrier";
    case State::grid_barrier: return "at a grid barrier";
    case State::ended: return "ended";
  }
  return "";
}

// Says for each run of neighbouring threads in the same state where they wait.
[[noreturn]] void throw_deadlock() {
  std::string text = "simt: divergent barrier (a hang on a GPU):";
  int lines = 0;
  for (size_t i = 0; i < machine.resident; ++i) {
    const Block& block = machine.blocks[i];
    if (block.alive == 0 && !machine.cooperative) continue;
    for (unsigned first = 0, last; first < block.threads; first = last) {
      const Fiber& fiber = block.fiber(first);
      for (last = first + 1; last < block.threads; ++last) {
        const Fiber& other = block.fiber(last);
        if (other.state != fiber.state || other.where.line() != fiber.where.line()) break;
      }
      if (++lines > 12) throw std::runtime_error(text + " ...");
      text += " block " + describe(block.index) + " threads " + std::to_string(first) + ".." +
              std::to_string(last - 1) + " " + name_of(fiber.state);
      if (fiber.state != State::ended) text += " (" + describe(fiber.where) + ")";
      text += ";";
    }
  }
  throw std::runtime_error(text);
}

// ---- grids ----

void check_grid(const Grid& grid) {
  const auto threads = static_cast<uint64_t>(grid.block.x) * grid.block.y * grid.block.z;
  if (threads == 0 || threads > kMaxThreads || grid.grid.x == 0 || grid.grid.y == 0 ||
      grid.grid.z == 0 || grid.grid.x > static_cast<unsigned>(INT32_MAX) ||
      grid.grid.y > kMaxGridYZ || grid.grid.z > kMaxGridYZ)
    throw std::runtime_error("simt: invalid launch: grid " + describe(grid.grid) + ", block " +
                             describe(grid.block));
  if (grid.shared_bytes > static_cast<size_t>(device.shared_bytes_per_block))
    throw std::runtime_error("simt: invalid launch: " + std::to_string(grid.shared_bytes) +
                             " bytes of shared memory a block, the device has " +
                             std::to_string(device.shared_bytes_per_block));
  if (!grid.cooperative) return;
  const uint64_t room = static_cast<uint64_t>(device.multiprocessors) *
                        resident_blocks(static_cast<int>(threads), grid.shared_bytes);
  const uint64_t blocks = static_cast<uint64_t>(grid.grid.x) * grid.grid.y * grid.grid.z;
  if (blocks > room)
    throw std::runtime_error("simt: invalid launch: " + std::to_string(blocks) +
                             " cooperative blocks, the device holds " + std::to_string(room));
}

void run_blocks(const Grid& grid) {
  const size_t count = static_cast<size_t>(grid.grid.x) * grid.grid.y * grid.grid.z;
  const auto index = [&grid](size_t i) {
    return dim3(static_cast<unsigned>(i % grid.grid.x),
                static_cast<unsigned>(i / grid.grid.x % grid.grid.y),
                static_cast<unsigned>(i / grid.grid.x / grid.grid.y));
  };
  machine.resident = grid.cooperative ? count : 1;
  if (machine.blocks.size() < machine.resident) machine.blocks.resize(machine.resident);
  std::vector<size_t> turns;
  if (!grid.cooperative) {
    Block& block = machine.blocks[0];
    fill_turns(turns, count);
    for (const size_t turn : turns) {
      begin_block(block, grid, index(turn));
      run_block(block);
      if (block.alive) throw_deadlock();
    }
    return;
  }
  machine.grid_arrived = 0;
  machine.grid_threads = count * grid.block.x * grid.block.y * grid.block.z;
  for (size_t i = 0; i < count; ++i) begin_block(machine.blocks[i], grid, index(i));
  for (;;) {
    bool moved = false, alive = false;
    fill_turns(turns, count);
    for (const size_t turn : turns) moved |= run_block(machine.blocks[turn]);
    for (size_t i = 0; i < count; ++i) alive |= machine.blocks[i].alive != 0;
    if (!alive) return;
    if (!moved) throw_deadlock();
  }
}

}  // namespace

int resident_blocks(int threads, size_t shared_bytes) {
  const int by_threads = device.threads_per_multiprocessor / threads;
  if (shared_bytes == 0) return by_threads;
  return static_cast<int>(
      std::min<size_t>(by_threads, device.shared_bytes_per_block / shared_bytes));
}

void run_grid(const Grid& grid, void (*body)(void*), void* data) {
  if (current != nullptr) throw std::runtime_error("simt: a kernel cannot launch a kernel");
  const std::lock_guard lock(machine.turn);
  check_grid(grid);
  machine.body = body;
  machine.data = data;
  machine.cooperative = grid.cooperative;
  describe_running_stack(machine.scheduler);
  try {
    run_blocks(grid);
  } catch (...) {
    // Flows left in the middle of the kernel must start anew next time.
    for (Block& block : machine.blocks)
      for (const auto& warp : block.warps)
        for (Fiber& fiber : warp->fibers) fiber.started = false;
    throw;
  }
}

}  // namespace fastsel::simt

int fastsel_simt_set_order(int order, uint64_t seed) {
  using namespace fastsel::simt;
  if (order < 0 || order > 2) return -1;
  const std::lock_guard lock(machine.turn);
  machine.order = static_cast<Order>(order);
  machine.random_state = seed;
  return 0;
}

int fastsel_simt_set_device(int multiprocessors, int shared_bytes_per_block,
                            int threads_per_multiprocessor) {
  using namespace fastsel::simt;
  if (multiprocessors < 1 || shared_bytes_per_block < 1024 ||
      threads_per_multiprocessor < int{kMaxThreads})
    return -1;
  const std::lock_guard lock(machine.turn);
  device = {multiprocessors, shared_bytes_per_block, threads_per_multiprocessor};
  return 0;
}
