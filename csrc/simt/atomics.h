// The twins of CUDA's atomics. Threads switch only where they wait, so plain reads and writes are
// atomic here; fences order nothing for the same reason. Each overload is one CUDA has.
#pragma once

#include <cstdint>
#include <type_traits>

#define FASTSEL_INTEGER_ATOMIC(NAME, EXPRESSION)                      \
  template <class T>                                                  \
    requires(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || \
             std::is_same_v<T, unsigned long long>)                   \
  T NAME(T* address, std::type_identity_t<T> value) {                 \
    const T old = *address;                                           \
    *address = static_cast<T>(EXPRESSION);                            \
    return old;                                                       \
  }

// Sums go through unsigned arithmetic: a GPU's wrap around.
FASTSEL_INTEGER_ATOMIC(atomicAdd, std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value))
FASTSEL_INTEGER_ATOMIC(atomicMin, value < old ? value : old)
FASTSEL_INTEGER_ATOMIC(atomicMax, old < value ? value : old)
FASTSEL_INTEGER_ATOMIC(atomicExch, value)
FASTSEL_INTEGER_ATOMIC(atomicAnd, old& value)
FASTSEL_INTEGER_ATOMIC(atomicOr, old | value)

#undef FASTSEL_INTEGER_ATOMIC

inline float atomicAdd(float* address, float value) {
  const float old = *address;
  *address = old + value;
  return old;
}

inline float atomicExch(float* address, float value) {
  const float old = *address;
  *address = value;
  return old;
}

template <class T>
  requires(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
           std::is_same_v<T, unsigned long long>)
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  const T old = *address;
  if (old == expected) *address = desired;
  return old;
}

// Counts up to `last`, then from 0 again.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
