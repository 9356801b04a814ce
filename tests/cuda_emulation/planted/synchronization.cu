// Barriers, warps, masks.
#include "planted.h"

namespace planted {
namespace {

template <bool Bug>
__global__ void missing_barrier_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];  // named
  if (!Bug) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];  // named
}

// Each thread reads what a thread before it wrote: in forward order the result is right.
template <bool Bug>
__global__ void missing_barrier_hidden_by_order_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];  // named
  if (!Bug) __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x / 2];  // named
}

template <bool Bug>
__global__ void tile_refilled_too_early_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    tile[threadIdx.x] = in[threadIdx.x] + i;  // named
    __syncthreads();
    sum += tile[kThreads - 1 - threadIdx.x];  // named
    if (!Bug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool Bug>
__global__ void missing_syncwarp_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];  // named
  if (!Bug) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];  // named
}

// A warp's own barrier orders nothing between warps.
template <bool Bug>
__global__ void syncwarp_for_a_block_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];  // named
  if (Bug)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];  // named
}

// A shuffle meets the other lanes, but promises nothing about memory.
template <bool Bug>
__global__ void shuffle_taken_for_a_barrier_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];  // named
  const float neighbour = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  if (!Bug) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1] + neighbour;  // named
}

template <bool Bug>
__global__ void divergent_barrier_kernel(const float* in, float* out, unsigned) {
  if (Bug && threadIdx.x < 64) {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();  // named
  } else {
    __syncthreads();  // named
    out[threadIdx.x] = in[threadIdx.x];
  }
}

template <bool Bug>
__global__ void early_exit_kernel(const float* in, float* out, unsigned) {
  if (Bug && threadIdx.x >= 100) return;
  __syncthreads();  // named
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool Bug>
__global__ void shuffle_meets_barrier_kernel(const float* in, float* out, unsigned) {
  float x = in[threadIdx.x];
  if (Bug && threadIdx.x % 32 < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);  // named
  } else {
    __syncthreads();  // named
  }
  out[threadIdx.x] = x;
}

template <bool Bug>
__global__ void lane_outside_its_mask_kernel(const float* in, float* out, unsigned) {
  out[threadIdx.x] = __shfl_xor_sync(Bug ? 0x0000ffffu : 0xffffffffu, in[threadIdx.x], 1);  // named
}

template <bool Bug>
__global__ void masks_that_differ_kernel(const float* in, float* out, unsigned) {
  const unsigned mask = Bug ? 0xffffffffu << threadIdx.x % 2 : 0xffffffffu;
  out[threadIdx.x] = __shfl_xor_sync(mask | 1u << threadIdx.x % 32, in[threadIdx.x], 1);  // named
}

template <bool Bug>
__global__ void shuffle_of_an_odd_width_kernel(const float* in, float* out, unsigned) {
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, in[threadIdx.x], 1, Bug ? 24 : 16);  // named
}

// The upper half of the warp does not take part, and what it holds is undefined.
template <bool Bug>
__global__ void reads_a_lane_that_takes_no_part_kernel(const float* in, float* out, unsigned) {
  float x = in[threadIdx.x];
  if (!Bug)
    x = __shfl_xor_sync(0xffffffffu, x, 16);
  else if (threadIdx.x % 32 < 16)
    x = __shfl_xor_sync(0x0000ffffu, x, 16);
  out[threadIdx.x] = x;
}

template <bool Bug>
__global__ void mma_in_half_a_warp_kernel(const float* in, float* out, unsigned) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {in[threadIdx.x], 0, 0, 0};
  if (!Bug || threadIdx.x % 32 < 16) {
    fastpeft::mma_m16n8k16<__half>(d, a, b);  // named
  }
  out[threadIdx.x] = d[0];
}

}  // namespace

const Table kSynchronization = {
    {"missing_barrier", {PLANTED(missing_barrier)}},
    {"missing_barrier_hidden_by_order", {PLANTED(missing_barrier_hidden_by_order)}},
    {"tile_refilled_too_early", {PLANTED(tile_refilled_too_early)}},
    {"missing_syncwarp", {PLANTED(missing_syncwarp)}},
    {"syncwarp_for_a_block", {PLANTED(syncwarp_for_a_block)}},
    {"shuffle_taken_for_a_barrier", {PLANTED(shuffle_taken_for_a_barrier)}},
    {"divergent_barrier", {PLANTED(divergent_barrier)}},
    {"early_exit", {PLANTED(early_exit)}},
    {"shuffle_meets_barrier", {PLANTED(shuffle_meets_barrier)}},
    {"lane_outside_its_mask", {PLANTED(lane_outside_its_mask)}},
    {"masks_that_differ", {PLANTED(masks_that_differ)}},
    {"shuffle_of_an_odd_width", {PLANTED(shuffle_of_an_odd_width)}},
    {"reads_a_lane_that_takes_no_part", {PLANTED(reads_a_lane_that_takes_no_part)}},
    {"mma_in_half_a_warp", {PLANTED(mma_in_half_a_warp)}},
};

}  // namespace planted
