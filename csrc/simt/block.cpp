// A block's life: its threads put at their start, its shared memory handed out.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "simt/machine.h"

namespace fastsel::simt {

namespace {

void release_memory(void* memory, size_t alignment) {
  ::operator delete(memory, std::align_val_t{alignment});
}

void* poisoned_memory(size_t bytes, size_t alignment) {
  void* memory = ::operator new(bytes, std::align_val_t{alignment});
  std::memset(memory, 0xff, bytes);
  return memory;
}

constexpr size_t kDynamicAlignment = 16;

// Exactly as large as asked for, so that AddressSanitizer sees one byte too far.
void resize_dynamic_shared(Block& block, size_t bytes) {
  if (block.dynamic_bytes == bytes) return;
  if (block.dynamic_shared) release_memory(block.dynamic_shared, kDynamicAlignment);
  block.dynamic_shared = nullptr;
  block.dynamic_bytes = 0;
  if (bytes) block.dynamic_shared = poisoned_memory(bytes, kDynamicAlignment);
  block.dynamic_bytes = bytes;
}

}  // namespace

void begin_block(Block& block, const Grid& grid, dim3 index) {
  const unsigned n = grid.block.x * grid.block.y * grid.block.z;
  block.index = index;
  block.dim = grid.block;
  block.grid = grid.grid;
  block.threads = block.alive = n;
  block.warp_count = (n + kLanes - 1) / kLanes;
  block.arrived = block.predicates = 0;
  while (block.warps.size() < block.warp_count) block.warps.push_back(std::make_unique<Warp>());
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = block.fiber(i);
    fiber.thread =
        dim3(i % grid.block.x, i / grid.block.x % grid.block.y, i / (grid.block.x * grid.block.y));
    fiber.linear = i;
    fiber.lane = i % kLanes;
    fiber.block = &block;
    fiber.warp = block.warps[i / kLanes].get();
    fiber.state = State::runnable;
    fiber.copies.clear();
    fiber.copy_groups.clear();
  }
  for (unsigned w = 0; w < block.warp_count; ++w) {
    Warp& warp = *block.warps[w];
    const unsigned lanes = std::min(kLanes, n - w * kLanes);
    warp.alive = warp.runnable = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warp.waiting = 0;
  }
  resize_dynamic_shared(block, grid.shared_bytes);
  if (grid.shared_bytes) std::memset(block.dynamic_shared, 0xff, grid.shared_bytes);
  for (SharedObject& object : block.shared) object.live = false;
}

void* shared_object(const void* key, size_t bytes, size_t alignment) {
  Block& block = *current->block;
  size_t total = bytes;
  SharedObject* spare = nullptr;
  for (SharedObject& object : block.shared) {
    if (object.live && object.key == key) return object.memory;
    if (object.live) total += object.bytes;
    if (!object.live && object.bytes == bytes && object.alignment == alignment) spare = &object;
  }
  if (total > kMaxStaticSharedBytes)
    throw std::runtime_error("simt: the kernel needs " + std::to_string(total) +
                             " bytes of static shared memory, the limit is " +
                             std::to_string(kMaxStaticSharedBytes));
  total += block.dynamic_bytes;
  if (total > static_cast<size_t>(device.shared_bytes_per_block))
    throw std::runtime_error("simt: the kernel needs " + std::to_string(total) +
                             " bytes of shared memory a block, the device has " +
                             std::to_string(device.shared_bytes_per_block));
  if (spare == nullptr) {
    block.shared.push_back({nullptr, poisoned_memory(bytes, alignment), bytes, alignment, false});
    spare = &block.shared.back();
  }
  std::memset(spare->memory, 0xff, bytes);
  spare->key = key;
  spare->live = true;
  return spare->memory;
}

void check_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    throw std::runtime_error("simt: a memory access of " + std::to_string(bytes) +
                             " bytes is misaligned");
}

}  // namespace fastsel::simt
