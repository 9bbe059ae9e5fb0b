// Which of the CPU kernels' three builds this machine runs: chosen once, at run time.
#pragma once

namespace fastsel::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that the processor has and that FASTSEL_ISA (baseline, avx2 or avx512),
// read once, allows.
Isa isa();
const char* isa_name();

}  // namespace fastsel::cpu

// Calls NAMESPACE::function(...) of the build that fits this machine.
#if defined(__x86_64__)
#define FASTSEL_DISPATCH_ISA(function, ...)                                                 \
  switch (::fastsel::cpu::isa()) {                                                          \
    case ::fastsel::cpu::Isa::avx512: ::fastsel::cpu::avx512::function(__VA_ARGS__); break; \
    case ::fastsel::cpu::Isa::avx2: ::fastsel::cpu::avx2::function(__VA_ARGS__); break;     \
    default: ::fastsel::cpu::baseline::function(__VA_ARGS__);                               \
  }
#else
#define FASTSEL_DISPATCH_ISA(function, ...) ::fastsel::cpu::baseline::function(__VA_ARGS__)
#endif
