// What nvcc sees behind cuda/device.cuh: thin wrappers around CUDA. simt/ holds the twin of
// everything in here.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#define FASTSEL_PRAGMA(text) _Pragma(#text)
#define FASTSEL_NOINLINE __noinline__
#define FASTSEL_UNROLL FASTSEL_PRAGMA(unroll)
#define FASTSEL_UNROLL_BY(times) FASTSEL_PRAGMA(unroll times)

namespace fastsel::cuda {

// ---- shared memory ----

// What a kernel's block_shared objects may take together: 48 KB on a GPU less 8 KB, the dynamic
// shared memory that then needs no further call at a launch. The host emulation checks the sum.
inline constexpr size_t kMaxStaticSharedBytes = 40 * 1024;

// The block's one object of type T; its content is undefined until written.
template <class T>
__device__ __forceinline__ T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T> &&
                std::is_trivially_destructible_v<T> && sizeof(T) <= kMaxStaticSharedBytes);
  __shared__ T storage;
  return storage;
}

// The block's LaunchConfig::shared_bytes, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  static_assert(alignof(T) <= 16);
  extern __shared__ uint4 fastsel_dynamic_shared[];
  return reinterpret_cast<T*>(fastsel_dynamic_shared);
}

// ---- memory ----

// N values that travel in one load or store of N * sizeof(T) bytes (4, 8 or 16), aligned to that
// many bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  __host__ __device__ T& operator[](int i) { return values[i]; }
  __host__ __device__ const T& operator[](int i) const { return values[i]; }
};

namespace detail {
template <size_t kBytes>
struct Word;
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
}  // namespace detail

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// A load of data read once: evicted from the caches first (ld.global.cs).
template <class T>
__device__ __forceinline__ T load_streaming(const T* p) {
  using Word = typename detail::Word<sizeof(T)>::type;
  T out;
  *reinterpret_cast<Word*>(&out) = __ldcs(reinterpret_cast<const Word*>(p));
  return out;
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_streaming(const T* p) {
  return load_streaming(reinterpret_cast<const Vector<T, N>*>(p));
}

// ---- arithmetic ----

// 2^x with a relative error of 2^-22; subnormal arguments and results count as zero.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- cooperative grids ----

// Waits for every thread of a grid started by launch_cooperative; what they wrote before is visible
// after.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// The two halves of grid_sync(): work between them overlaps with the other blocks' arrival. Every
// thread of the block calls both; before the first arrives, the block's threads meet.
using GridToken = unsigned;
__device__ __forceinline__ GridToken grid_arrive() {
  return cooperative_groups::this_grid().barrier_arrive();
}
__device__ __forceinline__ void grid_wait(GridToken token) {
  cooperative_groups::this_grid().barrier_wait(std::move(token));
}

// ---- launches (host) ----

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory a block
  void* stream = nullptr;   // a cudaStream_t
};

namespace detail {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, so the next check must not find it again
  throw std::runtime_error(std::string("fastsel: ") + what +
                           " failed: " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Static and dynamic shared memory together may pass 48 KB only where the kernel asked for it
// beforehand; block_shared takes at most kMaxStaticSharedBytes of them. A kernel asks once a device,
// for all there is: host threads that launch it with different sizes must not lower each other's
// limit.
inline void allow_shared_bytes(const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024 - kMaxStaticSharedBytes) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (allowed.count({kernel, device}) > 0) return;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes)),
        "raising a kernel's shared memory limit");
  allowed.insert({kernel, device});
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, bool cooperative,
            Arguments&&... arguments) {
  allow_shared_bytes(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t native{};
  native.gridDim = config.grid;
  native.blockDim = config.block;
  native.dynamicSmemBytes = config.shared_bytes;
  native.stream = static_cast<cudaStream_t>(config.stream);
  native.attrs = &attribute;
  native.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&native, kernel, std::forward<Arguments>(arguments)...),
        "a kernel launch");
}

}  // namespace detail

// Starts kernel(arguments...) on config.stream of the current device; throws std::runtime_error if
// it cannot start.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  detail::launch(kernel, config, false, std::forward<Arguments>(arguments)...);
}

// The same with every block resident at once, so that the kernel may call grid_sync(). The grid
// must fit: at most as many blocks as the multiprocessors can hold at once.
template <class... Parameters, class... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), const LaunchConfig& config,
                        Arguments&&... arguments) {
  detail::launch(kernel, config, true, std::forward<Arguments>(arguments)...);
}

// ---- the current device ----

inline int multiprocessor_count() {
  return detail::device_attribute(cudaDevAttrMultiProcessorCount);
}

// The most dynamic plus static shared memory one block can ask for.
inline int max_shared_bytes_per_block() {
  return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

}  // namespace fastsel::cuda
