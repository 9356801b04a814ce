// cp.async: a pipeline of two stages, and what goes wrong with it.
#include "planted.h"

namespace planted {
namespace {

constexpr int kCopiers = kThreads / 4;  // threads that copy 16 bytes each: one tile of 128 floats

__device__ void copy(float* tile, const float* from) {
  if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, from + 4 * threadIdx.x);
}

template <bool Bug>
__global__ void missing_wait_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);  // named
  cp_async_commit();
  if (!Bug) cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];  // named
}

template <bool Bug>
__global__ void wait_after_the_barrier_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);  // named
  cp_async_commit();
  if (!Bug) cp_async_wait<0>();
  __syncthreads();
  if (Bug) cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];  // named
}

template <bool Bug>
__global__ void copy_without_a_barrier_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);  // named
  cp_async_commit();
  cp_async_wait<0>();
  if (!Bug) __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];  // named
}

template <bool Bug>
__global__ void wait_for_one_group_less_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[2][kThreads];
  copy(tile[0], in);
  cp_async_commit();
  copy(tile[1], in);
  cp_async_commit();
  cp_async_wait<Bug ? 2 : 1>();
  __syncthreads();
  out[threadIdx.x] = tile[0][threadIdx.x];  // named
  cp_async_wait<0>();
}

// The last iteration commits no group, so one group less is under way than wait<1> reckons with.
template <bool Bug>
__global__ void group_not_committed_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[2][kThreads];
  float sum = 0;
  copy(tile[0], in);
  cp_async_commit();
  for (int i = 0; i < 3; ++i) {
    if (i < 2) copy(tile[(i + 1) % 2], in);
    if (!Bug || i < 2) cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    sum += tile[i % 2][kThreads - 1 - threadIdx.x];  // named
    __syncthreads();
  }
  cp_async_wait<0>();
  out[threadIdx.x] = sum;
}

template <bool Bug>
__global__ void copy_outside_of_any_group_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);  // named
  if (!Bug) cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];  // named
}

template <bool Bug>
__global__ void stage_refilled_too_early_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);  // named
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    sum += tile[kThreads - 1 - threadIdx.x];  // named
    if (!Bug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool Bug>
__global__ void misaligned_copy_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  const bool copies = threadIdx.x < kCopiers - 1;
  if (copies) cp_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x + (Bug && threadIdx.x == 7));  // named
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = threadIdx.x < kThreads - 4 ? tile[threadIdx.x] : 0;
}

template <bool Bug>
__global__ void copy_from_past_the_end_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < kCopiers) cp_async_16(tile + 4 * threadIdx.x, in + 4 * (threadIdx.x + Bug));  // named
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Bug>
__global__ void copy_to_global_memory_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[kThreads];
  if (threadIdx.x < kCopiers) cp_async_16((Bug ? out : tile) + 4 * threadIdx.x, in + 4 * threadIdx.x);  // named
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (!Bug) out[threadIdx.x] = tile[threadIdx.x];
}

}  // namespace

const Table kCopies = {
    {"missing_wait", {PLANTED(missing_wait)}},
    {"wait_after_the_barrier", {PLANTED(wait_after_the_barrier)}},
    {"copy_without_a_barrier", {PLANTED(copy_without_a_barrier)}},
    {"wait_for_one_group_less", {PLANTED(wait_for_one_group_less)}},
    {"group_not_committed", {PLANTED(group_not_committed)}},
    {"copy_outside_of_any_group", {PLANTED(copy_outside_of_any_group)}},
    {"stage_refilled_too_early", {PLANTED(stage_refilled_too_early)}},
    {"misaligned_copy", {PLANTED(misaligned_copy)}},
    {"copy_from_past_the_end", {PLANTED(copy_from_past_the_end)}},
    {"copy_to_global_memory", {PLANTED(copy_to_global_memory)}},
};

}  // namespace planted
