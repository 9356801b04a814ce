// Stands between the launchers of csrc/ and the CUDA runtime, which the linker's --wrap makes possible: a launch is
// told to `on_launch` and does not happen. Everything else of the runtime is the real one, which needs no GPU for it.
#include <cuda_runtime_api.h>

#include <map>

namespace {

using OnLaunch = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t dynamic_shared,
                          void** arguments);

OnLaunch on_launch = nullptr;

std::map<const void*, const char*>& kernel_names() {
  static std::map<const void*, const char*> names;  // of the host function that stands for a kernel
  return names;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void set_on_launch(OnLaunch callback) { on_launch = callback; }

// nvcc's registration of kernels, run when the module is loaded.
void __real___cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
void __wrap___cudaRegisterFunction(void** fatbin, const char* host, char* device, const char* name, int threads,
                                   uint3* tid, uint3* bid, dim3* block, dim3* grid, int* warp_size) {
  kernel_names()[host] = name;
  __real___cudaRegisterFunction(fatbin, host, device, name, threads, tid, bid, block, grid, warp_size);
}

// Asks the driver, which may be absent, for more shared memory; here there is enough.
cudaError_t __wrap_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// The device that launchers divide their work for: one of few SMs, so that there are splits at small sizes.
cudaError_t __wrap_cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
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

cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  if (on_launch == nullptr) return cudaErrorNotReady;
  const dim3 &g = config->gridDim, &b = config->blockDim;
  const unsigned grid[] = {g.x, g.y, g.z}, block[] = {b.x, b.y, b.z};
  on_launch(kernel_names()[kernel], grid, block, config->dynamicSmemBytes, arguments);
  return cudaSuccess;
}

}  // extern "C"
