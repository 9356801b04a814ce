// The tensor-core instructions that csrc/ptx.cuh wraps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "language.h"

namespace emulation {

using ToFloat = float (*)(uint16_t bits);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, ToFloat to_float, Site site);
void ldmatrix(int matrices, bool transposed, uint32_t* registers, const void* row, Site site);

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32: d[4] (16x8) += a[4] (16x16) * b[2] (16x8), T = __half, __nv_bfloat16.
template <class T>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site = Site::current()) {
  const ToFloat to_float = [](uint16_t bits) { return static_cast<float>(std::bit_cast<T>(bits)); };
  mma_m16n8k16(d, a, b, to_float, site);
}

// ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16: lane i gives the address of row i % 8 of matrix i / 8.
template <int Matrices, bool Transposed>
void ldmatrix(uint32_t* registers, const void* row, Site site = Site::current()) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  ldmatrix(Matrices, Transposed, registers, row, site);
}

}  // namespace emulation
