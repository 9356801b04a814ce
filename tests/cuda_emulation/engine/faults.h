// Addresses that the machine itself refuses: wild pointers, a thread's stack that overflows.
#pragma once

#include <csignal>

namespace emulation {

// While one exists, a fault of a thread of the grid ends the launch with an error instead of the process.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before_[3];
  stack_t stack_before_;
};

void report_fault();  // to be called by the scheduler after a thread left; returns if there was none

}  // namespace emulation
