// The twins of device.cuh's shared memory and of its vector and streaming loads and stores. A
// misaligned access throws, where a GPU faults.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "simt/machine.h"

namespace fastsel::simt {

template <class T>
inline char shared_key = 0;

// The block's one object of type T, all bits set until written.
template <class T>
T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T> &&
                std::is_trivially_destructible_v<T>);
  static_assert(sizeof(T) <= kMaxStaticSharedBytes);
  return *static_cast<T*>(shared_object(&shared_key<T>, sizeof(T), alignof(T)));
}

// The block's LaunchConfig::shared_bytes, all bits set until written.
template <class T>
T* dynamic_shared() {
  static_assert(alignof(T) <= 16);
  return static_cast<T*>(current->block->dynamic_shared);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  T& operator[](int i) { return values[i]; }
  const T& operator[](int i) const { return values[i]; }
};

template <class T>
constexpr bool fits_one_access =
    sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

template <class T>
T load_streaming(const T* p) {
  static_assert(fits_one_access<T>);
  check_alignment(p, sizeof(T));
  T out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

template <int N, class T>
Vector<T, N> load_streaming(const T* p) {
  return load_streaming(reinterpret_cast<const Vector<T, N>*>(p));
}

template <int N, class T>
Vector<T, N> load_vector(const T* p) {
  return load_streaming<N>(p);
}

template <class T, int N>
void store_vector(T* p, const Vector<T, N>& v) {
  check_alignment(p, sizeof v);
  std::memcpy(p, &v, sizeof v);
}

}  // namespace fastsel::simt

template <class T>
T __ldg(const T* p) {
  return *p;
}
