// Addresses and values.
#include "planted.h"

namespace planted {
namespace {

template <bool Bug>
__global__ void reads_past_the_end_kernel(const float* in, float* out, unsigned n) {
  out[threadIdx.x] = in[threadIdx.x + (Bug && threadIdx.x == n - 1)];  // named
}

template <bool Bug>
__global__ void vector_past_the_end_kernel(const float* in, float* out, unsigned n) {
  const unsigned vector = Bug && threadIdx.x == 0 ? n / 4 : threadIdx.x / 4;
  out[threadIdx.x] = reinterpret_cast<const float4*>(in)[vector].x;  // named
}

template <bool Bug>
__global__ void writes_past_the_end_kernel(const float* in, float* out, unsigned n) {
  out[threadIdx.x + (Bug && threadIdx.x == n - 1)] = in[threadIdx.x];  // named
}

template <bool Bug>
__global__ void writes_before_the_begin_kernel(const float* in, float* out, unsigned) {
  const int i = threadIdx.x;
  out[i - (Bug && i == 0)] = in[i];  // named
}

template <bool Bug>
__global__ void index_that_wraps_kernel(const float* in, float* out, unsigned) {
  out[threadIdx.x] = in[threadIdx.x - (Bug && threadIdx.x == 0)];  // named
}

template <bool Bug>
__global__ void index_out_of_an_array_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x + Bug] = in[threadIdx.x];  // named
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

// Behind a pointer the compiler does not know the array.
template <bool Bug>
__global__ void shared_memory_overrun_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  float* const to = tile + (Bug && threadIdx.x >= 64);
  to[threadIdx.x] = in[threadIdx.x];  // named
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Bug>
__global__ void dynamic_shared_memory_overrun_kernel(const float* in, float* out, unsigned) {
  DYNAMIC_SMEM(smem);
  float* const tile = reinterpret_cast<float*>(smem) + (Bug && threadIdx.x >= 64);
  tile[threadIdx.x] = in[threadIdx.x];  // named
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(smem)[threadIdx.x];
}

template <bool Bug>
__global__ void misaligned_vector_kernel(const float* in, float* out, unsigned) {
  const float* const from = in + (threadIdx.x / 4 * 4) - (Bug && threadIdx.x >= 4);
  out[threadIdx.x] = reinterpret_cast<const float4*>(from)->y;  // named
}

template <bool Bug>
__global__ void misaligned_atomic_kernel(const float* in, float* out, unsigned) {
  char* const address = reinterpret_cast<char*>(out + threadIdx.x / 2) + (Bug ? 2 : 0);
  atomicAdd(reinterpret_cast<float*>(address), in[0]);  // named
}

template <bool Bug>
__global__ void uninitialised_shared_memory_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  if (!Bug || threadIdx.x != 0) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];  // named
}

// The block before left its values there.
template <bool Bug>
__global__ void shared_memory_of_another_block_kernel(const float* in, float* out, unsigned) {
  __shared__ float tile[kThreads];
  if (!Bug || blockIdx.x == 0) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x / 64 == blockIdx.x) out[threadIdx.x] = tile[threadIdx.x];  // named
}

template <bool Bug>
__global__ void uninitialised_accumulator_kernel(const float* in, float* out, unsigned) {
  float sum;
  if constexpr (!Bug) sum = 0;
  for (int i = 0; i <= static_cast<int>(threadIdx.x); ++i) sum += in[i];
  out[threadIdx.x] = sum;
}

template <bool Bug>
__global__ void null_pointer_kernel(const float* in, float* out, unsigned) {
  const float* const from = Bug && threadIdx.x == 5 ? nullptr : in;
  out[threadIdx.x] = from[0] + in[threadIdx.x];  // named
}

template <bool Bug>
__global__ void shift_by_32_kernel(const float* in, float* out, unsigned) {
  const int count = Bug ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x % 8);
  out[threadIdx.x] = in[threadIdx.x] + (1 << count);  // named
}

template <bool Bug>
__global__ void int_that_overflows_kernel(const float* in, float* out, unsigned) {
  const int rows = Bug ? 1 << 26 : 64;
  const int offset = static_cast<int>(threadIdx.x) * rows;  // named
  out[threadIdx.x] = in[threadIdx.x] + (offset & 127);
}

template <bool Bug>
__global__ void ldmatrix_of_a_misaligned_row_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[33][4];
  for (int i = threadIdx.x; i < 33 * 4; i += kThreads) tile[i / 4][i % 4] = in[i % kThreads];
  __syncthreads();
  uint32_t registers[4];
  fastpeft::ldmatrix_x4(registers, &tile[threadIdx.x % 32][Bug ? 1 : 0]);  // named
  out[threadIdx.x] = __uint_as_float(registers[threadIdx.x / 32]);
}

template <bool Bug>
__global__ void ldmatrix_past_the_end_kernel(const float* in, float* out, unsigned) {
  __shared__ __align__(16) float tile[32][4];
  tile[threadIdx.x / 4][threadIdx.x % 4] = in[threadIdx.x];
  __syncthreads();
  uint32_t registers[4];
  const float* const row = &tile[0][0] + 4 * (threadIdx.x % 32 + Bug);
  fastpeft::ldmatrix_x4(registers, row);  // named
  out[threadIdx.x] = __uint_as_float(registers[threadIdx.x / 32]);
}

}  // namespace

const Table kMemory = {
    {"reads_past_the_end", {PLANTED(reads_past_the_end)}},
    {"vector_past_the_end", {PLANTED(vector_past_the_end)}},
    {"writes_past_the_end", {PLANTED(writes_past_the_end)}},
    {"writes_before_the_begin", {PLANTED(writes_before_the_begin)}},
    {"index_that_wraps", {PLANTED(index_that_wraps)}},
    {"index_out_of_an_array", {PLANTED(index_out_of_an_array)}},
    {"shared_memory_overrun", {PLANTED(shared_memory_overrun)}},
    {"dynamic_shared_memory_overrun",
     {PLANTED(dynamic_shared_memory_overrun), {1, kThreads, kThreads * sizeof(float)}}},
    {"misaligned_vector", {PLANTED(misaligned_vector)}},
    {"misaligned_atomic", {PLANTED(misaligned_atomic)}},
    {"uninitialised_shared_memory", {PLANTED(uninitialised_shared_memory)}},
    {"shared_memory_of_another_block", {PLANTED(shared_memory_of_another_block), {2}}},
    {"uninitialised_accumulator", {PLANTED(uninitialised_accumulator)}},
    {"null_pointer", {PLANTED(null_pointer)}},
    {"shift_by_32", {PLANTED(shift_by_32)}},
    {"int_that_overflows", {PLANTED(int_that_overflows)}},
    {"ldmatrix_of_a_misaligned_row", {PLANTED(ldmatrix_of_a_misaligned_row)}},
    {"ldmatrix_past_the_end", {PLANTED(ldmatrix_past_the_end)}},
};

}  // namespace planted
