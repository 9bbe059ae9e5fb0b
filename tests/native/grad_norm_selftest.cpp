// The twins of the tensor-core wrappers and of asynchronous copies, Divisor, and the plans of the
// per-sample gradient norms, for tests/test_grad_norm_kernels.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/divisor.h"
#include "cuda/grad_norm_plan.h"
#include "cuda/mma.cuh"

namespace {

namespace cuda = fastsel::cuda;

template <class Product>
__global__ void mma_kernel(const uint32_t* a_in, const uint32_t* b_in, float* c_in) {
  uint32_t a[4], b[2];
  float c[4];
  const unsigned lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) a[i] = a_in[lane * 4 + i], c[i] = c_in[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = b_in[lane * 2 + i];
  Product()(c, a, b);
  for (int i = 0; i < 4; ++i) c_in[lane * 4 + i] = c[i];
}

template <class T>
struct Narrow {
  void operator()(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    cuda::mma_m16n8k16<T>(c, a, b);
  }
};
struct Tf32 {
  void operator()(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    cuda::mma_m16n8k8_tf32(c, a, b);
  }
};

// Registers in, the sums' registers out: a [32 * 4], b [32 * 2], c [32 * 4].
std::vector<float> mma(const std::string& kind, const std::vector<uint32_t>& a,
                       const std::vector<uint32_t>& b, std::vector<float> c) {
  if (a.size() != 128 || b.size() != 64 || c.size() != 128)
    throw std::invalid_argument("mma: registers of 32 lanes, please");
  const auto run = [&](auto kernel) {
    cuda::launch(kernel, {1, 32}, a.data(), b.data(), c.data());
  };
  if (kind == "float16")
    run(mma_kernel<Narrow<fastsel::Half>>);
  else if (kind == "bfloat16")
    run(mma_kernel<Narrow<fastsel::BFloat16>>);
  else if (kind == "tf32")
    run(mma_kernel<Tf32>);
  else
    throw std::invalid_argument("mma: unknown kind " + kind);
  return c;
}

template <bool kTranspose>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  auto* shared = cuda::dynamic_shared<uint16_t>();
  for (unsigned i = threadIdx.x; i < 256; i += 32) shared[i] = in[i];
  __syncwarp();
  uint32_t registers[4];
  if constexpr (kTranspose)
    cuda::ldmatrix_x4_trans(registers, shared + threadIdx.x * 8);
  else
    cuda::ldmatrix_x4(registers, shared + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = registers[i];
}

// Four matrices [4, 8, 8] in, the registers [32, 4] out.
std::vector<uint32_t> ldmatrix(const std::vector<uint16_t>& matrices, bool transpose) {
  if (matrices.size() != 256) throw std::invalid_argument("ldmatrix: four 8 x 8 matrices, please");
  std::vector<uint32_t> out(128);
  cuda::launch(transpose ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, {1, 32, 512},
               matrices.data(), out.data());
  return out;
}

// Copies a line a thread, in two groups, and reads its neighbour's; `wait` and `meet` leave out
// what makes that safe.
__global__ void copy_kernel(const uint32_t* in, int valid, bool wait, bool meet, uint32_t* out) {
  auto* shared = cuda::dynamic_shared<uint32_t>();
  const unsigned thread = threadIdx.x, threads = blockDim.x;
  cuda::cp_async_16(shared + thread * 4, in + thread * 4, valid);
  cuda::cp_async_commit();
  cuda::cp_async_16(shared + (threads + thread) * 4, in + thread * 4, 16);
  cuda::cp_async_commit();
  if (wait) cuda::cp_async_wait<1>();
  if (meet) __syncthreads();
  const unsigned neighbor = (thread + 1) % threads;
  for (int i = 0; i < 4; ++i) out[thread * 4 + i] = shared[neighbor * 4 + i];
}

std::vector<uint32_t> copies(const std::vector<uint32_t>& lines, int valid, bool wait, bool meet) {
  std::vector<uint32_t> out(lines.size());
  const auto threads = static_cast<unsigned>(lines.size() / 4);
  cuda::launch(copy_kernel, {1, threads, threads * 32}, lines.data(), valid, wait, meet,
               out.data());
  return out;
}

std::vector<uint32_t> split(float value) {
  const cuda::Tf32Pair pair = cuda::split_tf32(value);
  return {pair.big, pair.small};
}

std::vector<uint32_t> divide(uint32_t n, uint32_t divisor) {
  const uint32_t quotient = fastsel::Divisor(divisor).divide(n);
  return {quotient, n};
}

pybind11::dict plan(bool conv, int64_t batch, int64_t groups, int64_t positions, int64_t columns,
                    int64_t outputs, const std::string& form, int multiprocessors) {
  static const char* const kNames[] = {"zero", "outer", "direct", "gram", "packed", "narrow"};
  const cuda::GradNormForm wanted = form == "direct" ? cuda::GradNormForm::direct
                                    : form == "gram" ? cuda::GradNormForm::gram
                                                     : cuda::GradNormForm::automatic;
  const cuda::GradNormShape shape{batch, groups, positions, columns, outputs};
  const auto chosen = conv ? cuda::choose_conv_norm_plan(shape, wanted, multiprocessors)
                           : cuda::choose_linear_norm_plan(shape, wanted, multiprocessors);
  pybind11::dict out;
  out["kernel"] = kNames[static_cast<int>(chosen.kernel)];
  out["tile"] = chosen.tile;
  out["lanes"] = chosen.lanes;
  out["per_sample"] = chosen.per_sample;
  out["items"] = chosen.items;
  out["grid"] = chosen.grid;
  return out;
}

}  // namespace

void bind_grad_norm(pybind11::module_& parent) {
  auto m = parent.def_submodule("grad_norm", "Tensor-core twins, and plans of gradient norms.");
  m.def("mma", &mma);
  m.def("ldmatrix", &ldmatrix);
  m.def("copies", &copies);
  m.def("split_tf32", &split);
  m.def("divide", &divide);
  m.def("plan", &plan);
}
