// The words of CUDA C++ that g++ does not know.
//
// Types (dim3, uint3, float4, cudaError_t, ...) and the empty __device__ and __host__ come from NVIDIA's own headers.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <source_location>

namespace emulation {
using Site =
    std::source_location;  // a line of a kernel; `Site site = Site::current()` as a default argument is the caller's
}

// noinline: a launch is found again by the kernel's address. used: a kernel that nothing launches stays listed.
#undef __global__
#define __global__ __attribute__((noinline, used))

// One block runs at a time, so its shared memory is a static variable. A thread_local one, because those of a module
// lie together in one segment that can be found and poisoned before each block. ASan guards statics only.
#undef __shared__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#undef __constant__
#define __constant__ static const
#undef __launch_bounds__
#define __launch_bounds__(...)

// Set by the scheduler before a thread goes on.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;
