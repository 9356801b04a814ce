#include "faults.h"

#include <ucontext.h>

#include <cstdio>

#include "places.h"
#include "state.h"

namespace emulation {
namespace {

struct {
  int signal = 0;
  const char* pc;
  const char* address;
} fault;

const char* program_counter(const ucontext_t& context) {
#if defined(__x86_64__)
  return reinterpret_cast<const char*>(context.uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<const char*>(context.uc_mcontext.pc);
#else
  return nullptr;
#endif
}

// Runs on a stack of its own, and leaves it and the thread's for good.
void on_fault(int signal, siginfo_t* info, void* context) {
  if (!state.current) {  // not ours: the same instruction faults again, without us
    std::signal(signal, SIG_DFL);
    return;
  }
  fault = {signal, program_counter(*static_cast<ucontext_t*>(context)), static_cast<const char*>(info->si_addr)};
  leave_for_ever(state.current->fiber);
}

}  // namespace

FaultHandler::FaultHandler() {
  static char stack[64 << 10];
  stack_t ours{};
  ours.ss_sp = stack;
  ours.ss_size = sizeof stack;
  sigaltstack(&ours, &stack_before_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before_[i]);
}

FaultHandler::~FaultHandler() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

void report_fault() {
  if (!fault.signal) return;
  const Thread& thread = *state.current;
  const char* const guard = thread.fiber.memory;
  std::string what;
  if (fault.signal == SIGFPE) {
    what = "division by zero";
  } else if (fault.address >= guard && fault.address < guard + kPage) {
    what = "the thread's stack overflows";
  } else {
    char address[32];
    std::snprintf(address, sizeof address, "%p", static_cast<const void*>(fault.address));
    what = std::string("access to address ") + address + ", where there is no memory";
  }
  fault.signal = 0;
  const std::string line = source_line(fault.pc + 1);
  const std::string who = ", " + text(thread);
  state.current = nullptr;
  throw Error(line + ": " + what + "\n  in " + text_of_kernel() + ", " + text_of_block() + who);
}

}  // namespace emulation
