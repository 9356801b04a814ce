// dora_norm: norm[n] = |row n of W + scale * B @ A|. The squares of the sum itself are added up, not the expanded
// square |W|^2 + 2 W.BA + |BA|^2, which cancels where the update is near -W and costs as much. One pass over W as it is
// stored, no N x K scratch.
//
// 4096x4096 in NF4, nested blocks of 64, rank 16 in bfloat16: 8.9 MB, 2.7 to 3.0 us at 3.0 to 3.35 TB/s (H100).
// Modelled, nothing was timed yet. Against that stand
//   6.3 instructions a weight (counted in the SASS of sm_90a), 3.5 us of the issue slots of 132 SMs. Five of them
//     shift, look up, scale, add the update and square. A CTA's beginning and end are 240 more, for 256 weights a
//     lane: 0.5 us;
//   a shuffle a weight, 2.3 us at 32 lanes a clock. The fragments of A go through the same pipe, 0.6 us for each 16
//     ranks, and so do those of B, except the first 16 ranks, which stay in registers;
//   2 * N * K * R operations of mma.sync, 0.9 us for each 16 ranks at 600 TFLOP/s.
// So at R = 16 the instructions are the bound, 1.2 to 1.5 times what memory allows, and from R = 64 on that pipe is. A
// dense W is bound by memory, 33.8 MB in 10 to 11 us.
//
// float32 adapters are not rounded: where the update nearly cancels W, the norm would be that of the rounding errors.
// An element becomes three numbers of bfloat16, 8 bits each, and of the nine products the six that exceed 2^-24 of the
// whole are formed: 5.4 us for each 16 ranks, and tensor cores are the bound.
//
// Work split: dora_norm_pack_kernel brings A and B into the workspace in the order of the fragments of mma. It deals
// with dtype, alignment, padding and the three numbers once; what the norm loads of them are whole vectors. It moves
// little, 0.5 MB above, and takes as long as a launch does. Then a CTA owns 256 rows and a slice of the columns, a warp
// 32 rows, two tiles of mma, so that a fragment of A is used twice. No warp waits for another one: A comes out of L1,
// which the warps of an SM share, and the 16 that fit on it side by side are to hide its latency. In shared memory A
// would need a barrier every 32 columns. Of W a lane loads 16 bytes of four rows at a time, while the last step of
// those before is computed.
//
// mma leaves a lane with columns 2t and 2t + 1 of each tile of 8. Packing permutes the columns of A so that the pairs
// of four tiles are eight neighbours in W, a word of codes. nf4_merge does the same.
//
// The CTA that finishes the rows last adds the slices in their order: the result does not depend on which one it is.
//
// Shared memory, 1 kB: the table of a nested absmax. The four lanes of a row mostly ask for the same entry, the eight
// rows of a warp for any, which may lie in one bank; it is one look-up for 32 weights.
#include <algorithm>

#include "nf4.cuh"
#include "ptx.cuh"

namespace fastpeft {
namespace {

constexpr int kRows = 256;      // of a CTA
constexpr int kWarpRows = 32;   // two tiles of mma; a lane has rows lane / 4 + 8 * i, i < 4
constexpr int kVector = 8;      // columns that a lane has of each of its rows in a step
constexpr int kColumns = 32;    // of a step, in all lanes
constexpr int kRanks = 16;      // of a block, the ranks of one mma
constexpr int kMinSlice = 128;  // columns of a CTA
constexpr int kMaxSlice = 512;
static_assert(kRows == kThreads && kRows / kWarpRows * 32 == kThreads);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the tensor cores are given for an element of A or B: a number, or the sum of three for the 24 bits of a float32.
template <class E>
struct Operand {
  using T = E;
  static constexpr int parts = 1;
};
template <>
struct Operand<float> {
  using T = __nv_bfloat16;
  static constexpr int parts = 3;
};

// The workspace and the work split. Fragments of mma lie lane by lane, so that a warp loads 512 contiguous bytes.
struct Plan {
  uint4* a;           // [step][rank block][part][2][lane]: two tiles of 8 columns in a vector
  uint4* b;           // [16 rows][rank block][part][lane]
  float* squares;     // [slice][N]: the sums of squares of a slice
  unsigned* arrived;  // [row_ctas]: how many CTAs of these rows have stored theirs
  int64_t a_tiles, b_tiles;
  int rank_blocks, slice, slices, row_ctas;
  size_t bytes;

