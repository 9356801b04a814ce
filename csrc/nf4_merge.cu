// nf4_merge: out = gain * (dequant(W) + scaling * B @ A), one launch, no N x K scratch.
//
// Bound by memory at the usual ranks. 4096x4096 to bf16, blocks of 64, nested, R = 16: 8.4 MB of codes, 0.3 MB of
// absmax and 0.3 MB of A and B in, 33.6 MB out; 42.5 MB at 3.0 to 3.35 TB/s (H100) are 12.7 to 14.2 us. Against that
// stand
//   about 14 instructions an element (counted in the SASS of sm_90a), 8 us of the issue slots of 132 SMs, and 1.2 more
//     an element for each further 16 ranks, 0.7 us;
//   2 * N * K * R operations of mma.sync, 0.9 us for each 16 ranks at 600 TFLOP/s, and as long for its ldmatrix;
//   A and B out of L2, 512 * R bytes for a tile, 1.5 us for each 16 ranks at 5.5 TB/s.
// So memory is the bound up to R = 100 or so, and from R = 200 on it no longer is. Nothing here was timed yet.
//
// Work split: a CTA owns 128x128 of out, a warp 32 rows by 64 columns of it. 64 sums, 8 words of codes and the
// fragments fill the 128 registers that let two CTAs, 16 warps, share an SM. Smaller tiles would give more warps, but
// read A and B more often and repeat the 400 instructions of a warp's prologue for fewer elements; larger ones leave
// one CTA. The codes are asked for first, because they come from memory, and used last. An absmax is decoded once for
// the tile.
//
// mma leaves a lane with columns 2t and 2t + 1 of each tile of 8 (ptx.cuh). A store of 16 bytes wants eight neighbours,
// and so do the codes, whose eight are one word with one absmax. The columns of A are therefore permuted on their way
// to shared memory: in every 32 columns, pair j of vector t becomes pair t of tile j. After the product, lane t has in
// its four tiles the pairs of vector t, in order, and the rest is as in nf4_dequantize; a warp's store covers 64
// contiguous bytes, two whole sectors, of 8 rows. The price is that A is stored 4 bytes at a time. To move the sums to
// where they are needed, shuffles would cost 4 instructions a vector and 8 selections, shared memory 64 kB a CTA.
//
// cp.async brings B: no register waits for it, and it fills in the zeros. It cannot permute, so A goes through
// registers. There is one buffer, of 64 ranks: at R <= 64 all is on its way at once, above that the two CTAs of an SM
// have to fill each other's waits.
//
// Shared memory, 38 kB: rows of A and B are padded by 16 bytes to an odd multiple of them, so the eight rows of an
// ldmatrix lie in eight different 16-byte columns of the banks. The stores of A and B conflict two ways. An absmax row
// is 5 words long: 8 rows, two neighbours in each, lie in 16 banks.
#include "nf4.cuh"
#include "ptx.cuh"

