// Atomics, asynchronous copies, and the tensor-core instructions with the loads that feed them.
#include <map>

#include "common.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "run.h"

namespace {

// An operation is a lambda without captures, so its type says all.
template <class Operation>
__global__ void atomic_kernel(const unsigned* in, unsigned* old, unsigned* total) {
  old[threadIdx.x] = Operation{}(total, in[threadIdx.x]);
}

using Run = void (*)(const unsigned* in, unsigned* old, unsigned* total, int threads);

template <class Operation>
Run operation(Operation) {
  return [](const unsigned* in, unsigned* old, unsigned* total, int threads) {
    run(atomic_kernel<Operation>, dim3(1), dim3(threads), 0, in, old, total);
  };
}

const std::map<std::string, Run> kOperations = {
    {"Add", operation([](unsigned* p, unsigned v) { return atomicAdd(p, v); })},
    {"Sub", operation([](unsigned* p, unsigned v) { return atomicSub(p, v); })},
    {"Min", operation([](unsigned* p, unsigned v) { return atomicMin(p, v); })},
    {"Max", operation([](unsigned* p, unsigned v) { return atomicMax(p, v); })},
    {"And", operation([](unsigned* p, unsigned v) { return atomicAnd(p, v); })},
    {"Or", operation([](unsigned* p, unsigned v) { return atomicOr(p, v); })},
    {"Xor", operation([](unsigned* p, unsigned v) { return atomicXor(p, v); })},
    {"Exch", operation([](unsigned* p, unsigned v) { return atomicExch(p, v); })},
    {"Inc", operation([](unsigned* p, unsigned) { return atomicInc(p, 4u); })},
    {"Dec", operation([](unsigned* p, unsigned) { return atomicDec(p, 4u); })},
    {"CAS", operation([](unsigned* p, unsigned v) {  // an addition made of it
       unsigned old = *const_cast<volatile unsigned*>(p);
       for (unsigned seen; (seen = atomicCAS(p, old, old + v)) != old;) old = seen;
       return old;
     })},
};

template <class T>
__global__ void atomic_add_kernel(const T* in, T* total) {
  __shared__ T block_total;
  if (threadIdx.x == 0) block_total = 0;
  __syncthreads();
  atomicAdd(&block_total, in[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(total, block_total);
}

template <class T>
void add(const void* in, void* total, int threads) {
  run(atomic_add_kernel<T>, dim3(2), dim3(threads), 0, static_cast<const T*>(in), static_cast<T*>(total));
}

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t a_fragment[4], b_fragment[2];
  float d_fragment[4];
  for (int i = 0; i < 4; ++i) a_fragment[i] = a[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) b_fragment[i] = b[2 * threadIdx.x + i];
  for (int i = 0; i < 4; ++i) d_fragment[i] = d[4 * threadIdx.x + i];
  fastpeft::mma_m16n8k16<T>(d_fragment, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = d_fragment[i];
}

template <int Matrices, bool Transposed>
__global__ void load_matrices_kernel(const uint16_t* rows, int stride_bytes, uint32_t* out) {
  DYNAMIC_SMEM(smem);
  const auto row = [&](int i) { return reinterpret_cast<uint16_t*>(smem + i * stride_bytes); };
  if (threadIdx.x < 8 * Matrices) {
    for (int i = 0; i < 8; ++i) row(threadIdx.x)[i] = rows[8 * threadIdx.x + i];
  }
  __syncwarp();
  uint32_t registers[Matrices];
  emulation::ldmatrix<Matrices, Transposed>(registers, row(threadIdx.x % (8 * Matrices)));
  for (int i = 0; i < Matrices; ++i) out[Matrices * threadIdx.x + i] = registers[i];
}

__global__ void multiply_kernel(const uint16_t* a, const uint16_t* b, float* out) {
  __shared__ __align__(16) uint16_t a_tile[16][16], b_tile[8][16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) b_tile[i / 16][i % 16] = b[i];
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[4];
  fastpeft::ldmatrix_x4(a_fragment, &a_tile[lane % 16][lane / 16 * 8]);
  fastpeft::ldmatrix_x4(b_fragment, &b_tile[lane % 8][lane / 8 % 2 * 8]);
  float d[4] = {};
  fastpeft::mma_m16n8k16<__half>(d, a_fragment, {b_fragment[0], b_fragment[1]});
  float* const at = out + lane / 4 * 8 + lane % 4 * 2;
  at[0] = d[0];
  at[1] = d[1];
  at[64] = d[2];
  at[65] = d[3];
}

__global__ void copy_groups_kernel(int bytes, int valid_bytes, const unsigned char* in, unsigned char* out) {
  DYNAMIC_SMEM(smem);
  const int n = bytes * blockDim.x, mine = bytes * threadIdx.x;
  const auto keep = [&](int from, int to) {
    for (int i = 0; i < bytes; ++i) out[to + mine + i] = smem[from + mine + i];
  };
  emulation::cp_async(smem + mine, in + mine, bytes, valid_bytes);
  emulation::cp_async_commit();
  emulation::cp_async(smem + n + mine, in + n + mine, bytes, bytes);
  emulation::cp_async_commit();
  emulation::cp_async_wait(1);
  keep(0, 0);
  keep(n, n);
  emulation::cp_async_wait(0);
  keep(n, 2 * n);
}

}  // namespace

std::vector<std::string> atomic_operations() { return names_of(kOperations); }
void atomic_operation(const std::string& name, const unsigned* in, unsigned* old, unsigned* total, int threads) {
  kOperations.at(name)(in, old, total, threads);
}
void atomic_add(const std::string& type, const void* in, void* total, int threads) {
  static const std::map<std::string, void (*)(const void*, void*, int)> types = {
      {"int", add<int>}, {"float", add<float>}, {"double", add<double>}, {"uint64", add<unsigned long long>}};
  types.at(type)(in, total, threads);
}

void mma(bool bf16, const uint32_t* a, const uint32_t* b, float* d) {
  run(bf16 ? mma_kernel<__nv_bfloat16> : mma_kernel<__half>, dim3(1), dim3(32), 0, a, b, d);
}
void load_matrices(int matrices, bool transposed, const uint16_t* rows, int stride_bytes, uint32_t* out) {
  const auto kernel = matrices == 1   ? transposed ? load_matrices_kernel<1, true> : load_matrices_kernel<1, false>
                      : matrices == 2 ? transposed ? load_matrices_kernel<2, true> : load_matrices_kernel<2, false>
                      : transposed    ? load_matrices_kernel<4, true>
                                      : load_matrices_kernel<4, false>;
  run(kernel, dim3(1), dim3(32), 8 * matrices * stride_bytes, rows, stride_bytes, out);
}
void multiply(const uint16_t* a, const uint16_t* b, float* out) {
  run(multiply_kernel, dim3(1), dim3(32), 0, a, b, out);
}
void copy_groups(int bytes, int valid_bytes, const unsigned char* in, unsigned char* out, int threads) {
  run(copy_groups_kernel, dim3(1), dim3(threads), 2 * bytes * threads, bytes, valid_bytes, in, out);
}
