// The second kernel of lora_linear_decode: y of a token tile and 128 columns, a thread a column. It adds the partials
// of the weight, and those of the adapter, to xa, in the order of their slots; multiplies xa by its row of B; applies
// scale, gain and bias, and rounds once.
//
// It moves little beside the first kernel: of 4096 x 4096 with M = 1 and rank 16 on 132 SMs, 0.13 MB of B and 0.26 MB
// of partials, both from L2. So its time is a launch and two round trips to memory, and what does not depend on the
// first kernel, B before all, is loaded before it waits for that one. Shared memory: 4 kB of xa.
#include "lora_linear_decode.cuh"
#include "ptx.cuh"

namespace fastpeft::decode {
namespace {

constexpr int kThreads = 128;  // as many columns of y, and ranks at a time

// sum[t] += the partials of a row, in the order of their slots.
__device__ __forceinline__ void add_partials(float (&sum)[kTokens], const Split& split, const float* partials, int tile,
                                             int row) {
  const int first = row / split.group_rows * split.slices;
  const int slots = split.cta_of(first + split.slices - 1) - split.cta_of(first) + 1;
  for (int slot = 0; slot < slots; ++slot) {
    const auto* const from = reinterpret_cast<const float4*>(partials + split.partial(slot, gridDim.y, tile, row));
    const float4 a = __ldcs(from), b = __ldcs(from + 1);
    sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
    sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
  }
}

// Ranks r to r + 15 of a row of B as they come, zeros from R on. vectors: the rows of B are whole aligned vectors.
template <class E>
struct Ranks {
  static constexpr int kCount = 16, kVector = 16 / sizeof(E);
  uint4 vectors[kCount / kVector];

  __device__ __forceinline__ void load(const E* row, int r, int R, bool in_vectors) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVector) {
      if (in_vectors) {
        vectors[i / kVector] = r + i < R ? __ldg(reinterpret_cast<const uint4*>(row + r + i)) : make_uint4(0, 0, 0, 0);
      } else {
        alignas(16) E elements[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) elements[e] = r + i + e < R ? row[r + i + e] : E(0.0f);
        vectors[i / kVector] = *reinterpret_cast<const uint4*>(elements);
      }
    }
  }
  __device__ __forceinline__ E operator[](int i) const {
    return reinterpret_cast<const E*>(&vectors[i / kVector])[i % kVector];
  }
};

// y of one token tile, a thread a column. E: of the adapter.
template <class T, class E>
__global__ void __launch_bounds__(kThreads)
    lora_linear_decode_finish_kernel(LoraLinearDecodeParams p, Plan plan, bool b_vectors) {
  const int n = static_cast<int>(blockIdx.x * kThreads + threadIdx.x), tile = static_cast<int>(blockIdx.y);
  const int row = min(n, p.N - 1);
  const E* const lora_b = static_cast<const E*>(p.lora_b) + static_cast<int64_t>(row) * p.R;
  Ranks<E> b;
  b.load(lora_b, 0, p.R, b_vectors);
  const float gain = p.gain ? __ldg(p.gain + row) : 1.0f;
  const float bias = p.bias ? static_cast<float>(static_cast<const T*>(p.bias)[row]) : 0.0f;
  const float scale = p.scaling_tensor ? p.scaling * __ldg(p.scaling_tensor) : p.scaling;
  wait_for_dependency();

  float sum[kTokens] = {}, update[kTokens] = {};
  add_partials(sum, plan.weight, plan.weight_partials, tile, row);
  __shared__ float4 shared_xa[kThreads][2];  // [rank][token]; all threads read the same at a time
  for (int r0 = 0; r0 < p.R; r0 += kThreads) {
    float xa[kTokens] = {};
    const int rank = r0 + static_cast<int>(threadIdx.x);
    if (rank < p.R) add_partials(xa, plan.adapter, plan.adapter_partials, tile, rank);
    if (r0 > 0) __syncthreads();
    shared_xa[threadIdx.x][0] = make_float4(xa[0], xa[1], xa[2], xa[3]);
    shared_xa[threadIdx.x][1] = make_float4(xa[4], xa[5], xa[6], xa[7]);
    __syncthreads();
#pragma unroll 1
    for (int r = r0; r < min(r0 + kThreads, p.R); r += Ranks<E>::kCount) {
      const Ranks<E> now = b;
      b.load(lora_b, r + Ranks<E>::kCount, p.R, b_vectors);
#pragma unroll
      for (int i = 0; i < Ranks<E>::kCount; ++i) {
        const float factor = static_cast<float>(static_cast<T>(now[i]));
        const float4 xa0 = shared_xa[r - r0 + i][0], xa1 = shared_xa[r - r0 + i][1];
        update[0] = __fmaf_rn(factor, xa0.x, update[0]);
        update[1] = __fmaf_rn(factor, xa0.y, update[1]);
        update[2] = __fmaf_rn(factor, xa0.z, update[2]);
        update[3] = __fmaf_rn(factor, xa0.w, update[3]);
        update[4] = __fmaf_rn(factor, xa1.x, update[4]);
        update[5] = __fmaf_rn(factor, xa1.y, update[5]);
        update[6] = __fmaf_rn(factor, xa1.z, update[6]);
        update[7] = __fmaf_rn(factor, xa1.w, update[7]);
      }
    }
  }

  T* const y = static_cast<T*>(p.y) + static_cast<int64_t>(tile) * kTokens * p.N + n;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (n < p.N && tile * kTokens + t < p.M) {
      y[static_cast<int64_t>(t) * p.N] = Rounded<T>::one(__fmaf_rn(gain, __fmaf_rn(scale, update[t], sum[t]), bias));
    }
  }
}

template <class T>
cudaError_t run(const LoraLinearDecodeParams& p, const Plan& plan, bool early, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((static_cast<int64_t>(p.N) + kThreads - 1) / kThreads), plan.tiles);
  const bool b_vectors = p.R % 8 == 0 && is_aligned(p.lora_b, 16);
  const auto kernel = p.adapter_dtype == DType::fp32 ? lora_linear_decode_finish_kernel<T, float>
                                                     : lora_linear_decode_finish_kernel<T, T>;
  return launch_dependent(kernel, early, grid, dim3(kThreads), 0, stream, p, plan, b_vectors);
}

}  // namespace

cudaError_t finish(const LoraLinearDecodeParams& p, const Plan& plan, bool early, cudaStream_t stream) {
  return p.dtype == DType::bf16 ? run<__nv_bfloat16>(p, plan, early, stream) : run<__half>(p, plan, early, stream);
}

}  // namespace fastpeft::decode
