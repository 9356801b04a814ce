// What more than one kernel needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops.h"

// The shared memory whose size the launch gives. A declaration is what no emulation can replace, hence a macro.
#if defined(CUDA_EMULATION)
#define DYNAMIC_SMEM(name) unsigned char* const name = emulation::dynamic_smem()
#else
#define DYNAMIC_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace fastpeft {

// cudaLaunchKernelEx instead of <<<>>>: it returns the launch's own error, and it is plain C++, so that a host compiler
// takes the same line when the kernels are executed on the CPU for tests.
// With `early` the kernel may be scheduled while the one before it in the stream still runs and has called
// start_dependents() (ptx.cuh; sm_90 and later); before it touches what that one wrote it calls wait_for_dependency().
template <class... Params, class... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), bool early, dim3 grid, dim3 block, size_t smem_bytes,
                             cudaStream_t stream, Args&&... args) {
  // Above 48 kB a kernel has to ask; the attribute stays with the kernel, and setting it again changes nothing.
  if (smem_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                   Args&&... args) {
  return launch_dependent(kernel, false, grid, block, smem_bytes, stream, static_cast<Args&&>(args)...);
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// float32 rounded to nearest even, one value or two at once (one instruction for two on sm_80 and later).
template <class T>
struct Rounded;

template <>
struct Rounded<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ __nv_bfloat16 one(float a) { return __float2bfloat16_rn(a); }
  static __device__ __forceinline__ Pair two(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

template <>
struct Rounded<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ __half one(float a) { return __float2half_rn(a); }
  static __device__ __forceinline__ Pair two(float a, float b) { return __floats2half2_rn(a, b); }
};

template <>
struct Rounded<float> {
  using Pair = float2;
  static __device__ __forceinline__ float one(float a) { return a; }
  static __device__ __forceinline__ Pair two(float a, float b) { return make_float2(a, b); }
};

}  // namespace fastpeft
