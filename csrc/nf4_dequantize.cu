// nf4_dequantize: NF4 storage -> bf16, fp16 or fp32, one launch, nested absmax included.
//
// Bound by memory. 4096x4096 to bf16, blocks of 64, nested: 8.4 MB of codes and 0.3 MB of absmax in, 33.6 MB out; four
// fifths of the traffic is stores. 42.2 MB at 3.0 to 3.35 TB/s (H100) are 12.6 to 14.1 us. Per element: a shuffle, a
// multiply, half a conversion, about 9 instructions with unpacking and addresses (counted in the SASS of sm_90a); 16.8
// M elements are 4.8 M warp instructions, 5 us of the issue slots of 132 SMs, under the memory time. Nothing here was
// timed yet.
//
// Work split: a CTA of 256 threads owns a tile of 256 * 4 vectors. A vector is 16 bytes of output (8 elements of bf16,
// 4 of fp32), so a warp stores 512 contiguous bytes and loads the 128 (fp32: 64) contiguous bytes of codes that belong
// to them. Wider loads, 16 bytes a thread, would put a warp's stores 64 bytes apart: half-written sectors on the side
// that carries the traffic, or a transposition to avoid them. All loads of a thread are independent of one another and
// issued before the first wait: 2048 threads * 4 vectors * 4 bytes keep 32 kB of codes in flight on an SM. That is why
// absmax_code, the one dependent look-up of a nested absmax, is copied to shared memory, an entry a thread.
//
// The codes are read once and marked so (__ldcs: evict first). The output is not: the product that follows reads it
// from L2 (50 MB on an H100).
//
// Shared memory: 1 kB of absmax_code. Look-ups conflict where lanes meet in a bank; there is one for each 8 elements.
//
// A vector never straddles two quantization blocks (it starts at a multiple of its size and blocksize >= 32), so it
// needs one absmax. Elements past the last whole vector, and all of them if a pointer is not aligned, take the scalar
// loop at the end: exact, slow, for tails and offset views.
#include "nf4.cuh"

namespace fastpeft {
namespace {

// aligned: out to a vector, and the codes to those of one. Without it, all is left to the scalar loop.
template <class T, bool NESTED>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(Nf4Storage w, T* __restrict__ out, int64_t numel, bool aligned, int blocksize_log2) {
  using Packed = typename Tile<T>::Packed;
  using Pair = typename Rounded<T>::Pair;
  constexpr int V = Tile<T>::vector;

  // From here on all is relative to the tile, which begins with a quantization block.
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * Tile<T>::size;
  const int64_t first_block = begin >> blocksize_log2;
  const int count = static_cast<int>(min(numel - begin, static_cast<int64_t>(Tile<T>::size)));
  const int vector_end = aligned ? count / V * V : 0;
  const int first = static_cast<int>(threadIdx.x) * V;
  const uint8_t* const packed = w.packed + begin / 2;
  out += begin;

  Packed codes[kVectorsPerThread];
  Absmax<NESTED> absmax[kVectorsPerThread];
  if (vector_end > 0) {
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      // Clamped where the last tile is short, not skipped: branches would make the loads wait for one another.
      const int i = min(first + j * Tile<T>::stride, vector_end - V);
      codes[j] = __ldcs(reinterpret_cast<const Packed*>(packed + i / 2));
      absmax[j].load(w, first_block + (i >> blocksize_log2));
    }
  }

  __shared__ float absmax_code[NESTED ? kThreads : 1];  // 256 entries, one a thread
  const float offset = NESTED ? __ldg(w.absmax_offset) : 0.0f;
  if constexpr (NESTED) {
    absmax_code[threadIdx.x] = __ldg(w.absmax_code + threadIdx.x);
    __syncthreads();
  }

  if (vector_end > 0) {
    const Nf4Table nf4_code;
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      const float scale = absmax[j].decode(absmax_code, offset);
      alignas(16) Pair pairs[V / 2];
#pragma unroll
      for (int k = 0; k < V / 2; ++k) {
        // The first byte is the lowest, the even element is in its high nibble.
        pairs[k] = Rounded<T>::two(__fmul_rn(nf4_code[codes[j] >> (8 * k + 4)], scale),
                                   __fmul_rn(nf4_code[codes[j] >> (8 * k)], scale));
      }
      const int i = first + j * Tile<T>::stride;
      if (i < vector_end) *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(pairs);
    }
  }

#pragma unroll 1
  for (int i = vector_end + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const unsigned byte = packed[i / 2];
    const unsigned nibble = i % 2 == 0 ? byte >> 4 : byte & 15;
    Absmax<NESTED> block;
    block.load(w, first_block + (i >> blocksize_log2));
    out[i] = Rounded<T>::one(__fmul_rn(kNf4Code[nibble], block.decode(absmax_code, offset)));
  }
}

template <class T>
cudaError_t dequantize_to(const Nf4DequantizeParams& p, cudaStream_t stream) {
  const bool aligned = is_aligned(p.out, 16) && is_aligned(p.weight.packed, sizeof(typename Tile<T>::Packed));
  const auto tiles = static_cast<unsigned>((p.numel + Tile<T>::size - 1) / Tile<T>::size);
  const auto kernel = p.weight.absmax ? nf4_dequantize_kernel<T, false> : nf4_dequantize_kernel<T, true>;
  return launch(kernel, dim3(tiles), dim3(kThreads), 0, stream, p.weight, static_cast<T*>(p.out), p.numel, aligned,
                log2_of(p.weight.blocksize));
}

}  // namespace

cudaError_t nf4_dequantize(const Nf4DequantizeParams& p, cudaStream_t stream) {
  if (p.numel < 0 || !is_blocksize(p.weight.blocksize)) return cudaErrorInvalidValue;
  if (p.numel == 0) return cudaSuccess;
  switch (p.out_dtype) {
    case DType::bf16:
      return dequantize_to<__nv_bfloat16>(p, stream);
    case DType::fp16:
      return dequantize_to<__half>(p, stream);
    case DType::fp32:
      return dequantize_to<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastpeft
