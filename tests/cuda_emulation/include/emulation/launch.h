// The launch of a kernel, as csrc/common.cuh calls it.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "language.h"

namespace emulation {

// Runs `thread_body(arguments)` in every thread of the grid and returns when all have ended. What a GPU refuses comes
// back as its error code; a defect found while the kernel runs is thrown as emulation::Error.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*thread_body)(const void*),
                   const void* arguments);

// griddepcontrol.wait: what the launch before wrote may be touched from here on, if this one is allowed to begin early.
void wait_for_dependency();

cudaError_t set_max_dynamic_smem(const void* kernel, int bytes);

}  // namespace emulation

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::remove_cv_t<Params>...> arguments;  // each thread gets copies, as from a GPU's parameter space
  };
  const Call call{kernel, {static_cast<Params>(std::forward<Args>(args))...}};
  const auto thread_body = [](const void* p) {
    const Call& call = *static_cast<const Call*>(p);
    std::apply(call.kernel, call.arguments);
  };
  return emulation::launch(reinterpret_cast<const void*>(kernel), *config, thread_body, &call);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  return emulation::set_max_dynamic_smem(reinterpret_cast<const void*>(kernel), value);
}
