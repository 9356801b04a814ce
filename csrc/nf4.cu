// nf4_dequantize: NF4 storage -> bf16, fp16 or fp32, one launch, nested absmax included.
//
// Bound by memory. 4096x4096 to bf16, blocks of 64, nested: 8.4 MB of codes and 0.3 MB of absmax in, 33.6 MB out; four
// fifths of the traffic is stores. 42.2 MB at 3.0 to 3.35 TB/s (H100) are 12.6 to 14.1 us. Per element: one look-up in
// shared memory, one multiply, half a conversion, about 11 instructions with unpacking and addresses (counted in the
// SASS of sm_90); 16.8 M elements are 5.9 M warp instructions, 6 to 7 us of the issue slots of 132 SMs, under the
// memory time. Nothing here was timed yet.
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
// Shared memory: 64 bytes of NF4 values, one a bank, so that 32 look-ups never conflict; 1 kB of absmax_code.
//
// A vector never straddles two quantization blocks (it starts at a multiple of its size and blocksize >= 32), so it
// needs one absmax. Elements past the last whole vector, and all of them if a pointer is not aligned, take the scalar
// loop at the end: exact, slow, for tails and offset views.
#include <type_traits>

#include "common.cuh"

namespace fastpeft {
namespace {

constexpr int kThreads = 256;  // also the size of absmax_code
constexpr int kVectorsPerThread = 4;

template <class T>
struct Tile {
  static constexpr int vector = 16 / sizeof(T);                           // elements in one 16-byte store
  static constexpr int stride = kThreads * vector;                        // elements between two vectors of one thread
  static constexpr int size = stride * kVectorsPerThread;                 // elements of a CTA
  using Packed = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;  // the codes of one vector
};

// The absmax of one quantization block: what is loaded, and what it means.
template <bool NESTED>
struct Absmax {
  float value;
  unsigned code;  // nested only

  __device__ __forceinline__ void load(const Nf4Storage& w, int64_t block) {
    value = NESTED ? __ldg(w.absmax2 + block / 256) : __ldg(w.absmax + block);
    code = NESTED ? __ldg(w.absmax_u8 + block) : 0;
  }
  // bitsandbytes decodes a nested absmax in two passes, hence two roundings: a fused multiply-add would differ from it
  // in the last bit.
  __device__ __forceinline__ float decode(const float* absmax_code, float offset) const {
    return NESTED ? __fadd_rn(__fmul_rn(absmax_code[code], value), offset) : value;
  }
};

// blocksize is passed as its logarithm; vector_end is the number of elements that go by whole vectors.
template <class T, bool NESTED>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(Nf4Storage w, T* __restrict__ out, int64_t numel, int64_t vector_end, int blocksize_log2) {
  using Packed = typename Tile<T>::Packed;
  using Pair = typename Rounded<T>::Pair;
  constexpr int V = Tile<T>::vector;

  const int64_t tile_begin = static_cast<int64_t>(blockIdx.x) * Tile<T>::size;
  const int64_t first = tile_begin + threadIdx.x * V;

  Packed codes[kVectorsPerThread];
  Absmax<NESTED> absmax[kVectorsPerThread];
  if (tile_begin < vector_end) {
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      // Clamped where the last tile is short, not skipped: branches would make the loads wait for one another.
      const int64_t i = min(first + j * Tile<T>::stride, vector_end - V);
      codes[j] = __ldcs(reinterpret_cast<const Packed*>(w.packed + i / 2));
      absmax[j].load(w, i >> blocksize_log2);
    }
  }

  __shared__ float nf4_code[16];
  __shared__ float absmax_code[NESTED ? kThreads : 1];
  const float offset = NESTED ? __ldg(w.absmax_offset) : 0.0f;
  if (threadIdx.x < 16) nf4_code[threadIdx.x] = kNf4Code[threadIdx.x];
  if constexpr (NESTED) absmax_code[threadIdx.x] = __ldg(w.absmax_code + threadIdx.x);
  __syncthreads();

#pragma unroll
  for (int j = 0; j < kVectorsPerThread; ++j) {
    const int64_t i = first + j * Tile<T>::stride;
    if (i < vector_end) {
      const float scale = absmax[j].decode(absmax_code, offset);
      alignas(16) Pair pairs[V / 2];
#pragma unroll
      for (int k = 0; k < V / 2; ++k) {
        const unsigned byte = codes[j] >> (8 * k) & 0xff;  // little-endian: the first byte is the lowest
        pairs[k] = Rounded<T>::two(__fmul_rn(nf4_code[byte >> 4], scale), __fmul_rn(nf4_code[byte & 15], scale));
      }
      *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(pairs);
    }
  }

  const int64_t end = min(tile_begin + Tile<T>::size, numel);
#pragma unroll 1
  for (int64_t i = max(tile_begin, vector_end) + threadIdx.x; i < end; i += kThreads) {
    const unsigned byte = w.packed[i / 2];
    const unsigned nibble = i % 2 == 0 ? byte >> 4 : byte & 15;
    Absmax<NESTED> block;
    block.load(w, i >> blocksize_log2);
    out[i] = Rounded<T>::one(__fmul_rn(nf4_code[nibble], block.decode(absmax_code, offset)));
  }
}

template <class T>
cudaError_t dequantize_to(const Nf4DequantizeParams& p, cudaStream_t stream) {
  const bool vectors = is_aligned(p.out, 16) && is_aligned(p.weight.packed, sizeof(typename Tile<T>::Packed));
  const int64_t vector_end = vectors ? p.numel / Tile<T>::vector * Tile<T>::vector : 0;
  const auto tiles = static_cast<unsigned>((p.numel + Tile<T>::size - 1) / Tile<T>::size);
  const auto kernel = p.weight.absmax ? nf4_dequantize_kernel<T, false> : nf4_dequantize_kernel<T, true>;
  int blocksize_log2 = 5;
  while (1 << blocksize_log2 < p.weight.blocksize) ++blocksize_log2;
  return launch(kernel, dim3(tiles), dim3(kThreads), 0, stream, p.weight, static_cast<T*>(p.out), p.numel, vector_end,
                blocksize_log2);
}

}  // namespace

cudaError_t nf4_dequantize(const Nf4DequantizeParams& p, cudaStream_t stream) {
  const int blocksize = p.weight.blocksize;
  if (p.numel < 0 || blocksize < 32 || (blocksize & (blocksize - 1)) != 0) return cudaErrorInvalidValue;
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
