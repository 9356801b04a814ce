#include "fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

// ASan follows the stack pointer and must be told of every switch. Weak: null unless its runtime is loaded.
extern "C" {
__attribute__((weak, visibility("default"))) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                                                 size_t size);
__attribute__((weak, visibility("default"))) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                                                  size_t* size);
__attribute__((weak, visibility("default"))) void __asan_unpoison_memory_region(const volatile void* begin,
                                                                                size_t size);
}

namespace emulation {
namespace {

struct {  // the scheduler's own stack
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* asan_fake_stack;
  const void* asan_bottom;
  size_t asan_size;
} scheduler;

void (*entry_of_all)();

#if defined(__x86_64__)
// Pushes the registers that the System V ABI lets a callee keep, exchanges the stacks, and pops those of the other one.
__attribute__((naked, noinline)) void switch_stack(void** /*rdi: saved here*/, void* /*rsi: the other stack*/) {
  asm(R"(
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
  )");
}
constexpr int kSavedRegisters = 6;
#endif

void first_steps() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.asan_bottom, &scheduler.asan_size);
  }
  entry_of_all();
  __builtin_trap();
}

void switch_to_scheduler(Fiber& fiber) {
#if defined(__x86_64__)
  switch_stack(&fiber.stack_pointer, scheduler.stack_pointer);
#else
  swapcontext(&fiber.context, &scheduler.context);
#endif
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  entry_of_all = entry;
  if (!fiber.memory) {
    void* memory =
        mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // an overflow faults
    fiber.memory = static_cast<char*>(memory);
  }
  // A thread that was abandoned in an error left its red zones.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.memory + kPage, kStackBytes);
#if defined(__x86_64__)
  // As if switch_stack had been called at the very beginning of first_steps, which has no return address.
  void** top = reinterpret_cast<void**>(fiber.memory + kPage + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&first_steps);
  std::fill(top - kSavedRegisters, top, nullptr);
  fiber.stack_pointer = top - kSavedRegisters;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.memory + kPage;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, first_steps, 0);
#endif
}

void run(Fiber& fiber) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&scheduler.asan_fake_stack, fiber.memory + kPage, kStackBytes);
  }
#if defined(__x86_64__)
  switch_stack(&scheduler.stack_pointer, fiber.stack_pointer);
#else
  swapcontext(&scheduler.context, &fiber.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler.asan_fake_stack, nullptr, nullptr);
}

void leave(Fiber& fiber) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fiber.asan_fake_stack, scheduler.asan_bottom, scheduler.asan_size);
  }
  switch_to_scheduler(fiber);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &scheduler.asan_bottom, &scheduler.asan_size);
  }
}

void leave_for_ever(Fiber& fiber) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(nullptr, scheduler.asan_bottom, scheduler.asan_size);
  }
  switch_to_scheduler(fiber);
  __builtin_trap();
}

}  // namespace emulation
