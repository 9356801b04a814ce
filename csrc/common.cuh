// What more than one kernel needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops.h"

namespace fastpeft {

// cudaLaunchKernelEx instead of <<<>>>: it returns the launch's own error, and it is plain C++, so that a host compiler
// takes the same line when the kernels are executed on the CPU for tests.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
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

// The 16 values of NF4 (QLoRA, Dettmers et al. 2023, appendix E), the float32 numbers of bitsandbytes. Read it into
// shared memory first: constant memory serves one address at a time, and 16 floats in 16 banks never conflict.
__constant__ float kNf4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

}  // namespace fastpeft
