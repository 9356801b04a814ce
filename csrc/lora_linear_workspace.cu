// The kernels around the passes of training: pack before a pass whose small operand is no matrix of T with aligned
// rows, add_partials after a pass whose sum was cut. What they move is small and was written just before, or is read
// just after, so it is in L2 for the most part; what they cost is mainly their launch.
#include "lora_linear.cuh"

namespace fastpeft::lora {
namespace {

constexpr int kQuad = 4;  // float32 in 16 bytes

// A thread owns four neighbours of the result; a split is one load of 16 bytes, and the loads do not wait for another.
__global__ void __launch_bounds__(kThreads) lora_add_partials_kernel(Sum first, Sum second, int blocks_of_first) {
  const bool is_first = static_cast<int>(blockIdx.x) < blocks_of_first;
  const Sum p = is_first ? first : second;
  const int64_t block = static_cast<int64_t>(blockIdx.x) - (is_first ? 0 : blocks_of_first);
  const int quads = (p.columns + kVector - 1) / kVector * (kVector / kQuad);  // of a row
  const int64_t quad = block * kThreads + threadIdx.x, total = static_cast<int64_t>(p.rows) * quads;
  if (quad >= total) return;

  const float4* const from = reinterpret_cast<const float4*>(p.partials) + quad;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int s = 0; s < p.splits; ++s) {
    const float4 x = __ldcs(from + s * total);  // read once
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  const int64_t row = quad / quads;
  const int column = static_cast<int>(quad - row * quads) * kQuad;
  const float values[kQuad] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    if (column + e >= p.columns) break;
    const int64_t at = row * p.columns + column + e;
    const float value = p.scale * values[e];
    if (p.dtype == DType::fp32) {
      static_cast<float*>(p.out)[at] = value;
    } else if (p.dtype == DType::bf16) {
      static_cast<__nv_bfloat16*>(p.out)[at] = Rounded<__nv_bfloat16>::one(value);
    } else {
      static_cast<__half*>(p.out)[at] = Rounded<__half>::one(value);
    }
  }
}

// A thread writes one vector.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lora_pack_kernel(const void* from, DType dtype, int rows, int columns, T* to) {
  const int vectors = (columns + kVector - 1) / kVector;  // of a row
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= static_cast<int64_t>(rows) * vectors) return;
  const int64_t row = vector / vectors;
  const int column = static_cast<int>(vector - row * vectors) * kVector;
  alignas(16) T x[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    x[e] = column + e < columns ? load_adapter<T>(from, dtype, row * columns + column + e) : T(0.0f);
  }
  reinterpret_cast<uint4*>(to)[vector] = *reinterpret_cast<const uint4*>(x);
}

int64_t blocks_of(const Sum& sum) {
  return ceil_div(int64_t{sum.rows} * ceil_div(sum.columns, kVector) * (kVector / kQuad), kThreads);
}

}  // namespace

cudaError_t add_partials(const Sum* sums, int count, cudaStream_t stream) {
  const Sum& second = sums[count - 1];
  const int64_t blocks_of_first = blocks_of(sums[0]), blocks = blocks_of_first + (count > 1 ? blocks_of(second) : 0);
  return launch(lora_add_partials_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, sums[0],
                second, static_cast<int>(blocks_of_first));
}

template <class T>
cudaError_t pack(const void* from, DType dtype, int rows, int columns, T* to, cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows * ceil_div(columns, kVector), kThreads);
  if (blocks == 0) return cudaSuccess;
  return launch(lora_pack_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, from, dtype, rows,
                columns, to);
}
template cudaError_t pack(const void*, DType, int, int, __half*, cudaStream_t);
template cudaError_t pack(const void*, DType, int, int, __nv_bfloat16*, cudaStream_t);

}  // namespace fastpeft::lora