  Plan(void* workspace, int N, int K, int R, int parts) {
    row_ctas = static_cast<int>(ceil_div(N, kRows));
    // The longest slice with which nearly two CTAs come to each of the 132 SMs of an H100. It depends on the sizes
    // alone, so that other GPUs get the same bits.
    slice = kMaxSlice;
    while (slice > kMinSlice && row_ctas * ceil_div(K, slice) < 240) slice /= 2;
    slices = static_cast<int>(std::max<int64_t>(ceil_div(K, slice), 1));
    rank_blocks = static_cast<int>(std::max<int64_t>(ceil_div(R, kRanks), 1));
    a_tiles = ceil_div(K, kMinSlice) * (kMinSlice / kColumns) * rank_blocks;
    b_tiles = int64_t{row_ctas} * (kRows / 16) * rank_blocks;

    const uintptr_t begin = reinterpret_cast<uintptr_t>(workspace);
    uintptr_t end = begin;
    const auto take = [&end](int64_t count, size_t size) {
      const uintptr_t piece = end;
      end += count * size;
      return piece;
    };
    a = reinterpret_cast<uint4*>(take(a_tiles * parts * 64, sizeof(uint4)));
    b = reinterpret_cast<uint4*>(take(b_tiles * parts * 32, sizeof(uint4)));
    squares = reinterpret_cast<float*>(take(int64_t{slices} * N, sizeof(float)));
    arrived = reinterpret_cast<unsigned*>(take(row_ctas, sizeof(unsigned)));
    bytes = end - begin;
  }
};

// Two elements, part by part in a register.
template <class E>
__device__ __forceinline__ void split(E low, E high, uint32_t (&parts)[Operand<E>::parts]) {
  if constexpr (std::is_same_v<E, float>) {
#pragma unroll
    for (uint32_t& part : parts) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      part = reinterpret_cast<const uint32_t&>(pair);
      low -= __low2float(pair);  // exact
      high -= __high2float(pair);
    }
  } else {
    alignas(4) const E pair[2] = {low, high};
    parts[0] = *reinterpret_cast<const uint32_t*>(pair);
  }
}

// A warp makes a tile of A, 16 ranks by 32 columns, or of B, 16 rows by 16 ranks. What is not there is zero. steps: the
// Weight's kSteps.
template <class E>
__global__ void __launch_bounds__(kThreads) dora_norm_pack_kernel(DoraNormParams p, Plan to, int steps) {
  constexpr int parts = Operand<E>::parts;
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (thread < to.row_ctas) to.arrived[thread] = 0;

  int64_t tile = thread / 32;
  const int lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  if (tile < to.a_tiles) {
    const int step = static_cast<int>(tile / to.rank_blocks), r = tile % to.rank_blocks * kRanks + 2 * quarter;
    // Column `group` of tile j of the product is element 2 * j + group % 2 of the vector of lanes 4 * i + group / 2.
    const int k = (step / steps * 4 + group / 2) * (steps * kVector) + step % steps * kVector + group % 2;
    const auto at = [&](int r, int k) {
      return r < p.R && k < p.K ? static_cast<const E*>(p.lora_a)[static_cast<int64_t>(r) * p.K + k] : E(0.0f);
    };
    uint4* const a = to.a + tile * (parts * 64) + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[4][parts];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int rank = r + i % 2 * 8, column = k + 2 * (2 * half + i / 2);
        split(at(rank, column), at(rank + 1, column), x[i]);
      }
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        a[part * 64 + half * 32] = make_uint4(x[0][part], x[1][part], x[2][part], x[3][part]);
      }
    }
    return;
  }

  tile -= to.a_tiles;
  if (tile < to.b_tiles) {
    const int n = tile / to.rank_blocks * 16 + group, r = tile % to.rank_blocks * kRanks + 2 * quarter;
    const auto at = [&](int n, int r) {
      return n < p.N && r < p.R ? static_cast<const E*>(p.lora_b)[static_cast<int64_t>(n) * p.R + r] : E(0.0f);
    };
    uint32_t x[4][parts];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = n + i % 2 * 8, rank = r + i / 2 * 8;
      split(at(row, rank), at(row, rank + 1), x[i]);
    }
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      to.b[(tile * parts + part) * 32 + lane] = make_uint4(x[0][part], x[1][part], x[2][part], x[3][part]);
    }
  }
}

