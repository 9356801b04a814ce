// Accesses outside of an allocation. Kernels are compiled with -fsanitize=address; the runtime is preloaded and guards
// every allocation of the process. Where a check fails the compiler calls the functions below, which take the place of
// the runtime's: it would end the process, they name the thread and raise in Python.
#include <sanitizer/asan_interface.h>

#include "places.h"
#include "state.h"

namespace emulation {
namespace {

std::string text_of_memory(const void* address) {
  const auto number = reinterpret_cast<uintptr_t>(address);
  char name[256] = "";
  void* region = nullptr;
  size_t region_bytes = 0;
  std::string kind = __asan_locate_address(const_cast<void*>(address), name, sizeof name, &region, &region_bytes);
  if (!state.dynamic_smem.holds(address) && state.dynamic_smem.begin == region && region) {
    kind = "dynamic shared memory";  // its allocation goes on for a little (launch.cpp)
    region_bytes = state.dynamic_smem.bytes;
  } else if (kind == "global") {
    kind = "the array " + std::string(name);
  } else if (kind == "heap") {
    kind = "an allocation";
  }
  if (region_bytes == 0) return kind + " memory";
  const auto begin = reinterpret_cast<uintptr_t>(region);
  const std::string where =
      number < begin ? std::to_string(begin - number) + " before " : "byte " + std::to_string(number - begin) + " of ";
  return where + kind + ", which has " + std::to_string(region_bytes);
}

[[noreturn]] void report(const std::string& site, const void* address, size_t bytes, bool write) {
  fail(site, std::string("out of bounds: ") + (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " +
                 text_of_memory(address));
}

struct AsanChecker final : Checker {
  void accessed(Thread&, const void* address, size_t bytes, Access access, const Site& site) override {
    void* const bad = __asan_region_is_poisoned(const_cast<void*>(address), bytes);
    if (bad) report(text(site), bad, bytes, access.writes);
  }
};

AsanChecker asan_checker;
[[maybe_unused]] const bool installed = (checker = &asan_checker, static_smem_is_in_segment = false, true);

}  // namespace
}  // namespace emulation

extern "C" {

#define EMULATION_REPORT(name, bytes, write)                                                       \
  void __asan_report_##name(const void* address) {                                                 \
    emulation::report(emulation::source_line(__builtin_return_address(0)), address, bytes, write); \
  }
#define EMULATION_REPORTS(bytes)              \
  EMULATION_REPORT(load##bytes, bytes, false) \
  EMULATION_REPORT(store##bytes, bytes, true)
EMULATION_REPORTS(1)
EMULATION_REPORTS(2)
EMULATION_REPORTS(4)
EMULATION_REPORTS(8)
EMULATION_REPORTS(16)

void __asan_report_load_n(const void* address, size_t bytes) {
  emulation::report(emulation::source_line(__builtin_return_address(0)), address, bytes, false);
}
void __asan_report_store_n(const void* address, size_t bytes) {
  emulation::report(emulation::source_line(__builtin_return_address(0)), address, bytes, true);
}
}
