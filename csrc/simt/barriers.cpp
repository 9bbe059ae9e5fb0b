// Where fibers wait, and who releases them: warp operations, block barriers and grid barriers.
#include <bit>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>

#include "simt/machine_state.h"

namespace fastsel::simt {

namespace {

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

}  // namespace

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
