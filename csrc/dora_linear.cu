// dora_linear_add: out = keep * gain * x + offset. dora_linear_gain_grad: d_gain[n] = sum over m of dy[m, n] * z[m, n].
//
// What DoRA's training needs besides lora_linear's kernels. Bound by memory: a matrix [8192, 4096] of bf16 is 67
// MB, 20.0 to 22.4 us at 3.35 to 3.0 TB/s (H100). d_gain reads two of them; add, which is for dropout alone, reads one
// or two and writes one. Without dropout a DoRA layer of [8192, 4096] -> [8192, 4096] moves three matrices more than a
// LoRA layer, with the second output of lora_add, 60 to 67 us, 1.09 of LoRA's 783 us with two products of 344 us (all
// modelled).
//
// Work split, of both: a CTA owns 256 columns, 16 bytes a lane, and its eight warps take the rows in turn, four at a
// time, so that a lane has four to eight loads on their way; what belongs to a column (the gain, its word of the hash,
// its sum) stays in registers. add: a CTA has 32 rows. d_gain: one CTA on each of the 132 SMs of an H100, or two, each
// with a part of the rows: at [8192, 4096] 1024 of them, 16 by 8 CTAs; 32 kB on their way on an SM are more than the 18
// kB that its share of the bandwidth takes (3.35 TB/s, 700 ns). The parts of a sum go to the workspace, 4 bytes for
// each column and part, and are added in their order. Shared memory, d_gain: 8 kB, the sums of the warps, which lanes
// store 32 bytes apart: two-way conflicts, once in a CTA.
#include <algorithm>

#include "lora_linear.cuh"

namespace fastpeft {
namespace lora {
namespace {

constexpr int kColumns = 32 * kVector;  // of a CTA
constexpr int kRows = 4;                // that a lane loads at a time
constexpr int kCtaRows = kWarps * kRows;
static_assert(kColumns == kThreads);

// Elements column to column + 7 of a row. VECTORS: rows are whole aligned vectors; otherwise they are accessed by the
// element. Zero past the last row or column: another thread may be writing there what a clamped access would read.
template <class T, bool VECTORS>
__device__ __forceinline__ uint4 load(const Matrix<T>& matrix, int row, int column) {
  if (row >= matrix.rows || column >= matrix.columns) return make_uint4(0, 0, 0, 0);
  const T* const from = matrix.data + static_cast<int64_t>(row) * matrix.columns;
  if constexpr (VECTORS) {
    return *reinterpret_cast<const uint4*>(from + column);
  } else {
    alignas(16) T x[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) x[e] = column + e < matrix.columns ? from[column + e] : T(0.0f);
    return *reinterpret_cast<const uint4*>(x);
  }
}

template <class T, bool VECTORS>
__device__ __forceinline__ void store(const Matrix<T>& matrix, int row, int column, uint4 x) {
  T* const to = const_cast<T*>(matrix.data) + static_cast<int64_t>(row) * matrix.columns + column;
  if constexpr (VECTORS) {
    if (column < matrix.columns) *reinterpret_cast<uint4*>(to) = x;
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (column + e < matrix.columns) to[e] = reinterpret_cast<const T*>(&x)[e];
    }
  }
}

template <class T>
__device__ __forceinline__ void to_floats(float (&floats)[kVector], uint4 x) {
  const uint32_t words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = to_float2(reinterpret_cast<const typename Rounded<T>::Pair&>(words[i]));
    floats[2 * i] = pair.x;
    floats[2 * i + 1] = pair.y;
  }
}

template <class T>
struct AddArguments {
  Matrix<T> x, offset, out;  // [M, N]; offset may be null
  const float* gain;
  Dropout dropout;
  int slices;
};

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kThreads) dora_linear_add_kernel(AddArguments<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = static_cast<int>(blockIdx.x % p.slices) * kColumns + lane * kVector;
  const int row0 = static_cast<int>(blockIdx.x / p.slices) * kCtaRows + warp;
  const int M = p.x.rows, N = p.x.columns;

  uint4 x[kRows], offset[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) x[i] = load<T, VECTORS>(p.x, row0 + i * kWarps, column);
  if (p.offset.data) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) offset[i] = load<T, VECTORS>(p.offset, row0 + i * kWarps, column);
  }
  float gain[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) gain[e] = p.gain && column + e < N ? __ldg(p.gain + column + e) : 1.0f;

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = row0 + i * kWarps;
    if (row >= M) break;
    float sum[kVector], product[kVector];
    to_floats<T>(sum, offset[i]);
    to_floats<T>(product, x[i]);
    const uint32_t row_word = p.dropout.drops() ? p.dropout.row(row) : 0;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const bool keeps = !p.dropout.drops() || p.dropout.keeps(row_word, Dropout::column(column + e));
      sum[e] = __fmaf_rn(keeps ? gain[e] : 0.0f, product[e], sum[e]);
    }
    alignas(16) typename Rounded<T>::Pair pairs[kVector / 2];
#pragma unroll
    for (int e = 0; e < kVector; e += 2) pairs[e / 2] = Rounded<T>::two(sum[e], sum[e + 1]);
    store<T, VECTORS>(p.out, row, column, *reinterpret_cast<const uint4*>(pairs));
  }
}

template <class T>
struct GainGradArguments {
  Matrix<T> dy, z;         // [M, N]
  float* partials;         // [splits, N8]
  int slices, split_rows;  // rows of a split
};

