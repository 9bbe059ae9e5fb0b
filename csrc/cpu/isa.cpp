#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastsel::cpu {

namespace {

Isa detect() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* limit = std::getenv("FASTSEL_ISA");
  if (limit != nullptr && std::strcmp(limit, "baseline") == 0) return Isa::baseline;
  if (limit != nullptr && std::strcmp(limit, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace fastsel::cpu

// Read by `fastsel info`.
extern "C" __attribute__((visibility("default"))) const char* fastsel_cpu_isa() {
  return fastsel::cpu::isa_name();
}