// The weights of a lane: in a step, 8 neighbours in each of 4 rows. A group is kSteps steps. Step s of it has the
// columns kSteps * kVector * (lane % 4) + kVector * s and the seven that follow, so that what a lane has of a row of
// the group are neighbours, which it loads at once.
//   load    starts to load the group at column k
//   take    makes a step of the group that was loaded last the current one
//   (i, e)  element e of row i of the current step; 0 where the slice has no such column, anything where W has no such
//           row. All lanes take part.

// K % 32 == 0: what a lane has of a row of a group has one absmax. Places in W count 32 elements and so fit in 32 bits.
template <bool NESTED>
class Nf4Vectors {
 public:
  static constexpr int kSteps = 4;  // 16 bytes of codes

  __device__ __forceinline__ Nf4Vectors(const DoraNormParams& p, int row, int end, int blocksize_log2)
      : p_(p),
        row_(row),
        end_(end),
        block_log2_(blocksize_log2 - 5),
        offset_(NESTED ? __ldg(p.nf4.absmax_offset) : 0.0f) {}

  __device__ __forceinline__ void load(int k) {
    k += threadIdx.x % 4 * (kSteps * kVector);
    valid_ = k < end_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned at = min(row_ + 8 * i, p_.N - 1) * (static_cast<unsigned>(p_.K) / 32) + (valid_ ? k / 32 : 0);
      codes_[i] = __ldcs(reinterpret_cast<const uint4*>(p_.nf4.packed) + at);
      stored_[i].load(p_.nf4, at >> block_log2_);
    }
  }
  __device__ __forceinline__ void take(int step, const float* absmax_code) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word_[i] = step == 0 ? codes_[i].x : step == 1 ? codes_[i].y : step == 2 ? codes_[i].z : codes_[i].w;
      if (step == 0) absmax_[i] = valid_ ? stored_[i].decode(absmax_code, offset_) : 0.0f;
    }
  }
  __device__ __forceinline__ float operator()(int i, int e) const {
    return __fmul_rn(nf4_code_[word_[i] >> 4 * (e ^ 1)], absmax_[i]);  // the even element is in the high nibble
  }

 private:
  const DoraNormParams& p_;
  const int row_, end_, block_log2_;
  const float offset_;
  const Nf4Table nf4_code_;
  bool valid_;
  uint4 codes_[4];
  Absmax<NESTED> stored_[4];
  uint32_t word_[4];
  float absmax_[4];
};

// K % 8 == 0.
template <class T>
class DenseVectors {
 public:
  static constexpr int kSteps = 1;

  __device__ __forceinline__ DenseVectors(const DoraNormParams& p, int row, int end, int) : end_(end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row_[i] = static_cast<const T*>(p.weight) + static_cast<int64_t>(min(row + 8 * i, p.N - 1)) * p.K;
    }
  }

  __device__ __forceinline__ void load(int k) {
    k += threadIdx.x % 4 * kVector;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      next_[i] = k < end_ ? __ldcs(reinterpret_cast<const uint4*>(row_[i] + k)) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void take(int, const float*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4*>(current_[i]) = next_[i];
  }
  __device__ __forceinline__ float operator()(int i, int e) const { return static_cast<float>(current_[i][e]); }

 private:
  const int end_;
  const T* row_[4];
  uint4 next_[4];
  alignas(16) T current_[4][kVector];
};

// Any weight in any arrangement, by the element.
class Elements {
 public:
  static constexpr int kSteps = 1;

  __device__ __forceinline__ Elements(const DoraNormParams& p, int row, int end, int blocksize_log2)
      : p_(p), row_(row), end_(end), blocksize_log2_(blocksize_log2) {}

