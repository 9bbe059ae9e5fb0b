// Switching between two stacks of one operating-system thread.
//
// swapcontext asks the kernel for the signal mask at every switch; these few instructions do not,
// and a switch costs some nanoseconds instead of hundreds. Under AddressSanitizer every switch is
// announced, so that it follows.
#pragma once

#include <cstddef>

namespace fastsel::simt {

// A suspended flow of control: where its registers lie, and which stack it runs on.
struct Context {
  void* registers = nullptr;  // the saved stack pointer, or a ucontext_t where there is no assembly
                              // for the machine
  void* stack_bottom = nullptr;  // lowest address
  size_t stack_bytes = 0;
  void* sanitizer_stack = nullptr;
};

// Makes `context` start in `entry`, which must never return, on the stack given, when it is
// switched to.
void make_context(Context& context, void* stack_bottom, size_t stack_bytes, void (*entry)());

// Suspends the running flow into `from` and goes on with `to`. Returns when somebody switches back
// to `from`.
void switch_context(Context& from, Context& to);

// To be called first in an entry function.
void arrive_in_context();

// Notes which stack the running flow is on; to be called before the first switch from a stack that
// make_context did not see.
void describe_running_stack(Context& context);

// A stack for one emulated thread, with a page below it that must not be touched. Stacks are never
// given back: they are reused by later launches.
struct Stack {
  void* bottom = nullptr;
  size_t bytes = 0;
};
Stack new_stack();

}  // namespace fastsel::simt