namespace fastpeft {
namespace {

constexpr int kTileN = 128, kTileK = 128;  // of out, a CTA
constexpr int kWarpN = 32, kWarpK = 64;    // of out, a warp
static_assert(kTileN / kWarpN * (kTileK / kWarpK) * 32 == kThreads);
constexpr int kVector = 8;                   // elements in 16 bytes
constexpr int kStep = 16;                    // ranks of one mma
constexpr int kSteps = 4;                    // of a chunk, the ranks in shared memory at a time
constexpr int kRowBlocks = kTileK / 32 + 1;  // quantization blocks that a row of the tile can touch

template <class T>
struct Shared {
  alignas(16) T a[kSteps * kStep][kTileK + kVector];  // [r][k], the columns permuted
  alignas(16) T b[kTileN][kSteps * kStep + kVector];  // [n][r]
  float absmax[kTileN][kRowBlocks];
  float gain[kTileN];
};

// Elements column to column + 7 of a row, one by one; zeros from `columns` on, where there is nothing to read.
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* row, int column, int columns) {
  alignas(16) T x[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) x[e] = column + e < columns ? row[column + e] : T(0.0f);
  return *reinterpret_cast<const uint4*>(x);
}

// Puts a vector of row r of A in its place: pair j of vector t of 32 columns becomes pair t of tile j.
template <class T>
__device__ __forceinline__ void store_permuted(Shared<T>& shared, int r, int vector, uint4 x) {
  uint32_t* const row = reinterpret_cast<uint32_t*>(shared.a[r]) + vector / 4 * 16 + vector % 4;
  row[0] = x.x;
  row[4] = x.y;
  row[8] = x.z;
  row[12] = x.w;
}

// Brings ranks r0 to r0 + 16 * steps - 1 on their way: in each step a thread has one vector of A and one of B. B goes
// to shared memory by itself. A goes through registers, `a`, because of its permutation, and store_chunk ends it. What
// is not aligned is brought by the element, at once.
template <class T, bool VECTORS>
__device__ __forceinline__ void fetch_chunk(Shared<T>& shared, uint4 (&a)[kSteps], const Nf4MergeParams& p, int n0,
                                            int k0, int r0, int steps, bool b_aligned) {
  const int b_row = threadIdx.x / 2, b_column = threadIdx.x % 2 * kVector;
  const int ranks = n0 + b_row < p.N ? p.R : 0;
  const T* const b = static_cast<const T*>(p.lora_b) + static_cast<int64_t>(min(n0 + b_row, p.N - 1)) * p.R;
  if (b_aligned) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int r = r0 + step * kStep + b_column;
      cp_async_16(&shared.b[b_row][step * kStep + b_column], b + min(r, p.R - kVector), r < ranks);
    }
    cp_async_commit();
  } else {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint4 x = load_elements(b, r0 + step * kStep + b_column, ranks);
      *reinterpret_cast<uint4*>(&shared.b[b_row][step * kStep + b_column]) = x;
    }
  }

  const int a_row = threadIdx.x / 16, vector = threadIdx.x % 16, k = k0 + vector * kVector;
  const T* const a_column = static_cast<const T*>(p.lora_a) + static_cast<int64_t>(r0 + a_row) * p.K;
  if constexpr (VECTORS) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool valid = step < steps && r0 + step * kStep + a_row < p.R && k < p.K;
      const T* const from = a_column + static_cast<int64_t>(step * kStep) * p.K + k;
      a[step] = valid ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    }
  } else {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int r = step * kStep + a_row;
      const T* const from = a_column + static_cast<int64_t>(step * kStep) * p.K;
      store_permuted(shared, r, vector, load_elements(from, k, r0 + r < p.R ? p.K : 0));
    }
  }
}

template <class T, bool VECTORS>
__device__ __forceinline__ void store_chunk(Shared<T>& shared, const uint4 (&a)[kSteps], int steps) {
  if constexpr (VECTORS) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step < steps) store_permuted(shared, step * kStep + threadIdx.x / 16, threadIdx.x % 16, a[step]);
    }
  }
  cp_async_wait<0>();
}

