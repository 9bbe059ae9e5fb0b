// Small kernels that put csrc/simt to the test, for tests/test_simt.py. Each function runs one and
// returns what its threads saw.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cuda/device.cuh"
#include "simt_selftest.h"

namespace {

using fastsel::cuda::kFullMask;
using fastsel::cuda::launch;
using fastsel::cuda::LaunchConfig;

template <class... Parameters, class... Arguments>
void launch_one_block(void (*kernel)(Parameters...), unsigned threads, Arguments... arguments) {
  launch(kernel, LaunchConfig{1, threads}, arguments...);
}

// ---- warp operations ----

enum Shuffle { kIndex, kXor, kUp, kDown };

__global__ void shuffle_kernel(int kind, int amount, int width, unsigned mask, int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (!(mask >> lane & 1)) return;
  if (kind == kIndex) out[lane] = __shfl_sync(mask, lane, amount, width);
  if (kind == kXor) out[lane] = __shfl_xor_sync(mask, lane, amount, width);
  if (kind == kUp) out[lane] = __shfl_up_sync(mask, lane, static_cast<unsigned>(amount), width);
  if (kind == kDown) out[lane] = __shfl_down_sync(mask, lane, static_cast<unsigned>(amount), width);
}

std::vector<int> shuffle(int kind, int amount, int width, unsigned mask) {
  std::vector<int> out(32, -2);
  launch_one_block(shuffle_kernel, 32, kind, amount, width, mask, out.data());
  return out;
}

struct Votes {
  unsigned ballot, match;
  int any, all, sum, smallest;
  unsigned largest;
};

__global__ void vote_kernel(const int* values, unsigned mask, Votes* out) {
  const unsigned lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int v = values[lane];
  out[lane] = {__ballot_sync(mask, v > 0),
               __match_any_sync(mask, v),
               __any_sync(mask, v > 0),
               __all_sync(mask, v > 0),
               __reduce_add_sync(mask, v),
               __reduce_min_sync(mask, v),
               __reduce_max_sync(mask, static_cast<unsigned>(v))};
}

// One row a lane: ballot, match, any, all, sum, smallest, largest (unsigned); empty for lanes
// outside the mask.
std::vector<std::vector<int64_t>> votes(const std::vector<int>& values, unsigned mask) {
  if (values.size() > 32) throw std::invalid_argument("votes: at most 32 values");
  std::vector<Votes> out(values.size());
  launch_one_block(vote_kernel, static_cast<unsigned>(values.size()), values.data(), mask,
                   out.data());
  std::vector<std::vector<int64_t>> rows;
  for (size_t i = 0; i < out.size(); ++i) {
    const Votes& v = out[i];
    rows.push_back({});
    if (mask >> i & 1)
      rows.back() = {v.ballot, v.match, v.any, v.all, v.sum, v.smallest, v.largest};
  }
  return rows;
}

// Lanes 0-15 and 16-31 go different ways, each half with its own mask and its own number of
// operations.
__global__ void halves_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    int v = lane;
    for (int offset = 8; offset; offset >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, offset);
    out[lane] = v;
  } else {
    out[lane] = static_cast<int>(__ballot_sync(0xffff0000u, lane % 2) >> 16);
  }
}

std::vector<int> halves() {
  std::vector<int> out(32);
  launch_one_block(halves_kernel, 32, out.data());
  return out;
}

__global__ void foreign_mask_kernel() { __syncwarp(0x1u); }
__global__ void split_warp_kernel() {
  if (threadIdx.x < 8)
    __syncwarp();
  else
    __syncthreads();
}
__global__ void mixed_operations_kernel(int* out) {
  if (threadIdx.x % 2)
    *out = __shfl_sync(kFullMask, 1, 0);
  else
    *out = static_cast<int>(__ballot_sync(kFullMask, 1));
}

// ---- blocks ----

// Thread i reads what thread (i + 1) % n wrote: with the barrier always i + 1's index, without it
// an accident.
__global__ void neighbor_kernel(bool barrier, int* out) {
  auto& s = fastsel::cuda::block_shared<Cells>();
  const unsigned i = threadIdx.x;
  s.cell[i] = static_cast<int>(i);
  if (barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + i] = s.cell[(i + 1) % blockDim.x];
}

std::vector<int> neighbors(unsigned blocks, unsigned threads, bool barrier) {
  std::vector<int> out(blocks * threads);
  launch(neighbor_kernel, LaunchConfig{blocks, threads}, barrier, out.data());
  return out;
}

