// Operations of warps and blocks, one function each; test_intrinsics.py has the same names in numpy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>

#include "kernels.h"
#include "run.h"

namespace {

struct Lane {
  int value, lane;
  unsigned mask;  // the lanes of this warp that exist
};

// An operation is a lambda without captures, so its type says all.
template <class Operation>
__global__ void warp_kernel(const int* in, int* out) {
  const int warp = threadIdx.x / 32, lanes = min(32, blockDim.x - 32 * warp);
  const Lane lane{in[threadIdx.x], static_cast<int>(threadIdx.x % 32), 0xffffffffu >> (32 - lanes)};
  out[threadIdx.x] = static_cast<int>(Operation{}(lane));
}

using Run = void (*)(const int* in, int* out, int threads);

template <class Operation>
Run operation(Operation) {
  return [](const int* in, int* out, int threads) { run(warp_kernel<Operation>, dim3(1), dim3(threads), 0, in, out); };
}

const std::map<std::string, Run> kOperations = {
    {"shfl", operation([](Lane l) { return __shfl_sync(l.mask, l.value, 3); })},
    {"shfl_width_8", operation([](Lane l) { return __shfl_sync(l.mask, l.value, l.lane + 5, 8); })},
    {"shfl_up", operation([](Lane l) { return __shfl_up_sync(l.mask, l.value, 2); })},
    {"shfl_up_width_8", operation([](Lane l) { return __shfl_up_sync(l.mask, l.value, 3, 8); })},
    {"shfl_down", operation([](Lane l) { return __shfl_down_sync(l.mask, l.value, 5); })},
    {"shfl_down_width_16", operation([](Lane l) { return __shfl_down_sync(l.mask, l.value, 2, 16); })},
    {"shfl_xor", operation([](Lane l) { return __shfl_xor_sync(l.mask, l.value, 5); })},
    {"shfl_xor_width_8", operation([](Lane l) { return __shfl_xor_sync(l.mask, l.value, 9, 8); })},
    {"ballot", operation([](Lane l) { return __ballot_sync(l.mask, l.value & 2); })},
    {"any", operation([](Lane l) { return __any_sync(l.mask, l.value == 7); })},
    {"all", operation([](Lane l) { return __all_sync(l.mask, l.value < 20); })},
    {"match_any", operation([](Lane l) { return __match_any_sync(l.mask, l.value & 3); })},
    {"match_all", operation([](Lane l) {
       int equal;
       const unsigned lanes = __match_all_sync(l.mask, l.value >= 0, &equal);
       return equal ? lanes : 0;
     })},
    {"match_all_not", operation([](Lane l) {
       int equal;
       return __match_all_sync(l.mask, l.value & 1, &equal) + 2 * equal;
     })},
    {"reduce_add", operation([](Lane l) { return __reduce_add_sync(l.mask, l.value - 15); })},
    {"reduce_min", operation([](Lane l) { return __reduce_min_sync(l.mask, l.value - 15); })},
    {"reduce_max", operation([](Lane l) { return __reduce_max_sync(l.mask, -l.value); })},
    {"reduce_max_unsigned", operation([](Lane l) { return __reduce_max_sync(l.mask, unsigned(l.value - 15)); })},
    {"reduce_add_unsigned", operation([](Lane l) { return __reduce_add_sync(l.mask, 0xf0000000u + l.value); })},
    {"reduce_and", operation([](Lane l) { return __reduce_and_sync(l.mask, unsigned(l.value | 8)); })},
    {"reduce_or", operation([](Lane l) { return __reduce_or_sync(l.mask, unsigned(l.value)); })},
    {"reduce_xor", operation([](Lane l) { return __reduce_xor_sync(l.mask, unsigned(l.value)); })},
    // The halves of a warp in different branches, each with its own mask.
    {"reduce_by_halves", operation([](Lane l) {
       if (l.lane < 16) return __reduce_add_sync(l.mask & 0x0000ffffu, l.value);
       return __reduce_add_sync(l.mask & 0xffff0000u, 2 * l.value);
     })},
    {"syncwarp", operation([](Lane l) {
       __shared__ int values[1024];
       values[threadIdx.x] = l.value;
       __syncwarp(l.mask);
       return values[min(threadIdx.x ^ 1, blockDim.x - 1)];
     })},
    {"activemask", operation([](Lane l) { return __activemask() >> l.lane & 1; })},
    {"syncthreads", operation([](Lane l) {
       __shared__ int values[1024];
       values[threadIdx.x] = l.value;
       __syncthreads();
       return values[blockDim.x - 1 - threadIdx.x];
     })},
    {"syncthreads_count", operation([](Lane l) { return __syncthreads_count(l.value & 1); })},
    {"syncthreads_or", operation([](Lane l) { return __syncthreads_or(l.value == 7); })},
    {"syncthreads_and", operation([](Lane l) { return __syncthreads_and(l.value < 20); })},
};

template <class T>
__global__ void shuffle_type_kernel(const T* in, T* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

template <class T>
void shuffle(const void* in, void* out, int threads) {
  run(shuffle_type_kernel<T>, dim3(1), dim3(threads), 0, static_cast<const T*>(in), static_cast<T*>(out));
}

__global__ void indices_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned* const mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  mine[0] = blockIdx.x;
  mine[1] = blockIdx.y;
  mine[2] = blockIdx.z;
  mine[3] = threadIdx.x;
  mine[4] = threadIdx.y;
  mine[5] = threadIdx.z;
}

}  // namespace

std::vector<std::string> warp_operations() { return names_of(kOperations); }
void warp_operation(const std::string& name, const int* in, int* out, int threads) {
  kOperations.at(name)(in, out, threads);
}

void shuffle_type(const std::string& type, const void* in, void* out, int threads) {
  static const std::map<std::string, void (*)(const void*, void*, int)> types = {
      {"half", shuffle<__half>},   {"bfloat16", shuffle<__nv_bfloat16>}, {"half2", shuffle<__half2>},
      {"float", shuffle<float>},   {"unsigned", shuffle<unsigned>},      {"double", shuffle<double>},
      {"int64", shuffle<int64_t>},
  };
  types.at(type)(in, out, threads);
}

void indices(dim3 grid, dim3 block, unsigned* out) { run(indices_kernel, grid, block, 0, out); }