  __device__ __forceinline__ void load(int k) { next_ = k + threadIdx.x % 4 * kVector; }
  __device__ __forceinline__ void take(int, const float*) { current_ = next_; }
  __device__ __forceinline__ float operator()(int i, int e) const {
    const int n = row_ + 8 * i, k = current_ + e;
    if (n >= p_.N || k >= end_) return 0.0f;
    const int64_t at = static_cast<int64_t>(n) * p_.K + k;
    if (p_.weight) {
      return p_.dtype == DType::bf16 ? static_cast<float>(static_cast<const __nv_bfloat16*>(p_.weight)[at])
                                     : static_cast<float>(static_cast<const __half*>(p_.weight)[at]);
    }
    const unsigned byte = p_.nf4.packed[at / 2];
    return __fmul_rn(kNf4Code[at % 2 == 0 ? byte >> 4 : byte & 15], absmax(at >> blocksize_log2_));
  }

 private:
  __device__ __forceinline__ float absmax(int64_t block) const {
    if (p_.nf4.absmax) return p_.nf4.absmax[block];
    Absmax<true> nested;
    nested.load(p_.nf4, block);
    return nested.decode(p_.nf4.absmax_code, *p_.nf4.absmax_offset);
  }

  const DoraNormParams& p_;
  const int row_, end_, blocksize_log2_;
  int next_, current_;
};

template <class Weight, class T, int PARTS>
__global__ void __launch_bounds__(kThreads, 2) dora_norm_kernel(DoraNormParams p, Plan plan, int blocksize_log2) {
  constexpr int group = Weight::kSteps * kColumns;
  const int begin = blockIdx.y * plan.slice, end = min(begin + plan.slice, p.K);
  const int lane = threadIdx.x % 32, warp_row = blockIdx.x * kRows + threadIdx.x / 32 * kWarpRows;
  const int row = warp_row + lane / 4;

  Weight weight(p, row, end, blocksize_log2);
  weight.load(begin);
  __shared__ float absmax_code[256];
  if (p.nf4.absmax_code) absmax_code[threadIdx.x] = __ldg(p.nf4.absmax_code + threadIdx.x);
  __syncthreads();

  const float scale = p.scaling_tensor ? p.scaling * __ldg(p.scaling_tensor) : p.scaling;
  const int a_stride = plan.rank_blocks * (PARTS * 64), b_stride = plan.rank_blocks * (PARTS * 32);
  const uint4* a_step = plan.a + static_cast<int64_t>(begin / kColumns) * a_stride + lane;
  const uint4* const b_tile = plan.b + static_cast<int64_t>(warp_row / 16) * b_stride + lane;

  float sum[4] = {};  // of squares, of each row
#pragma unroll 1
  for (int k = begin; k < end; k += group) {
#pragma unroll
    for (int step = 0; step < Weight::kSteps; ++step) {
      weight.take(step, absmax_code);
      if (step + 1 == Weight::kSteps && k + group < end) weight.load(k + group);

      float product[2][4][4] = {};  // 2 tiles of 16 rows by 4 tiles of 8 columns
      const auto multiply = [&](int rank_block) {
        const uint4* const a_at = a_step + rank_block * (PARTS * 64);
        const uint4* const b_at = b_tile + rank_block * (PARTS * 32);
        uint4 a[PARTS][2];
#pragma unroll
        for (int i = 0; i < PARTS * 2; ++i) a[i / 2][i % 2] = __ldg(a_at + i * 32);
        // Of three parts a side, the six products down to 2^-16 of the largest, which comes last.
#pragma unroll
        for (int b_part = PARTS - 1; b_part >= 0; --b_part) {
          const uint4 b[2] = {__ldg(b_at + b_part * 32), __ldg(b_at + b_part * 32 + b_stride)};
#pragma unroll
          for (int a_part = PARTS - 1 - b_part; a_part >= 0; --a_part) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint32_t left[4] = {b[i].x, b[i].y, b[i].z, b[i].w};
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const uint4& right = a[a_part][half];
                mma_m16n8k16<T>(product[i][2 * half], left, {right.x, right.y});
                mma_m16n8k16<T>(product[i][2 * half + 1], left, {right.z, right.w});
              }
            }
          }
        }
      };
      // The compiler keeps what block 0 has of B in registers. Three parts of it would not fit.
      if constexpr (PARTS == 1) multiply(0);
