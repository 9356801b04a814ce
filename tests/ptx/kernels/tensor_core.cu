// Small kernels around the wrappers of csrc/ptx.cuh, for tests that know every element of the answer.
#include "ptx.cuh"

using namespace fastpeft;

// d [16, 8] = a [16, 16] * b [16, 8], one warp; the fragments are gathered element by element.
template <class T>
__device__ void multiply(const uint16_t* a, const uint16_t* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const from = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
    fa[i] = pair(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = pair(b[(t + 8 * i) * 8 + g], b[(t + 8 * i + 1) * 8 + g]);
  float sum[4] = {};
  mma_m16n8k16<T>(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i];
}

extern "C" __global__ void mma_bf16_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  multiply<__nv_bfloat16>(a, b, d);
}
extern "C" __global__ void mma_fp16_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  multiply<__half>(a, b, d);
}

// out[i][lane] = register i of lane, for the four 8x8 matrices that are rows 8 * i to 8 * i + 7 of `in` [32, 8].
template <bool TRANS>
__device__ void load_matrices(const uint4* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  rows[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  uint32_t r[4];
  TRANS ? ldmatrix_x4_trans(r, &rows[threadIdx.x]) : ldmatrix_x4(r, &rows[threadIdx.x]);
  for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = r[i];
}

extern "C" __global__ void ldmatrix_kernel(const uint4* in, uint32_t* out) { load_matrices<false>(in, out); }
extern "C" __global__ void ldmatrix_trans_kernel(const uint4* in, uint32_t* out) { load_matrices<true>(in, out); }

// out = a [M, K] * b [K, N], row-major, K and N multiples of 8. A CTA of 2 warps owns 32 x 32 of out, a warp 16 rows of
// it. Steps of 16 along K pass through three buffers: two are on their way while one is multiplied.
template <class T>
__device__ void gemm(const T* a, const T* b, float* out, int M, int N, int K) {
  constexpr int kBuffers = 3, kTile = 32, kStep = 16, kPad = 8;
  __shared__ __align__(16) T tile_a[kBuffers][kTile][kStep + kPad];
  __shared__ __align__(16) T tile_b[kBuffers][kStep][kTile + kPad];
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = (K + kStep - 1) / kStep;

  const auto fetch = [&](int step) {  // a thread: 16 bytes of each tile
    const int a_row = threadIdx.x / 2, a_column = threadIdx.x % 2 * 8, k = step * kStep + a_column;
    const bool a_valid = m0 + a_row < M && k < K;
    cp_async_16(&tile_a[step % kBuffers][a_row][a_column], a_valid ? a + (m0 + a_row) * K + k : a, a_valid);
    const int b_row = threadIdx.x / 4, b_column = threadIdx.x % 4 * 8;
    const bool b_valid = step * kStep + b_row < K && n0 + b_column < N;
    const T* const from = b + (step * kStep + b_row) * N + n0 + b_column;
    cp_async_16(&tile_b[step % kBuffers][b_row][b_column], b_valid ? from : b, b_valid);
  };

  for (int step = 0; step < kBuffers - 1; ++step) {
    if (step < steps) fetch(step);
    cp_async_commit();
  }
  float sum[4][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kBuffers - 2>();
    __syncthreads();  // all copies of this step are there, and nobody reads the buffer that is filled next
    if (step + kBuffers - 1 < steps) fetch(step + kBuffers - 1);
    cp_async_commit();
    uint32_t fa[4];
    ldmatrix_x4(fa, &tile_a[step % kBuffers][warp * 16 + lane % 16][lane / 16 * 8]);
    for (int j = 0; j < 4; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4_trans(fb, &tile_b[step % kBuffers][lane % 16][j * 8 + lane / 16 * 8]);
      mma_m16n8k16<T>(sum[j], fa, {fb[0], fb[1]});
      mma_m16n8k16<T>(sum[j + 1], fa, {fb[2], fb[3]});
    }
  }
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + warp * 16 + lane / 4 + i / 2 * 8, n = n0 + j * 8 + lane % 4 * 2 + i % 2;
      if (m < M && n < N) out[m * N + n] = sum[j][i];
    }
  }
}

extern "C" __global__ void gemm_bf16_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out, int M, int N,
                                            int K) {
  gemm(a, b, out, M, N, K);
}
extern "C" __global__ void gemm_fp16_kernel(const __half* a, const __half* b, float* out, int M, int N, int K) {
  gemm(a, b, out, M, N, K);
}
