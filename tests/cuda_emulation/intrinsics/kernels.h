// What test_intrinsics.py calls. Kernels take raw addresses of numpy arrays.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

// out[thread] = operation(in[thread]), one block of `threads` threads.
std::vector<std::string> warp_operations();
void warp_operation(const std::string& name, const int* in, int* out, int threads);
// out[thread] = in[thread ^ 1], elements of `bytes` bytes: 2 (half and bfloat16), 4 (float), 8 (double and int64).
void shuffle_type(const std::string& type, const void* in, void* out, int threads);

// out[i] = operation(a[i], b[i], c[i]), bits in and out.
std::vector<std::string> scalar_operations();
void scalar_operation(const std::string& name, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out,
                      int n);

// Every thread updates *total by its value and keeps what was there before. T: int, unsigned, float, uint64.
std::vector<std::string> atomic_operations();
void atomic_operation(const std::string& name, const unsigned* in, unsigned* old, unsigned* total, int threads);
void atomic_add(const std::string& type, const void* in, void* total, int threads);

// Where each thread is: out[block][thread] = {blockIdx, threadIdx}, six unsigned.
void indices(dim3 grid, dim3 block, unsigned* out);

// d[lane][4] += the product of the fragments a[lane][4], b[lane][2].
void mma(bool bf16, const uint32_t* a, const uint32_t* b, float* d);
// out[lane][matrices] from `rows` rows of 8 elements, `stride_bytes` apart in shared memory.
void load_matrices(int matrices, bool transposed, const uint16_t* rows, int stride_bytes, uint32_t* out);
// out [16, 8] = a [16, 16] @ b [8, 16]^T by ldmatrix and mma.
void multiply(const uint16_t* a, const uint16_t* b, float* out);

// out[0..n) is the first of two groups of copies after wait<1>, out[n..2n) the second one then, out[2n..3n) after
// wait<0>.
void copy_groups(int bytes, int valid_bytes, const unsigned char* in, unsigned char* out, int threads);
