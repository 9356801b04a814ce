// One launch: what a GPU would refuse, shared memory, the blocks one after another.
#include "../include/emulation/launch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "faults.h"
#include "state.h"

// ASan's, null unless its runtime is loaded.
extern "C" {
__attribute__((weak, visibility("default"))) void __asan_poison_memory_region(const volatile void* begin, size_t bytes);
__attribute__((weak, visibility("default"))) void __asan_unpoison_memory_region(const volatile void* begin,
                                                                                size_t bytes);
}

namespace emulation {
namespace {

// Exists while the grid runs. Dynamic shared memory is allocated and, past its end, forbidden to ASan; what else lies
// between the __shared__ variables gets its old value back.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) {
    find_static_smem();
    saved_.assign(state.static_smem.begin, state.static_smem.begin + state.static_smem.bytes);
    if (dynamic_bytes == 0) return;
    allocated_ = (dynamic_bytes + kAlignment) / kAlignment * kAlignment;  // at least a byte more than asked for
    state.dynamic_smem = {static_cast<unsigned char*>(std::aligned_alloc(kAlignment, allocated_)), dynamic_bytes};
    if (__asan_poison_memory_region) {
      __asan_poison_memory_region(state.dynamic_smem.begin + dynamic_bytes, allocated_ - dynamic_bytes);
    }
  }
  ~SharedMemory() {
    if (!saved_.empty()) std::memcpy(state.static_smem.begin, saved_.data(), saved_.size());
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(state.dynamic_smem.begin, allocated_);
    std::free(state.dynamic_smem.begin);
    state.dynamic_smem = {};
  }

 private:
  static constexpr size_t kAlignment = 1024;  // of DYNAMIC_SMEM in csrc/common.cuh
  std::vector<unsigned char> saved_;
  size_t allocated_ = 0;
};

bool can_launch(dim3 grid,
                dim3 block) {  // CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 &&
         threads >= 1 && threads <= 1024 && block.z <= 64;
}

uint3 block_at(uint64_t i, dim3 grid) {
  return {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
          static_cast<unsigned>(i / grid.x / grid.y)};
}

}  // namespace

cudaError_t set_max_dynamic_smem(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxSmem) return cudaErrorInvalidValue;
  state.max_smem[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

void wait_for_dependency() {
  if (checker) checker->waited_for_dependency(*state.current);
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*thread_body)(const void*),
                   const void* arguments) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t smem_bytes = config.dynamicSmemBytes;
  if (state.current) fail(state.current->site, "a kernel launches a kernel: not emulated");
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (!can_launch(grid, block)) return cudaErrorInvalidConfiguration;
  state.begins_early = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization) return cudaErrorNotSupported;
    state.begins_early = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  const auto asked_for = state.max_smem.find(kernel);
  if (smem_bytes >
      (asked_for == state.max_smem.end() ? kDefaultMaxSmem : std::max(asked_for->second, kDefaultMaxSmem))) {
    return cudaErrorInvalidValue;
  }

  state.kernel = kernel;
  state.thread_body = thread_body;
  state.arguments = arguments;
  state.block_threads = static_cast<int>(block.x * block.y * block.z);
  state.random = state.config.seed * 0x9e3779b97f4a7c15 + 1;  // never 0, where xorshift would stay
  state.current = nullptr;
  state.uninterruptible = 0;
  ::gridDim = grid;
  ::blockDim = block;
  ++state.counters.launches;
  Launched& launched = state.launched[kernel];
  ++launched.times;
  launched.dynamic_smem_bytes = std::max<uint64_t>(launched.dynamic_smem_bytes, smem_bytes);

  const SharedMemory shared_memory(smem_bytes);
  const FaultHandler fault_handler;
  if (checker) checker->launch_starts();
  std::vector<uint32_t> order;
  permute(order, size_t{grid.x} * grid.y * grid.z);
  for (const uint32_t i : order) {
    ::blockIdx = block_at(i, grid);
    run_block();
  }
  return cudaSuccess;
}

}  // namespace emulation