__global__ void dynamic_kernel(int n, bool write, float* out) {
  auto* s = fastsel::cuda::dynamic_shared<float>();
  if (write) {
    s[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
  }
  if (threadIdx.x == 0)
    for (int i = 0; i < n; ++i)
      out[blockIdx.x * static_cast<unsigned>(n) + static_cast<unsigned>(i)] = s[i];
}

std::vector<float> dynamic_shared(unsigned blocks, unsigned threads, bool write) {
  std::vector<float> out(blocks * threads);
  launch(dynamic_kernel, LaunchConfig{blocks, threads, threads * sizeof(float)},
         static_cast<int>(threads), write, out.data());
  return out;
}

__global__ void dynamic_overrun_kernel(int i, float* out) {
  *out = fastsel::cuda::dynamic_shared<float>()[i];
}

void dynamic_overrun() {
  float out = 0;
  launch(dynamic_overrun_kernel, LaunchConfig{1, 1, 16 * sizeof(float)}, 16, &out);
}

// Threads from `stay` on leave; the others must neither hang at the barrier nor miss a count.
__global__ void early_exit_kernel(unsigned stay, int* out) {
  if (threadIdx.x >= stay) return;
  const int count = __syncthreads_count(threadIdx.x % 2 == 0);
  const int all = __syncthreads_and(1), any = __syncthreads_or(0);
  const unsigned lanes = __ballot_sync(kFullMask, 1);
  const int from_last = __shfl_sync(kFullMask, 7, 31);
  if (threadIdx.x == 0) {
    out[0] = count;
    out[1] = all;
    out[2] = any;
    out[3] = __popc(lanes);
    out[4] = from_last;
  }
}

std::vector<int> early_exit(unsigned threads, unsigned stay) {
  std::vector<int> out(5, -2);
  launch_one_block(early_exit_kernel, threads, stay, out.data());
  return out;
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  __syncthreads();
}

__global__ void throwing_kernel(unsigned thread) {
  const std::vector<int> owner(16);  // its destructor must run while the exception passes
  __syncthreads();
  if (threadIdx.x == thread) throw std::out_of_range("thread " + std::to_string(thread));
  __syncthreads();
}

// ---- atomics and memory ----

__global__ void atomics_kernel(int* i, unsigned* u, unsigned long long* l, float* f) {
  const unsigned t = threadIdx.x;
  atomicAdd(&i[0], static_cast<int>(t));
  atomicMax(&i[1], static_cast<int>(t) - 5);
  atomicMin(&i[2], static_cast<int>(t) - 5);
  atomicInc(&u[0], 9);
  atomicOr(&u[1], 1u << t);
  atomicAnd(&u[2], ~(1u << t));
  atomicCAS(&u[3], t, t + 1);  // a chain in forward order
  atomicExch(&u[4], 77u);
  atomicAdd(&l[0], 1ull << 40);
  atomicAdd(&f[0], 0.5f);
}

pybind11::tuple atomics() {
  std::vector<int> i{0, -100, 100};
  std::vector<unsigned> u{0, 0, ~0u, 0, 0};
  std::vector<unsigned long long> l{0};
  std::vector<float> f{0};
  launch_one_block(atomics_kernel, 32, i.data(), u.data(), l.data(), f.data());
  return pybind11::make_tuple(i, u, l, f);
}

__global__ void vector_kernel(const float* in, int offset, float* out) {
  const auto v = fastsel::cuda::load_vector<4>(in + offset);
  fastsel::cuda::store_vector(out, v);
  out[4] = fastsel::cuda::load_streaming(in + offset);
}

std::vector<float> vector_load(int offset) {
  alignas(16) static const float in[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  alignas(16) float out[5] = {};
  launch_one_block(vector_kernel, 1, static_cast<const float*>(in), offset,
                   static_cast<float*>(out));
  return {out, out + 5};
}

// Threads * rounds warp operations, for measuring what one costs.
__global__ void spin_kernel(int rounds, int* out) {
  int v = 0;
  for (int r = 0; r < rounds; ++r) v = __shfl_xor_sync(kFullMask, v + 1, 1);
  out[threadIdx.x] = v;
}

void spin(unsigned blocks, unsigned threads, int rounds) {
  std::vector<int> out(threads);
  launch(spin_kernel, LaunchConfig{blocks, threads}, rounds, out.data());
}

}  // namespace

// Plans of kernels that run here; in a file of its own because it needs their headers.
void bind_topk_plan(pybind11::module_& m);
void bind_adaselection(pybind11::module_& m);
void bind_grad_norm(pybind11::module_& m);

void bind_simt(pybind11::module_& parent) {
  bind_topk_plan(parent);
  bind_adaselection(parent);
  bind_grad_norm(parent);
  auto m = parent.def_submodule("simt", "Kernels that test the host emulation of CUDA.");
#if defined(__SANITIZE_ADDRESS__)
  m.attr("address_sanitizer") = true;
#else
  m.attr("address_sanitizer") = false;
#endif
  m.def("set_order", &fastsel_simt_set_order);
  m.def("set_device", &fastsel_simt_set_device);
  m.def("shuffle", &shuffle);
  m.def("votes", &votes);
  m.def("halves", &halves);
  m.def("foreign_mask", [] { launch_one_block(foreign_mask_kernel, 32); });
  m.def("split_warp", [] { launch_one_block(split_warp_kernel, 32); });
  m.def("mixed_operations", [] {
    int out = 0;
    launch_one_block(mixed_operations_kernel, 32, &out);
  });
  m.def("neighbors", &neighbors);
  m.def("dynamic_shared", &dynamic_shared);
  m.def("dynamic_overrun", &dynamic_overrun);
  m.def("early_exit", &early_exit);
  m.def("divergent", [](unsigned threads) { launch_one_block(divergent_kernel, threads); });
  m.def("throwing", [](unsigned threads, unsigned thread) {
    launch_one_block(throwing_kernel, threads, thread);
  });
  bind_simt_grid(m);
  m.def("atomics", &atomics);
  m.def("vector_load", &vector_load);
  m.def("spin", &spin);
  m.def("fast_exp2", [](float x) { return fastsel::cuda::fast_exp2(x); });
  m.def("bit_functions", [](unsigned v) {
    return pybind11::make_tuple(__popc(v), __ffs(static_cast<int>(v)), __clz(static_cast<int>(v)),
                                __brev(v));
  });
}