// VECTORS: rows of A, of the codes and of out are whole aligned vectors; otherwise they are accessed by the element.
template <class T, bool NESTED, bool VECTORS>
__global__ void __launch_bounds__(kThreads, VECTORS ? 2 : 1)
    nf4_merge_kernel(Nf4MergeParams p, int blocksize_log2, bool b_aligned) {
  const Nf4Storage& w = p.weight;
  const int tiles_k = (p.K + kTileK - 1) / kTileK;
  const int n0 = static_cast<int>(blockIdx.x / tiles_k) * kTileN, k0 = static_cast<int>(blockIdx.x % tiles_k) * kTileK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_n = warp % (kTileN / kWarpN) * kWarpN, warp_k = warp / (kTileN / kWarpN) * kWarpK;
  // This lane's vectors are at rows row + 8 * i and columns column + 32 * j of the tile.
  const int row = warp_n + lane / 4, column = warp_k + lane % 4 * kVector;

  const Nf4Table nf4_code;
  uint32_t codes[4][2];
  if constexpr (VECTORS) {
    const uint8_t* const packed = w.packed + (k0 + column) / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const from = packed + static_cast<int64_t>(min(n0 + row + 8 * i, p.N - 1)) * (p.K / 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        codes[i][j] = k0 + column + 32 * j < p.K ? __ldg(reinterpret_cast<const uint32_t*>(from + 16 * j)) : 0;
      }
    }
  }

  __shared__ Shared<T> shared;
  uint4 a_vectors[kSteps];
  int steps = min((p.R + kStep - 1) / kStep, kSteps);
  fetch_chunk<T, VECTORS>(shared, a_vectors, p, n0, k0, 0, steps, b_aligned);

  // Each absmax of the tile is decoded once. Two threads a row.
  if (const int n = threadIdx.x / 2; n0 + n < p.N) {
    const float offset = NESTED ? __ldg(w.absmax_offset) : 0.0f;
    const int64_t begin = static_cast<int64_t>(n0 + n) * p.K + k0, end = begin + min(kTileK, p.K - k0);
    const int blocks = static_cast<int>(((end - 1) >> blocksize_log2) - (begin >> blocksize_log2)) + 1;
#pragma unroll 1
    for (int i = threadIdx.x % 2; i < blocks; i += 2) {
      Absmax<NESTED> absmax;
      absmax.load(w, (begin >> blocksize_log2) + i);
      shared.absmax[n][i] = absmax.decode(w.absmax_code, offset);
    }
  }
  const float scaling = p.scaling_tensor ? p.scaling * __ldg(p.scaling_tensor) : p.scaling;
  if (threadIdx.x < kTileN) {
    const int n = n0 + threadIdx.x;
    shared.gain[threadIdx.x] = p.gain && n < p.N ? __ldg(p.gain + n) : 1.0f;
  }

  float sum[2][8][4] = {};  // 2 tiles of 16 rows by 8 tiles of 8 columns
  for (int r0 = 0;;) {
    store_chunk<T, VECTORS>(shared, a_vectors, steps);
    __syncthreads();
#pragma unroll 1  // two iterations of fragments would not fit in registers
    for (int step = 0; step < steps; ++step) {
      uint32_t b[2][4];  // B is the left operand of mma, A the right one
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(b[i], &shared.b[warp_n + 16 * i + lane % 16][step * kStep + lane / 16 * 8]);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, &shared.a[step * kStep + lane % 16][warp_k + 8 * j + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16<T>(sum[i][j], b[i], {a[0], a[1]});
          mma_m16n8k16<T>(sum[i][j + 1], b[i], {a[2], a[3]});
        }
      }
    }
    r0 += kSteps * kStep;
    if (r0 >= p.R) break;
    __syncthreads();
    steps = min((p.R - r0 + kStep - 1) / kStep, kSteps);
    fetch_chunk<T, VECTORS>(shared, a_vectors, p, n0, k0, r0, steps, b_aligned);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int n = row + 8 * i;
    const float gain = shared.gain[n];
    const int64_t at = static_cast<int64_t>(n0 + n) * p.K + k0;  // of the row's first element in the tile
    const unsigned in_block = static_cast<unsigned>(at) & ((1u << blocksize_log2) - 1);
    const auto absmax_at = [&](int k) { return shared.absmax[n][(in_block + k) >> blocksize_log2]; };
    const auto merged = [&](float value, float absmax, float product) {
      return gain * __fmaf_rn(scaling, product, __fmul_rn(value, absmax));
    };
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int k = column + 32 * j;
      T* const out = static_cast<T*>(p.out) + at + k;
      // Pair e of this lane's vector is in tile 4 * j + e.
      if constexpr (VECTORS) {
        const bool valid = n0 + n < p.N && k0 + k < p.K;
        const float absmax = valid ? absmax_at(k) : 0.0f;
        alignas(16) typename Rounded<T>::Pair pairs[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* const product = &sum[i / 2][4 * j + e][i % 2 * 2];
          pairs[e] = Rounded<T>::two(merged(nf4_code[codes[i][j] >> (8 * e + 4)], absmax, product[0]),
                                     merged(nf4_code[codes[i][j] >> (8 * e)], absmax, product[1]));
        }
        if (valid) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pairs);
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (n0 + n < p.N && k0 + k + e < p.K) {
            const unsigned byte = w.packed[(at + k + e) / 2];
            const unsigned nibble = (at + k + e) % 2 == 0 ? byte >> 4 : byte & 15;
            out[e] = Rounded<T>::one(
                merged(kNf4Code[nibble], absmax_at(k + e), sum[i / 2][4 * j + e / 2][i % 2 * 2 + e % 2]));
          }
        }
      }
    }
  }
}

template <class T, bool NESTED>
cudaError_t merge_to(const Nf4MergeParams& p, cudaStream_t stream) {
  const bool vectors = p.K % kVector == 0 && is_aligned(p.lora_a, 16) && is_aligned(p.out, 16) &&
                       is_aligned(p.weight.packed, kVector / 2);
  const bool b_aligned = p.R % kVector == 0 && is_aligned(p.lora_b, 16);
  const int64_t tiles = (int64_t{p.N} + kTileN - 1) / kTileN * ((int64_t{p.K} + kTileK - 1) / kTileK);
  const auto kernel = vectors ? nf4_merge_kernel<T, NESTED, true> : nf4_merge_kernel<T, NESTED, false>;
  return launch(kernel, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), 0, stream, p, log2_of(p.weight.blocksize),
                b_aligned);
}

template <class T>
cudaError_t merge(const Nf4MergeParams& p, cudaStream_t stream) {
  return p.weight.absmax ? merge_to<T, false>(p, stream) : merge_to<T, true>(p, stream);
}

}  // namespace

cudaError_t nf4_merge(const Nf4MergeParams& p, cudaStream_t stream) {
  if (p.N < 0 || p.K < 0 || p.R < 0 || !is_blocksize(p.weight.blocksize)) return cudaErrorInvalidValue;
  if (p.N == 0 || p.K == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::bf16:
      return merge<__nv_bfloat16>(p, stream);
    case DType::fp16:
      return merge<__half>(p, stream);
    case DType::fp32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastpeft
