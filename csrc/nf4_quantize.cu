// nf4_quantize: bf16, fp16 or fp32 -> NF4 codes and float32 absmax, bit for bit those of bitsandbytes on a CPU.
// nf4_quantize_absmax: the absmax vector, less its mean, to 8 bits.
//
// nf4_quantize is bound by memory, but not by much. 4096x4096 of bf16, blocks of 64: 33.6 MB in, 8.4 MB of codes and
// 1.0 MB of absmax out; 43.0 MB at 3.0 to 3.35 TB/s (H100) are 12.8 to 14.3 us. About 18 instructions an element
// (counted in the SASS of sm_90a) are 9.4 M warp instructions, 10 us of the issue slots of 132 SMs. Nothing here was
// timed yet.
//
// Work split: that of nf4_dequantize, read backwards. A CTA owns a tile of 256 * 4 vectors of 16 bytes of weight, 4 a
// thread, loaded once and kept in registers between the maximum and the codes; a vector's codes leave as one word, 128
// contiguous bytes a warp. 6 CTAs * 256 threads * 64 bytes keep 96 kB of loads in flight on an SM. A tile holds 8192
// elements (fp32: 4096), so it is cut into whole quantization blocks, whatever their size, and a block is cut into
// whole vectors, which makes one kernel of all block sizes: the maximum of a block is taken in a vector, across the
// lanes that share the block, and, where a block is longer than the 32 vectors of a warp's row, across the 32 rows of
// the tile.
//
// The nearest code without a search: [-1, 1] is cut into 31 cells so narrow that none holds two of the 15 boundaries
// between codes. A cell knows how many boundaries lie below it and which one, if any, inside, so the code of v is
//   below[cell(v)] + (v > boundary[cell(v)])
// exactly, however cell() rounds: its edges are no boundaries, and on either side of them the sum is the same. A lane
// holds a cell and two shuffles look it up: 9 instructions an element. A search takes 4 comparisons and 11 selections,
// or 3 look-ups that wait for one another.
//
// Shared memory: a word for each row of the tile, read and written without conflicts.
//
// Exactness. Magnitudes are compared as the unsigned integers that their bits are: the order of the floats, with NaN
// above infinity, so that one NaN makes the block's absmax NaN, as torch.amax does. A full block is multiplied by
// 1 / max(absmax, 1e-38); the last one, if it is short, is divided by it and stores it. NaN has code 15.
#include "nf4.cuh"

namespace fastpeft {
namespace {

constexpr int kRows = kThreads / 32 * kVectorsPerThread;  // a row is the 32 vectors that a warp loads at a time
static_assert(kRows == 32, "one lane a row");
constexpr int kGroup = 256;  // absmax values that share a second-level scale
static_assert(kGroup == kThreads, "nf4_quantize_absmax has one thread for each");

__device__ __forceinline__ unsigned magnitude(float a) { return __float_as_uint(a) & 0x7fffffff; }

// The largest magnitude in a vector.
__device__ __forceinline__ unsigned largest_magnitude(const float (&x)[4]) {
  return max(max(magnitude(x[0]), magnitude(x[1])), max(magnitude(x[2]), magnitude(x[3])));
}
template <class T>
__device__ __forceinline__ unsigned largest_magnitude(const T (&x)[8]) {
  using Pair = typename Rounded<T>::Pair;
  const Pair* pairs = reinterpret_cast<const Pair*>(x);
  const Pair largest =
      __hmax2_nan(__hmax2_nan(__habs2(pairs[0]), __habs2(pairs[1])), __hmax2_nan(__habs2(pairs[2]), __habs2(pairs[3])));
  return max(__float_as_uint(largest.x), __float_as_uint(largest.y));
}

// Two neighbouring elements. A bf16 is the upper half of a float32.
__device__ __forceinline__ float2 to_float2(const float* x) { return make_float2(x[0], x[1]); }
__device__ __forceinline__ float2 to_float2(const __half* x) {
  return __half22float2(*reinterpret_cast<const __half2*>(x));
}
__device__ __forceinline__ float2 to_float2(const __nv_bfloat16* x) {
  const unsigned pair = *reinterpret_cast<const unsigned*>(x);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

__device__ __forceinline__ float floored(unsigned largest) {
  return __uint_as_float(max(largest, __float_as_uint(1e-38f)));
}

// Cell c holds the v whose 15 * v + 15 rounds to c.
struct Cells {
  float boundary[32];
  unsigned below[32];
};

constexpr Cells make_cells() {
  Cells cells{};
  for (float& boundary : cells.boundary) boundary = 2;  // no v is above it
  for (int code = 0; code < 15; ++code) {
    const float middle = (kNf4Code[code] + kNf4Code[code + 1]) / 2;
    const int cell = static_cast<int>(15 * middle + 15.5f);
    cells.boundary[cell] = middle;
    for (int above = cell + 1; above < 32; ++above) ++cells.below[above];
  }
  return cells;
}

__device__ constexpr Cells kCells = make_cells();

// Appends the code of an element to those before it, by shuffles, so all lanes of the warp have to take part.
class NearestCode {
 public:
  __device__ __forceinline__ NearestCode()
      : boundary_(kCells.boundary[threadIdx.x % 32]), below_(kCells.below[threadIdx.x % 32]) {}
  __device__ __forceinline__ void append(unsigned& codes, float normalized) const {
    const float v = fminf(normalized, 1.0f);  // of NaN and 1 it takes 1
    // Added to 2^23 the cell is in the low bits of the sum, and the shuffle reads but five of them.
    const int cell = __float_as_int(__fmaf_rn(v, 15.0f, 15.0f + 8388608.0f));
    const float difference = __fsub_rn(__shfl_sync(0xffffffff, boundary_, cell), v);
    // The sign bit of the difference is v > boundary.
    codes = codes * 16 + __shfl_sync(0xffffffff, below_, cell) + (__float_as_uint(difference) >> 31);
  }

 private:
  float boundary_;
  unsigned below_;
};

// The first `count` elements of a tile, whole blocks; the pointers are to the tile's.
template <class T, bool VECTORS>
__device__ __forceinline__ void quantize_full_blocks(const T* __restrict__ weight, uint8_t* __restrict__ packed,
                                                     float* __restrict__ absmax, int count, int blocksize_log2) {
  using Packed = typename Tile<T>::Packed;
  constexpr int V = Tile<T>::vector;
  const int first = static_cast<int>(threadIdx.x) * V;

  alignas(16) T x[kVectorsPerThread][V];
#pragma unroll
  for (int j = 0; j < kVectorsPerThread; ++j) {
    // Clamped, not skipped: branches would make the loads wait for one another.
    const T* const from = weight + min(first + j * Tile<T>::stride, count - V);
    if constexpr (VECTORS) {
      *reinterpret_cast<uint4*>(x[j]) = __ldcs(reinterpret_cast<const uint4*>(from));
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) x[j][k] = from[k];
    }
  }
  const NearestCode nearest_code;

  const unsigned vectors = (1u << blocksize_log2) / V;  // of a block
  unsigned largest[kVectorsPerThread];
#pragma unroll
  for (int j = 0; j < kVectorsPerThread; ++j) largest[j] = largest_magnitude(x[j]);
  for (unsigned distance = 1; distance < min(vectors, 32u); distance *= 2) {
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      largest[j] = max(largest[j], __shfl_xor_sync(0xffffffff, largest[j], distance));
    }
  }
  if (vectors > 32) {
    __shared__ unsigned row_largest[kRows];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      if (lane == 0) row_largest[j * (kThreads / 32) + warp] = largest[j];
    }
    __syncthreads();
    unsigned row = row_largest[lane];
    for (unsigned distance = 1; distance < vectors / 32; distance *= 2) {
      row = max(row, __shfl_xor_sync(0xffffffff, row, distance));
    }
#pragma unroll
    for (int j = 0; j < kVectorsPerThread; ++j) {
      largest[j] = __shfl_sync(0xffffffff, row, j * (kThreads / 32) + warp);
    }
  }

#pragma unroll
  for (int j = 0; j < kVectorsPerThread; ++j) {
    const int i = first + j * Tile<T>::stride;
    const float reciprocal = __frcp_rn(floored(largest[j]));
    unsigned codes = 0;
#pragma unroll
    for (int byte = V / 2 - 1; byte >= 0; --byte) {  // the first byte is the lowest
      const float2 pair = to_float2(&x[j][2 * byte]);
      nearest_code.append(codes, __fmul_rn(pair.x, reciprocal));
      nearest_code.append(codes, __fmul_rn(pair.y, reciprocal));
    }
    if (i < count) {
      if constexpr (VECTORS) {
        *reinterpret_cast<Packed*>(packed + i / 2) = static_cast<Packed>(codes);
      } else {
#pragma unroll
        for (int k = 0; k < V / 2; ++k) packed[i / 2 + k] = static_cast<uint8_t>(codes >> (8 * k));
      }
      const bool begins_block = (i & ((1 << blocksize_log2) - 1)) == 0;
      if (begins_block) absmax[i >> blocksize_log2] = __uint_as_float(largest[j]);
    }
  }
}

// The last block, if the elements do not fill it; the pointers are to the block's.
template <class T>
__device__ void quantize_short_block(const T* __restrict__ weight, uint8_t* __restrict__ packed,
                                     float* __restrict__ absmax, int count) {
  __shared__ unsigned warp_largest[kThreads / 32];
  unsigned largest = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) largest = max(largest, magnitude(weight[i]));
  largest = __reduce_max_sync(0xffffffff, largest);
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, warp_largest[warp]);
  const float scale = floored(largest);
  if (threadIdx.x == 0) *absmax = scale;

  const NearestCode nearest_code;
#pragma unroll 1
  for (int pairs = 0; pairs < count; pairs += 2 * kThreads) {
    const int i = pairs + 2 * static_cast<int>(threadIdx.x);
    unsigned codes = 0;
    nearest_code.append(codes, i < count ? __fdiv_rn(weight[i], scale) : 0.0f);
    nearest_code.append(codes, i + 1 < count ? __fdiv_rn(weight[i + 1], scale) : 0.0f);
    if (i < count) packed[i / 2] = static_cast<uint8_t>(codes);
  }
}

// VECTORS: weight and packed are aligned to a vector and its codes; otherwise they are accessed by the element.
template <class T, bool VECTORS>
__global__ void __launch_bounds__(kThreads, VECTORS ? 6 : 1)
    nf4_quantize_kernel(const T* __restrict__ weight, uint8_t* __restrict__ packed, float* __restrict__ absmax,
                        int64_t numel, int blocksize_log2) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * Tile<T>::size;
  const int count = static_cast<int>(min(numel - begin, static_cast<int64_t>(Tile<T>::size)));
  const int full = count >> blocksize_log2 << blocksize_log2;  // where the short block begins, if there is one
  weight += begin;
  packed += begin / 2;
  absmax += begin >> blocksize_log2;
  if (full > 0) quantize_full_blocks<T, VECTORS>(weight, packed, absmax, full, blocksize_log2);
  if (full < count) {
    quantize_short_block(weight + full, packed + full / 2, absmax + (full >> blocksize_log2), count - full);
  }
}

// A CTA owns a group, a thread an absmax. 4096x4096 in blocks of 64 make 1024 groups and 1.3 MB of traffic: latency is
// all there is to it.
__global__ void __launch_bounds__(kGroup)
    nf4_quantize_absmax_kernel(const float* __restrict__ absmax, const float* __restrict__ offset,
                               const float* __restrict__ absmax_code, uint8_t* __restrict__ absmax_u8,
                               float* __restrict__ absmax2, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGroup + threadIdx.x;
  const float centred = i < blocks ? __fsub_rn(__ldg(absmax + i), __ldg(offset)) : 0.0f;

  __shared__ float boundary[kGroup - 1];  // between codes; the search conflicts in its last steps, which is bearable
  __shared__ unsigned warp_largest[kGroup / 32];
  if (threadIdx.x < kGroup - 1) {
    boundary[threadIdx.x] = __fadd_rn(__ldg(absmax_code + threadIdx.x), __ldg(absmax_code + threadIdx.x + 1)) / 2;
  }
  // A NaN has no part in the maximum.
  const unsigned largest = __reduce_max_sync(0xffffffff, centred == centred ? magnitude(centred) : 0);
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  __syncthreads();
  unsigned scale = 0;
  for (int warp = 0; warp < kGroup / 32; ++warp) scale = max(scale, warp_largest[warp]);
  if (threadIdx.x == 0) absmax2[blockIdx.x] = __uint_as_float(scale);

  // bitsandbytes rounds to one of 65536 points of [-1, 1] first and takes the code nearest to that point.
  constexpr float kSteps = 65535;
  const float normalized = __fmul_rn(centred, __frcp_rn(__uint_as_float(scale)));
  const float step = floorf(__fadd_rn(__fmul_rn(__fadd_rn(normalized, 1.0f), 0.5f * kSteps), 0.5f));
  const float point = __fsub_rn(__fmul_rn(fminf(fmaxf(step, 0.0f), kSteps), 2.0f / kSteps), 1.0f);
  unsigned code = 0;
#pragma unroll
  for (unsigned half = kGroup / 2; half > 0; half /= 2) {
    if (boundary[code + half - 1] < point) code += half;
  }
  // A group of zeros divides by zero: NaN, whose code is 0.
  if (i < blocks) absmax_u8[i] = static_cast<uint8_t>(normalized == normalized ? code : 0);
}

template <class T>
cudaError_t quantize_from(const Nf4QuantizeParams& p, cudaStream_t stream) {
  const bool vectors = is_aligned(p.weight, 16) && is_aligned(p.packed, sizeof(typename Tile<T>::Packed));
  const auto tiles = static_cast<unsigned>((p.numel + Tile<T>::size - 1) / Tile<T>::size);
  const auto kernel = vectors ? nf4_quantize_kernel<T, true> : nf4_quantize_kernel<T, false>;
  return launch(kernel, dim3(tiles), dim3(kThreads), 0, stream, static_cast<const T*>(p.weight), p.packed, p.absmax,
                p.numel, log2_of(p.blocksize));
}

}  // namespace

cudaError_t nf4_quantize(const Nf4QuantizeParams& p, cudaStream_t stream) {
  if (p.numel < 0 || !is_blocksize(p.blocksize)) return cudaErrorInvalidValue;
  if (p.numel == 0) return cudaSuccess;
  switch (p.weight_dtype) {
    case DType::bf16:
      return quantize_from<__nv_bfloat16>(p, stream);
    case DType::fp16:
      return quantize_from<__half>(p, stream);
    case DType::fp32:
      return quantize_from<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmaxParams& p, cudaStream_t stream) {
  if (p.blocks < 0) return cudaErrorInvalidValue;
  if (p.blocks == 0) return cudaSuccess;
  const auto groups = static_cast<unsigned>((p.blocks + kGroup - 1) / kGroup);
  return launch(nf4_quantize_absmax_kernel, dim3(groups), dim3(kGroup), 0, stream, p.absmax, p.offset, p.absmax_code,
                p.absmax_u8, p.absmax2, p.blocks);
}

}  // namespace fastpeft