#pragma unroll 1
      for (int rank_block = PARTS == 1; rank_block < plan.rank_blocks; ++rank_block) multiply(rank_block);
      a_step += a_stride;

#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float of_vector = 0.0f;  // summed by itself, because short sums are more exact
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const float x = __fmaf_rn(scale, product[i / 2][e / 2][i % 2 * 2 + e % 2], weight(i, e));
          of_vector = __fmaf_rn(x, x, of_vector);
        }
        sum[i] += of_vector;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 2);
    const int n = row + 8 * i;
    if (lane % 4 == 0 && n < p.N) plan.squares[static_cast<int64_t>(blockIdx.y) * p.N + n] = sum[i];
  }

  // The CTA that comes last adds up the slices, in their order.
  __threadfence();
  __syncthreads();
  __shared__ bool is_last;
  if (threadIdx.x == 0) is_last = atomicAdd(plan.arrived + blockIdx.x, 1u) == gridDim.y - 1;
  __syncthreads();
  const int n = blockIdx.x * kRows + threadIdx.x;
  if (!is_last || n >= p.N) return;
  float total = 0.0f;
#pragma unroll 4  // loads on their way at a time
  for (int slice = 0; slice < plan.slices; ++slice) {
    total += __ldcg(plan.squares + static_cast<int64_t>(slice) * p.N + n);
  }
  p.norm[n] = __fsqrt_rn(total);
}

template <class Weight, class E>
cudaError_t launch_norm(const DoraNormParams& p, cudaStream_t stream) {
  const Plan plan(p.workspace, p.N, p.K, p.R, Operand<E>::parts);
  const int64_t pack_ctas = ceil_div((plan.a_tiles + plan.b_tiles) * 32, kThreads);
  const cudaError_t error = launch(dora_norm_pack_kernel<E>, dim3(static_cast<unsigned>(pack_ctas)), dim3(kThreads), 0,
                                   stream, p, plan, Weight::kSteps);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.row_ctas), static_cast<unsigned>(plan.slices));
  return launch(dora_norm_kernel<Weight, typename Operand<E>::T, Operand<E>::parts>, grid, dim3(kThreads), 0, stream, p,
                plan, p.weight ? 0 : log2_of(p.nf4.blocksize));
}

template <class T, class E>
cudaError_t norm_of(const DoraNormParams& p, cudaStream_t stream) {
  const int vector = p.weight ? kVector : 32;
  if (p.K == 0 || p.K % vector != 0 || !is_aligned(p.weight ? p.weight : p.nf4.packed, 16)) {
    return launch_norm<Elements, E>(p, stream);
  }
  if (p.weight) return launch_norm<DenseVectors<T>, E>(p, stream);
  return p.nf4.absmax ? launch_norm<Nf4Vectors<false>, E>(p, stream) : launch_norm<Nf4Vectors<true>, E>(p, stream);
}

template <class T>
cudaError_t norm_in(const DoraNormParams& p, cudaStream_t stream) {
  return p.adapter_dtype == DType::fp32 ? norm_of<T, float>(p, stream) : norm_of<T, T>(p, stream);
}

}  // namespace

cudaError_t dora_norm(const DoraNormParams& p, cudaStream_t stream) {
  if (p.N < 0 || p.K < 0 || p.R < 0 || (p.adapter_dtype != p.dtype && p.adapter_dtype != DType::fp32)) {
    return cudaErrorInvalidValue;
  }
  if (p.N == 0) return cudaSuccess;
  const bool is_weight = p.weight || p.K == 0 || is_blocksize(p.nf4.blocksize);
  if (!is_weight || !is_aligned(p.workspace, 16)) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::bf16:
      return norm_in<__nv_bfloat16>(p, stream);
    case DType::fp16:
      return norm_in<__half>(p, stream);
    case DType::fp32:
      break;
  }
  return cudaErrorInvalidValue;
}

size_t dora_norm_workspace_bytes(int N, int K, int R) {
  return N > 0 ? Plan(nullptr, N, K, R, Operand<float>::parts).bytes : 0;
}

}  // namespace fastpeft
