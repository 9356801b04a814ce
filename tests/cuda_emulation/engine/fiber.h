// A stack of its own for each CUDA thread, and the switch between it and the scheduler's.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

inline constexpr size_t kPage = 4096;
inline constexpr size_t kStackBytes =
    256 << 10;  // a thread of a GPU has at most 512 kB of local memory, and far less in use

struct Fiber {
  char* memory = nullptr;  // a guard page, then the stack; kept for the next block
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* asan_fake_stack = nullptr;

  bool holds(const void* address) const {
    return memory && address >= memory && address < memory + kPage + kStackBytes;
  }
};

void prepare(Fiber& fiber, void (*entry)());  // `entry` must not return
void run(Fiber& fiber);                       // scheduler -> fiber; returns when the fiber leaves
void leave(Fiber& fiber);                     // fiber -> scheduler; returns when the fiber is run again
[[noreturn]] void leave_for_ever(Fiber& fiber);

}  // namespace emulation
