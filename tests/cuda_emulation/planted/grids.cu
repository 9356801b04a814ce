// Blocks among one another, and launches that a GPU refuses.
#include "planted.h"

namespace planted {
namespace {

template <bool Bug>
__global__ void two_blocks_write_one_element_kernel(const float* in, float* out, unsigned) {
  const unsigned i = Bug ? threadIdx.x : blockIdx.x * 64 + threadIdx.x % 64;
  if (Bug || threadIdx.x < 64) out[i] = in[i] + blockIdx.x;  // named
}

template <bool Bug>
__global__ void sum_of_blocks_without_atomics_kernel(const float* in, float* out, unsigned) {
  if (Bug)
    out[threadIdx.x] += in[threadIdx.x];  // named
  else
    atomicAdd(out + threadIdx.x, in[threadIdx.x]);
}

// The block that counts last adds up what the others left.
template <bool Bug>
__global__ void last_block_without_a_fence_kernel(const float* in, float* out, unsigned) {
  __shared__ bool last;
  float* const partial = out;
  if (threadIdx.x < 32) partial[32 * blockIdx.x + threadIdx.x] = in[threadIdx.x] + blockIdx.x;  // named
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!Bug) __threadfence();
    last = atomicAdd(out + 127, 1.0f) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x < 31) {
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[32 * block + threadIdx.x];  // named
    out[96 + threadIdx.x] = sum;
  }
}

// Blocks may run one after another, and then the first one waits for ever.
template <bool Bug>
__global__ void waits_for_another_block_kernel(const float* in, float* out, unsigned) {
  volatile float* const flag = out + 127;
  if (blockIdx.x == 1 && threadIdx.x == 0) *flag = 1.0f;
  if (Bug && blockIdx.x == 0 && threadIdx.x == 0) {
    while (*flag == 0.0f) {  // named
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < 127) out[threadIdx.x] = in[threadIdx.x];
}

template <bool Bug>
__global__ void loop_without_an_end_kernel(const float* in, float* out, unsigned n) {
  float sum = 0;
  for (unsigned i = threadIdx.x; i < n;) {         // named
    sum += in[i];                                  // named
    if (!Bug || i != 77 || threadIdx.x != 5) ++i;  // named
  }
  out[threadIdx.x] = sum;
}

// The second launch adds to what the first one wrote.
template <bool Bug>
__global__ void dependency_without_a_wait_kernel(const float* in, float* out, unsigned) {
  const float x = in[threadIdx.x];
  if (!Bug || threadIdx.x % 32 == 0) wait_for_dependency();
  out[threadIdx.x] += x;  // named
}

// One thread waits for all that meet it at the barrier.
template <bool Bug>
__global__ void wait_for_the_dependency_after_the_barrier_kernel(const float* in, float* out, unsigned) {
  if (!Bug && threadIdx.x == 0) wait_for_dependency();
  __syncthreads();
  if (Bug && threadIdx.x == 0) wait_for_dependency();
  out[threadIdx.x] += in[threadIdx.x];  // named
}

template <bool Bug>
__global__ void too_many_threads_kernel(const float* in, float* out, unsigned n) {
  if (threadIdx.x < n) out[threadIdx.x] = in[threadIdx.x];
}

template <bool Bug>
__global__ void too_much_shared_memory_kernel(const float* in, float* out, unsigned) {
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool Bug>
__global__ void too_many_blocks_kernel(const float* in, float* out, unsigned) {
  if (blockIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
}

}  // namespace

const Table kGrids = {
    {"two_blocks_write_one_element", {PLANTED(two_blocks_write_one_element), {2}}},
    {"sum_of_blocks_without_atomics", {PLANTED(sum_of_blocks_without_atomics), {2}}},
    {"last_block_without_a_fence", {PLANTED(last_block_without_a_fence), {3}}},
    {"waits_for_another_block", {PLANTED(waits_for_another_block), {2}}},
    {"loop_without_an_end", {PLANTED(loop_without_an_end)}},
    {"dependency_without_a_wait", {PLANTED(dependency_without_a_wait), {.twice = true}}},
    {"wait_for_the_dependency_after_the_barrier",
     {PLANTED(wait_for_the_dependency_after_the_barrier), {.twice = true}}},
    {"too_many_threads", {PLANTED(too_many_threads), {1, 1024}, {1, 1025}}},
    {"too_much_shared_memory",
     {PLANTED(too_much_shared_memory), {1, kThreads, 99 << 10}, {1, kThreads, (99 << 10) + 1}}},
    {"too_many_blocks", {PLANTED(too_many_blocks), {1}, {0x80000000u}}},
};

}  // namespace planted
