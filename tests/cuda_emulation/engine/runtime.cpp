// What the module needs besides kernels: the runtime calls of csrc/bindings.cpp, and C functions for the tests, which
// call them through ctypes (build.py).
#include <dlfcn.h>

#include <array>
#include <cstring>

#include "../include/emulation/arithmetic.h"
#include "state.h"

using emulation::state;

long long clock64() { return static_cast<long long>(state.counters.switches); }
void __trap() { emulation::fail(state.current->site, "__trap()"); }
void __nanosleep(unsigned) { emulation::give_way(*state.current); }

extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    default:
      return "unrecognized error code";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    default:
      return "unrecognized error code";
  }
}

// No GPU and no driver, but the versions of the headers.
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return cudaErrorNoDevice;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

// What launchers ask of the device that kernels run on: an H100, but for the number of its SMs.
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = state.config.sms;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

#define FOR_TESTS __attribute__((visibility("default")))

FOR_TESTS void emulation_configure(int order, uint64_t seed, int eager_copies, int sms) {
  state.config = {static_cast<emulation::Order>(order), seed, eager_copies != 0, sms};
}

FOR_TESTS void emulation_reset() {
  state.counters = {};
  state.launched.clear();
}

// The i-th counter; null when there are no more.
FOR_TESTS const char* emulation_counter(int i, uint64_t* value) {
  const emulation::Counters& c = state.counters;
  const std::array<std::pair<const char*, uint64_t>, 10> all{{{"launches", c.launches},
                                                              {"blocks", c.blocks},
                                                              {"threads", c.threads},
                                                              {"switches", c.switches},
                                                              {"barriers", c.barriers},
                                                              {"collectives", c.collectives},
                                                              {"mma", c.mma},
                                                              {"ldmatrix", c.ldmatrix},
                                                              {"ldmatrix_conflicts", c.ldmatrix_conflicts},
                                                              {"undefined_shuffles", c.undefined_shuffles}}};
  if (i < 0 || i >= static_cast<int>(all.size())) return nullptr;
  *value = all[i].second;
  return all[i].first;
}

// Kernels are known by the offset of their code in the module, which is their address in its symbol table.
FOR_TESTS void emulation_name(uintptr_t offset, const char* name) {
  Dl_info module;
  dladdr(reinterpret_cast<const void*>(&emulation_name), &module);
  state.kernel_names[static_cast<const char*>(module.dli_fbase) + offset] = name;
}

// The i-th kernel that was launched since the last reset, by its name, and how often, or with how much dynamic shared
// memory; null when there are no more.
FOR_TESTS const char* emulation_launched(int i, bool smem, uint64_t* value) {
  if (i < 0 || i >= static_cast<int>(state.launched.size())) return nullptr;
  const auto& [kernel, launched] = *std::next(state.launched.begin(), i);
  *value = smem ? launched.dynamic_smem_bytes : launched.times;
  const auto name = state.kernel_names.find(kernel);
  return name == state.kernel_names.end() ? "kernel without a name" : name->second.c_str();
}
}
