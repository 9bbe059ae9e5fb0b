// Kernels that put the grids of csrc/simt to the test, for tests/test_simt.py: their order, their
// barriers and what a launch may ask for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <vector>

#include "cuda/device.cuh"
#include "simt_selftest.h"

namespace {

using fastsel::cuda::launch;
using fastsel::cuda::launch_cooperative;
using fastsel::cuda::LaunchConfig;

__global__ void order_kernel(int* counter, int* turn) {
  turn[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

// When each thread of the grid had its turn.
std::vector<int> turns(unsigned blocks, unsigned threads) {
  std::vector<int> out(blocks * threads);
  int counter = 0;
  launch(order_kernel, LaunchConfig{blocks, threads}, &counter, out.data());
  return out;
}

// Rounds of "write mine, wait, read the next block's": only a barrier over the whole grid makes it
// come out.
__global__ void ring_kernel(int rounds, int* cells, int* out) {
  int mine = static_cast<int>(blockIdx.x);
  for (int round = 0; round < rounds; ++round) {
    int* row = cells + round % 2 * gridDim.x;
    if (threadIdx.x == 0) row[blockIdx.x] = mine;
    fastsel::cuda::grid_sync();
    mine = row[(blockIdx.x + 1) % gridDim.x];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = mine;
}

std::vector<int> ring(unsigned blocks, unsigned threads, int rounds, bool cooperative) {
  std::vector<int> out(blocks * threads), cells(2 * blocks, -1);
  const LaunchConfig config{blocks, threads};
  if (cooperative)
    launch_cooperative(ring_kernel, config, rounds, cells.data(), out.data());
  else
    launch(ring_kernel, config, rounds, cells.data(), out.data());
  return out;
}

// The same with the barrier in two halves: the first block's threads work between them.
__global__ void split_ring_kernel(int rounds, int* cells, int* out) {
  int mine = static_cast<int>(blockIdx.x);
  for (int round = 0; round < rounds; ++round) {
    int* row = cells + round % 2 * gridDim.x;
    if (threadIdx.x == 0) row[blockIdx.x] = mine;
    const auto token = fastsel::cuda::grid_arrive();
    auto& s = fastsel::cuda::block_shared<Cells>();
    s.cell[threadIdx.x] = round;
    if (blockIdx.x == 0) __syncthreads();
    fastsel::cuda::grid_wait(token);
    mine = row[(blockIdx.x + 1) % gridDim.x];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = mine;
}

std::vector<int> split_ring(unsigned blocks, unsigned threads, int rounds) {
  std::vector<int> out(blocks * threads), cells(2 * blocks, -1);
  launch_cooperative(split_ring_kernel, LaunchConfig{blocks, threads}, rounds, cells.data(),
                     out.data());
  return out;
}

__global__ void incomplete_grid_kernel() {
  if (blockIdx.x == 1) return;
  fastsel::cuda::grid_sync();
}

// Every block of a resident grid has shared memory of its own.
__global__ void own_shared_kernel(int* out) {
  auto& s = fastsel::cuda::block_shared<Cells>();
  s.cell[threadIdx.x] = static_cast<int>(blockIdx.x);
  fastsel::cuda::grid_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s.cell[(threadIdx.x + 1) % blockDim.x];
}

std::vector<int> own_shared(unsigned blocks, unsigned threads) {
  std::vector<int> out(blocks * threads);
  launch_cooperative(own_shared_kernel, LaunchConfig{blocks, threads}, out.data());
  return out;
}

__global__ void index_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] += 1 + block * threads + thread;
}

std::vector<unsigned> indices() {
  std::vector<unsigned> out(2 * 3 * 4 * 5 * 2 * 3);
  launch(index_kernel, LaunchConfig{dim3(2, 3, 4), dim3(5, 2, 3)}, out.data());
  return out;
}

struct Large {
  char bytes[24 * 1024];
};
struct AlsoLarge {
  char bytes[20 * 1024];
};
__global__ void static_shared_kernel(bool both, char* out) {
  out[0] = fastsel::cuda::block_shared<Large>().bytes[0];
  if (both) out[0] = fastsel::cuda::block_shared<AlsoLarge>().bytes[0];
}

void static_shared(bool both, size_t dynamic_bytes) {
  char out = 0;
  launch(static_shared_kernel, LaunchConfig{1, 1, dynamic_bytes}, both, &out);
}

__global__ void empty_kernel() {}

void launch_shape(unsigned blocks, unsigned threads, size_t shared_bytes, bool cooperative) {
  const LaunchConfig config{blocks, threads, shared_bytes};
  cooperative ? launch_cooperative(empty_kernel, config) : launch(empty_kernel, config);
}

}  // namespace

void bind_simt_grid(pybind11::module_& m) {
  m.def("static_shared", &static_shared);
  m.def("turns", &turns);
  m.def("ring", &ring);
  m.def("split_ring", &split_ring);
  m.def("incomplete_grid", [] { launch_cooperative(incomplete_grid_kernel, LaunchConfig{2, 32}); });
  m.def("own_shared", &own_shared);
  m.def("indices", &indices);
  m.def("launch_shape", &launch_shape);
}
