// The emulated multiprocessor: threads, warps and blocks of a running grid, and what they wait for.
//
// Each CUDA thread is a fiber that runs until it waits: at a warp operation, a block barrier, a
// grid barrier, or at its end. Whoever arrives last releases the others. When nothing can run and
// something has not ended, the kernel holds a divergent barrier: a hang on a GPU, and an exception
// here that says who waits where.
//
// One grid runs at a time in a process (launches take turns), so `current` is a plain global and
// costs one load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <vector>

#include "simt/context.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastsel::simt {

inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kMaxThreads = 1024;  // in a block

// What a kernel's block_shared objects may take together; device_nvcc.cuh says why.
inline constexpr size_t kMaxStaticSharedBytes = 40 * 1024;

enum class State : uint8_t { runnable, warp_operation, block_barrier, grid_barrier, ended };

struct Block;
struct Warp;

// A copy into shared memory that its thread has started and that has not happened yet.
struct AsyncCopy {
  void* shared;
  const void* global;
  int valid;  // bytes that come from global memory
};

struct Fiber {
  Context context;
  dim3 thread;          // threadIdx
  unsigned linear = 0;  // index in the block
  unsigned lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::runnable;
  bool started = false;             // the context holds a flow that can be switched to
  int predicate = 0;                // offered to a counting block barrier
  std::source_location where;       // of the operation the fiber waits in
  std::vector<AsyncCopy> copies;    // see simt/async_copy.h
  std::vector<size_t> copy_groups;  // for each committed group the number of copies up to its end
};

// What the lanes of one warp operation exchange: at most eight bytes a lane in and out.
struct WarpExchange {
  uint64_t offered[kLanes];
  uint64_t result[kLanes];
  uint8_t source[kLanes];  // for shuffles: the lane whose offer is wanted
};

// Fills exchange.result of every lane in `lanes`: those of the operation's mask that have not
// ended.
using WarpOperation = void (*)(WarpExchange& exchange, unsigned lanes);

struct Warp {
  Fiber fibers[kLanes];
  unsigned alive = 0;  // lanes that exist and have not ended
  unsigned runnable = 0;
  unsigned waiting = 0;    // lanes in a warp operation
  unsigned masks[kLanes];  // of the lanes waiting
  WarpOperation operations[kLanes];
  WarpExchange exchange;
};

// One object in shared memory; `key` is the address that stands for its type.
struct SharedObject {
  const void* key = nullptr;
  void* memory = nullptr;
  size_t bytes = 0;
  size_t alignment = 0;
  bool live = false;  // used by the block that runs now
};

// How many threads met at a block barrier, and how many of them offered a non-zero predicate.
struct BarrierCount {
  unsigned threads = 0, predicates = 0;
};

struct Block {
  dim3 index, dim, grid;
  unsigned threads = 0;
  unsigned warp_count = 0;
  std::vector<std::unique_ptr<Warp>>
      warps;  // may hold more than this block uses: they keep their fibers' stacks
  std::vector<SharedObject> shared;
  void* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  unsigned alive = 0;       // threads that have not ended
  unsigned arrived = 0;     // threads at the block barrier
  unsigned predicates = 0;  // of those, how many offered a non-zero predicate
  BarrierCount released;    // what the last barrier counted

  Fiber& fiber(unsigned i) const { return warps[i / kLanes]->fibers[i % kLanes]; }
};

extern Fiber* current;  // the thread that runs now; null outside kernels

// Waits for the block's other threads, those that have ended left out.
BarrierCount wait_for_block(int predicate, std::source_location where);

// The two halves of a barrier over a cooperative grid: to arrive, and to wait until every thread
// has arrived. The token tells one barrier from the next.
uint64_t arrive_at_grid(std::source_location where);
void wait_for_grid(uint64_t token, std::source_location where);

// Offers `value` to the warp operation that all lanes of `mask` take part in and returns this
// lane's result.
uint64_t wait_for_warp(unsigned mask, WarpOperation operation, uint64_t value, unsigned source_lane,
                       std::source_location where);

// The running block's shared object that `key` stands for, filled with 0xff (NaN, -1) before its
// first use in a block.
void* shared_object(const void* key, size_t bytes, size_t alignment);

// Throws unless `pointer` is a multiple of `bytes`, as a GPU faults.
void check_alignment(const void* pointer, size_t bytes);

struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
};

// Makes `block` the one at `index` of a grid: all threads at their start, shared memory poisoned.
void begin_block(Block& block, const Grid& grid, dim3 index);

// Runs body(data) in every thread of the grid. Whatever a thread throws ends the grid and is thrown
// again here.
void run_grid(const Grid& grid, void (*body)(void*), void* data);

// The order in which threads, warps and blocks get their turn.
enum class Order : int { forward = 0, reverse = 1, random = 2 };

// What the emulated device offers; small by default, so that small inputs reach the code for large
// ones.
struct Device {
  int multiprocessors = 4;
  int shared_bytes_per_block = 96 * 1024;
  int threads_per_multiprocessor = 2048;
};
extern Device device;

// How many blocks fit on a multiprocessor together.
int resident_blocks(int threads, size_t shared_bytes);

}  // namespace fastsel::simt

// Settings for tests, through ctypes. Each returns 0, or -1 and changes nothing if an argument is
// out of range.
extern "C" {
__attribute__((visibility("default"))) int fastsel_simt_set_order(int order, uint64_t seed);
__attribute__((visibility("default"))) int fastsel_simt_set_device(int multiprocessors,
                                                                   int shared_bytes_per_block,
                                                                   int threads_per_multiprocessor);
}
