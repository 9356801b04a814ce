#include <link.h>

#include <cstring>

#include "state.h"

namespace emulation {
namespace {

// In the segment that holds the module's __shared__ variables (language.h).
thread_local volatile char anchor;

}  // namespace

// The segment belongs to the calling OS thread, so it is looked for at each launch.
void find_static_smem() {
  anchor = 0;  // a segment is allocated at its first use
  const auto* known = const_cast<const unsigned char*>(reinterpret_cast<volatile unsigned char*>(&anchor));
  state.static_smem = {};
  const auto visit = [](dl_phdr_info* module, size_t, void* known) {
    auto* const begin = static_cast<unsigned char*>(module->dlpi_tls_data);
    for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
      if (module->dlpi_phdr[i].p_type != PT_TLS) continue;
      const MemoryRange segment{begin, module->dlpi_phdr[i].p_memsz};
      if (!segment.holds(known)) continue;
      state.static_smem = segment;
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, const_cast<unsigned char*>(known));
}

bool is_shared(const void* address) {
  return !static_smem_is_in_segment || state.static_smem.holds(address) || state.dynamic_smem.holds(address);
}

// A block finds garbage in its shared memory: NaN in every floating type. What else lies in the segment is put back
// after the launch (launch.cpp).
void poison_shared_memory() {
  for (const MemoryRange& memory : {state.static_smem, state.dynamic_smem}) {
    if (memory.bytes) std::memset(memory.begin, 0xff, memory.bytes);
  }
}

}  // namespace emulation
