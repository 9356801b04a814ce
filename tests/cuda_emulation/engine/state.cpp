#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

std::string text(uint3 v) {
  return '(' + std::to_string(v.x) + ',' + std::to_string(v.y) + ',' + std::to_string(v.z) + ')';
}

}  // namespace

std::string text(const Site& site) { return std::string(site.file_name()) + ':' + std::to_string(site.line()); }
std::string text(const Thread& thread) { return "thread " + text(thread.id); }
std::string text_of_block() { return "block " + text(blockIdx); }

std::string text_of_kernel() {
  const auto name = state.kernel_names.find(state.kernel);
  return name == state.kernel_names.end() ? "kernel" : name->second;
}

void fail(const std::string& site, const std::string& message) {
  std::string full = site + ": " + message + "\n  in " + text_of_kernel() + ", " + text_of_block();
  if (!state.current) throw Error(full);
  Thread& thread = *state.current;
  state.error = full + ", " + text(thread);
  leave_for_ever(thread.fiber);
}

void fail(const Site& site, const std::string& message) { fail(text(site), message); }

uint64_t random_number() {  // xorshift64 (Marsaglia 2003)
  uint64_t& x = state.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

}  // namespace emulation
