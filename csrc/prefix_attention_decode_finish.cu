// The second kernel of prefix_attention_decode: the parts of a row become one, by their log-sum-exp. A warp has a row,
// a lane four columns, and splits are added in their order.
//
// Bound by its launch and two round trips to L2: 10 splits of 1024 rows at D = 128 are 5 MB. Lanes look for the largest
// first, 32 splits at a time, so that no weight waits for another.
#include <cmath>

#include "prefix_attention_decode.cuh"
#include "ptx.cuh"

namespace fastpeft::prefix_attention {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

template <class T>
__global__ void __launch_bounds__(kThreads)
    prefix_attention_decode_finish_kernel(PrefixAttentionDecodeParams p, Plan plan) {
  const int lane = threadIdx.x % 32, rows = p.Hkv * plan.rows, splits = plan.splits();
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (row >= rows) return;
  const int kv_head = row / plan.rows, of_head = row % plan.rows, group = p.H / p.Hkv;
  const int sequence = of_head / (group * p.L), query = of_head % p.L;
  const int head = kv_head * group + of_head / p.L % group;
  wait_for_dependency();

  const float* const lse = plan.lse + row;
  float largest = -INFINITY, total = 0.0f;
  for (int s = lane; s < splits; s += 32) largest = fmaxf(largest, lse[static_cast<int64_t>(s) * rows]);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
  const float origin = largest == -INFINITY ? 0.0f : largest;
  for (int s = lane; s < splits; s += 32) total += exp2f(lse[static_cast<int64_t>(s) * rows] - origin);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xffffffff, total, lanes);
  const float merged = total > 0.0f ? origin + log2f(total) : -INFINITY;
  if (lane == 0) p.lse[(static_cast<int64_t>(sequence) * p.H + head) * p.L + query] = merged * kLn2;

  T* const out = static_cast<T*>(p.out) + ((static_cast<int64_t>(sequence) * p.L + query) * p.H + head) * p.D;
  for (int column = lane * 4; column < p.D; column += 128) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const int64_t at = static_cast<int64_t>(s) * rows;
      const float of_split = lse[at];
      if (of_split == -INFINITY) continue;  // there is no part
      const float weight = exp2f(of_split - merged);
      const float4 x = __ldcs(reinterpret_cast<const float4*>(plan.out + (at + row) * p.D + column));
      sum.x = __fmaf_rn(weight, x.x, sum.x);
      sum.y = __fmaf_rn(weight, x.y, sum.y);
      sum.z = __fmaf_rn(weight, x.z, sum.z);
      sum.w = __fmaf_rn(weight, x.w, sum.w);
    }
    alignas(8) typename Rounded<T>::Pair pairs[2] = {Rounded<T>::two(sum.x, sum.y), Rounded<T>::two(sum.z, sum.w)};
    *reinterpret_cast<uint2*>(out + column) = *reinterpret_cast<const uint2*>(pairs);
  }
}

}  // namespace

cudaError_t finish(const PrefixAttentionDecodeParams& p, const Plan& plan, bool early, cudaStream_t stream) {
  const auto kernel = p.dtype == DType::bf16 ? prefix_attention_decode_finish_kernel<__nv_bfloat16>
                                             : prefix_attention_decode_finish_kernel<__half>;
  const int64_t rows = static_cast<int64_t>(p.Hkv) * plan.rows;
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  return launch_dependent(kernel, early, grid, dim3(kThreads), 0, stream, p, plan);
}

}  // namespace fastpeft::prefix_attention
