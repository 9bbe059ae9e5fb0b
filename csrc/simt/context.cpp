#include "simt/context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FASTSEL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTSEL_ASAN 1
#endif
#endif

#ifdef FASTSEL_ASAN
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define FASTSEL_UCONTEXT 1
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// fastsel_simt_switch(void** save, void* load): pushes the registers a callee must keep (System V
// ABI), stores the stack pointer in *save, takes `load` as stack pointer and returns into the flow
// that was suspended there. The rounding mode and the x87 control word are kept out: no kernel
// changes them.
asm(R"(
.text
.p2align 4
.hidden fastsel_simt_switch
.globl fastsel_simt_switch
.type fastsel_simt_switch, @function
fastsel_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastsel_simt_switch, .-fastsel_simt_switch
)");
#elif defined(__aarch64__)
// The same for AArch64 (AAPCS64): x19-x28, frame pointer, link register and the low halves of
// v8-v15.
asm(R"(
.text
.p2align 4
.hidden fastsel_simt_switch
.globl fastsel_simt_switch
.type fastsel_simt_switch, %function
fastsel_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastsel_simt_switch, .-fastsel_simt_switch
)");
#endif

#ifndef FASTSEL_UCONTEXT
extern "C" void fastsel_simt_switch(void** save, void* load);
#endif

namespace fastsel::simt {

#if defined(FASTSEL_UCONTEXT)
void make_context(Context& context, void* stack_bottom, size_t stack_bytes, void (*entry)()) {
  auto* native = static_cast<ucontext_t*>(context.registers);
  if (native == nullptr)
    native = new ucontext_t;  // kept for the life of the fiber, which is that of the process
  getcontext(native);
  native->uc_stack.ss_sp = stack_bottom;
  native->uc_stack.ss_size = stack_bytes;
  native->uc_link = nullptr;
  makecontext(native, entry, 0);
  context = {native, stack_bottom, stack_bytes, nullptr};
}
#else
void make_context(Context& context, void* stack_bottom, size_t stack_bytes, void (*entry)()) {
  const auto top = (reinterpret_cast<uintptr_t>(stack_bottom) + stack_bytes) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  *--frame = nullptr;  // the return address of `entry`: none, which ends every backtrace
  *--frame = reinterpret_cast<void*>(entry);  // what the switch returns into
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
#else
  frame -= 20;
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(entry);  // x30, what the switch returns into
#endif
  context = {frame, stack_bottom, stack_bytes, nullptr};
#ifdef FASTSEL_ASAN
  __asan_unpoison_memory_region(
      stack_bottom, stack_bytes);  // an abandoned flow leaves its frames' red zones behind
#endif
}
#endif

void arrive_in_context() {
#ifdef FASTSEL_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void describe_running_stack([[maybe_unused]] Context& context) {
#ifdef FASTSEL_ASAN
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0)
    throw std::runtime_error("simt: no stack bounds");
  pthread_attr_getstack(&attributes, &context.stack_bottom, &context.stack_bytes);
  pthread_attr_destroy(&attributes);
#endif
}

void switch_context(Context& from, Context& to) {
#ifdef FASTSEL_ASAN
  __sanitizer_start_switch_fiber(&from.sanitizer_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef FASTSEL_UCONTEXT
  if (from.registers == nullptr) from.registers = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.registers), static_cast<ucontext_t*>(to.registers));
#else
  fastsel_simt_switch(&from.registers, to.registers);
#endif
#ifdef FASTSEL_ASAN
  __sanitizer_finish_switch_fiber(from.sanitizer_stack, nullptr, nullptr);
#endif
}

namespace {
#ifdef FASTSEL_ASAN
constexpr size_t kStackBytes = 256 * 1024;  // red zones make frames several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kStacksPerMapping = 64;

// Equal offsets in every stack would put all hot frames into the same few cache sets; so stack tops
// are staggered.
constexpr size_t kStaggerStep = 320;
}  // namespace

Stack new_stack() {
  static std::vector<Stack> spare;
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (spare.empty()) {
    const size_t stride = kStackBytes + page;
    void* mapping = mmap(nullptr, stride * kStacksPerMapping, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = kStacksPerMapping; i-- > 0;) {
      char* guard = static_cast<char*>(mapping) + i * stride;
      if (mprotect(guard, page, PROT_NONE) != 0) throw std::bad_alloc();
      spare.push_back({guard + page, kStackBytes - (i * kStaggerStep & ~size_t{63})});
    }
  }
  const Stack stack = spare.back();
  spare.pop_back();
  return stack;
}

}  // namespace fastsel::simt
