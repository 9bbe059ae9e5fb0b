#include "simt/machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastsel::simt {

Fiber* current = nullptr;
Device device;

namespace {

constexpr unsigned kMaxGridYZ = 65535;

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
Machine& machine =
    *new Machine;  // never destroyed: fibers and their stacks live as long as the process

uint64_t next_random() {  // splitmix64
  uint64_t z = machine.random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// ---- waiting and releasing ----

unsigned choose_lane(unsigned runnable) {
  if (machine.order == Order::forward) return std::countr_zero(runnable);
  if (machine.order == Order::reverse) return 31 - std::countl_zero(runnable);
  for (unsigned skip = next_random() % std::popcount(runnable); skip; --skip)
    runnable &= runnable - 1;
  return std::countr_zero(runnable);
}

void begin_waiting(Fiber& fiber, State state) {
  fiber.state = state;
  fiber.warp->runnable &= ~(1u << fiber.lane);
}

// Hands the turn on; returns when this fiber is runnable and has been chosen again. A neighbour in
// the warp is switched to directly; the scheduler takes over when the warp has nobody left, or to
// start a lane's first flow.
void hand_over(Fiber& fiber) {
  const Warp& warp = *fiber.warp;
  if (warp.runnable && !machine.thrown) {
    Fiber& next = fiber.warp->fibers[choose_lane(warp.runnable)];
    if (&next == &fiber) return;
    if (next.started) {
      current = &next;
      switch_context(fiber.context, next.context);
      return;
    }
  }
  switch_context(fiber.context, machine.scheduler);
}

void make_runnable(Warp& warp, unsigned lanes) {
  for (unsigned rest = lanes; rest; rest &= rest - 1)
    warp.fibers[std::countr_zero(rest)].state = State::runnable;
  warp.runnable |= lanes;
}

// Carries out the warp operation that `lane` waits in if all lanes it names have arrived or ended.
bool release_warp(Warp& warp, unsigned lane) {
  const unsigned mask = warp.masks[lane];
  const unsigned lanes = mask & warp.alive;
  if ((lanes & ~warp.waiting) != 0) return false;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const int other = std::countr_zero(rest);
    if (warp.masks[other] != mask || warp.operations[other] != warp.operations[lane]) return false;
  }
  warp.operations[lane](warp.exchange, lanes);
  warp.waiting &= ~lanes;
  make_runnable(warp, lanes);
  return true;
}

std::string describe(const std::source_location& where) {
  const std::string_view file = where.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(where.line());
}

// Different barriers must not be mistaken for each other: CUDA leaves that undefined.
void check_same_barrier(const Block& block) {
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < block.threads; ++i) {
    const Fiber& fiber = block.fiber(i);
    if (fiber.state != State::block_barrier) continue;
    if (first == nullptr) first = &fiber;
    if (first->where.line() == fiber.where.line() &&
        std::strcmp(first->where.file_name(), fiber.where.file_name()) == 0)
      continue;
    throw std::runtime_error("simt: divergent barrier: thread " + std::to_string(first->linear) +
                             " waits at " + describe(first->where) + ", thread " +
                             std::to_string(fiber.linear) + " at " + describe(fiber.where));
  }
}

void release_block(Block& block) {
  if (block.arrived == 0 || block.arrived != block.alive) return;
  check_same_barrier(block);
  block.released = {block.arrived, block.predicates};
  block.predicates = block.arrived = 0;
  for (unsigned w = 0; w < block.warp_count; ++w)
    make_runnable(*block.warps[w], block.warps[w]->alive);
}

void release_grid() {
  if (machine.grid_arrived != machine.grid_threads) return;
  machine.grid_arrived = 0;
  ++machine.grid_barriers;
  for (size_t i = 0; i < machine.resident; ++i) {
    const Block& block = machine.blocks[i];
    for (unsigned j = 0; j < block.threads; ++j) {
      Fiber& fiber = block.fiber(j);
      if (fiber.state == State::grid_barrier) make_runnable(*fiber.warp, 1u << fiber.lane);
    }
  }
}

// The end of a thread can be what others wait for: ended threads take part in nothing any more.
void end_thread(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  warp.alive &= ~(1u << fiber.lane);
  --fiber.block->alive;
  for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
    const unsigned lane = std::countr_zero(rest);
    if (warp.waiting >> lane & 1) release_warp(warp, lane);
  }
  release_block(*fiber.block);
}

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

std::string describe(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
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

BarrierCount wait_for_block(int predicate, std::source_location where) {
  Fiber& fiber = *current;
  Block& block = *fiber.block;
  fiber.where = where;
  begin_waiting(fiber, State::block_barrier);
  ++block.arrived;
  block.predicates += predicate != 0;
  release_block(block);
  hand_over(fiber);
  return block.released;
}

uint64_t arrive_at_grid(std::source_location where) {
  if (!machine.cooperative)
    throw std::runtime_error("simt: a grid barrier in a grid started by launch() (" +
                             describe(where) + ")");
  const uint64_t token = machine.grid_barriers;
  ++machine.grid_arrived;
  release_grid();
  return token;
}

void wait_for_grid(uint64_t token, std::source_location where) {
  if (machine.grid_barriers > token) return;
  Fiber& fiber = *current;
  fiber.where = where;
  begin_waiting(fiber, State::grid_barrier);
  hand_over(fiber);
}

uint64_t wait_for_warp(unsigned mask, WarpOperation operation, uint64_t value, unsigned source_lane,
                       std::source_location where) {
  Fiber& fiber = *current;
  Warp& warp = *fiber.warp;
  const unsigned lane = fiber.lane, bit = 1u << lane;
  fiber.where = where;
  if (!(mask & bit))
    throw std::runtime_error("simt: a warp operation's mask lacks the calling lane " +
                             std::to_string(lane) + " (" + describe(where) + ")");
  warp.exchange.offered[lane] = value;
  warp.exchange.source[lane] = static_cast<uint8_t>(source_lane);
  warp.masks[lane] = mask;
  warp.operations[lane] = operation;
  warp.waiting |= bit;
  begin_waiting(fiber, State::warp_operation);
  release_warp(warp, lane);
  hand_over(fiber);
  return warp.exchange.result[lane];
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