template <class T, bool VECTORS>
__global__ void __launch_bounds__(kThreads, 2) dora_linear_gain_grad_kernel(GainGradArguments<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int slice = static_cast<int>(blockIdx.x % p.slices), split = static_cast<int>(blockIdx.x / p.slices);
  const int column = slice * kColumns + lane * kVector, row0 = split * p.split_rows;
  const int rows = min(p.dy.rows, row0 + p.split_rows);

  float sum[kVector] = {};
  const auto add_row = [&](uint4 dy, uint4 z) {
    float left[kVector], right[kVector];
    to_floats<T>(left, dy);
    to_floats<T>(right, z);
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[e] = __fmaf_rn(left[e], right[e], sum[e]);
  };
  int row = row0 + warp;
  if constexpr (VECTORS) {
#pragma unroll 1
    for (; row + (kRows - 1) * kWarps < rows; row += kCtaRows) {
      uint4 dy[kRows], z[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        dy[i] = load<T, VECTORS>(p.dy, row + i * kWarps, column);
        z[i] = load<T, VECTORS>(p.z, row + i * kWarps, column);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) add_row(dy[i], z[i]);
    }
  }
#pragma unroll 1
  for (; row < rows; row += kWarps) add_row(load<T, VECTORS>(p.dy, row, column), load<T, VECTORS>(p.z, row, column));

  __shared__ float4 sums[kWarps][kColumns / 4];
  sums[warp][2 * lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  sums[warp][2 * lane + 1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  __syncthreads();
  const int n8 = (p.dy.columns + kVector - 1) / kVector * kVector, n = slice * kColumns + threadIdx.x;
  if (n >= n8) return;
  float whole = 0.0f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) whole += reinterpret_cast<const float*>(sums[other])[threadIdx.x];
  p.partials[static_cast<int64_t>(split) * n8 + n] = whole;
}

int slices_of(int N) { return static_cast<int>(ceil_div(N, kColumns)); }

template <class T>
cudaError_t add(const DoraLinearAddParams& p, cudaStream_t stream) {
  const AddArguments<T> arguments{Matrix<T>(p.x, p.M, p.N),     Matrix<T>(p.offset, p.M, p.N),
                                  Matrix<T>(p.out, p.M, p.N),   p.gain,
                                  Dropout(p.seed, p.dropout_p), slices_of(p.N)};
  const bool vectors = arguments.x.vectors && arguments.offset.vectors && arguments.out.vectors;
  const int64_t ctas = arguments.slices * ceil_div(p.M, kCtaRows);
  return launch(vectors ? dora_linear_add_kernel<T, true> : dora_linear_add_kernel<T, false>,
                dim3(static_cast<unsigned>(ctas)), dim3(kThreads), 0, stream, arguments);
}

struct Plan {
  int slices, splits, split_rows;
  float* partials;
  size_t bytes;

  Plan(int M, int N, void* memory) : slices(slices_of(N)) {
    // With fewer than two steps of a CTA a part would do little but start and end.
    splits = splits_for(std::max(slices, 1), M / (2 * kCtaRows));
    split_rows = static_cast<int>(round_up(ceil_div(M, splits), kCtaRows));
    splits = M > 0 ? static_cast<int>(ceil_div(M, split_rows)) : 1;
    Workspace workspace(memory);
    partials = workspace.take<float>(splits * round_up(N, kVector));
    bytes = workspace.bytes();
  }
};

template <class T>
cudaError_t gain_grad(const DoraLinearGainGradParams& p, cudaStream_t stream) {
  const Plan plan(p.M, p.N, p.workspace);
  const GainGradArguments<T> arguments{Matrix<T>(p.dy, p.M, p.N), Matrix<T>(p.z, p.M, p.N), plan.partials, plan.slices,
                                       plan.split_rows};
  const bool vectors = arguments.dy.vectors && arguments.z.vectors;
  const cudaError_t error =
      launch(vectors ? dora_linear_gain_grad_kernel<T, true> : dora_linear_gain_grad_kernel<T, false>,
             dim3(static_cast<unsigned>(plan.slices * plan.splits)), dim3(kThreads), 0, stream, arguments);
  if (error != cudaSuccess) return error;
  const Sum sum{plan.partials, p.d_gain, DType::fp32, 1, p.N, plan.splits, 1.0f};
  return add_partials(&sum, 1, stream);
}

}  // namespace
}  // namespace lora

cudaError_t dora_linear_add(const DoraLinearAddParams& p, cudaStream_t stream) {
  if (!lora::is_valid(p.dtype, p.dtype, p.M, p.N, 0, nullptr)) return cudaErrorInvalidValue;
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  return p.dtype == DType::bf16 ? lora::add<__nv_bfloat16>(p, stream) : lora::add<__half>(p, stream);
}

cudaError_t dora_linear_gain_grad(const DoraLinearGainGradParams& p, cudaStream_t stream) {
  if (!lora::is_valid(p.dtype, p.dtype, p.M, p.N, 0, p.workspace)) return cudaErrorInvalidValue;
  if (p.N == 0) return cudaSuccess;
  return p.dtype == DType::bf16 ? lora::gain_grad<__nv_bfloat16>(p, stream) : lora::gain_grad<__half>(p, stream);
}

size_t dora_linear_gain_grad_workspace_bytes(int M, int N) { return lora::Plan(M, N, nullptr).bytes; }

}  // namespace fastpeft
