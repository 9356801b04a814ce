// PTX instructions that CUDA C++ has no function for: the tensor-core product and the loads that feed it. No other file
// holds inline assembly. Executed on a CPU (CUDA_EMULATION), each calls its twin, which is told the line of its caller,
// so that an error names the kernel's line and not this file's.
//
// A matrix of 16-bit elements is spread over a warp two to a register. With g = lane / 4 and t = lane % 4:
//   mma a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//       b[0] = B[2t, 2t+1][g]   b[1] = B[2t+8, 2t+9][g]
//       d[0], d[1] = D[g][2t, 2t+1]   d[2], d[3] = D[g+8][2t, 2t+1]     where D [16, 8] += A [16, 16] * B [16, 8]
//   ldmatrix r[i] = M[g][2t, 2t+1], trans: M[2t, 2t+1][g], of the 8x8 matrix M whose row j lies at the address that
//   lane
//       8 * i + j gives. A row is 16 bytes, aligned; 8 rows whose addresses differ modulo 128 load without conflict.
// Source: PTX ISA, sections "mma.m16n8k16 with floating point types" and "ldmatrix".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastpeft {

#if defined(CUDA_EMULATION)

using emulation::Site;

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  emulation::mma_m16n8k16<T>(d, a, b, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  emulation::ldmatrix<4, false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  emulation::ldmatrix<4, true>(r, row, site);
}
inline void cp_async_16(void* smem, const void* gmem, bool valid = true, Site site = Site::current()) {
  emulation::cp_async(smem, gmem, 16, valid ? 16 : 0, site);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  emulation::cp_async_wait(N);
}
inline void hold_loads() {}
inline void prefetch(const void*) {}
inline void start_dependents() {}
inline void wait_for_dependency() { emulation::wait_for_dependency(); }

#else

// d += a * b, accumulated in float32; T is __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices from shared memory; `row` is the address of this lane's row, see above.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a copy of 16 aligned bytes to shared memory; valid = false writes zeros and reads nothing.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of copies; cp_async_wait<N> returns when all but the N latest groups of this thread have landed. The
// copies of other threads are there after a barrier that follows their waits.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Orders nothing that the program can see: ptxas, which lets unrolled code begin with all of its loads, moves no load
// across.
__device__ __forceinline__ void hold_loads() { __syncwarp(); }

// Brings the line of L2 that holds this address there.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Programmatic dependent launch (launch_dependent in common.cuh); no-ops before sm_90. The kernel that depends on this
// one may be scheduled once every CTA of this one has come here or ended.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel before this one has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_dependency() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

}  // namespace fastpeft
