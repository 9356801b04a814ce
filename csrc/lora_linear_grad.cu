// lora_down_grad: dA = scale * u^T (x * keep). lora_up_grad: dB = scale * dY^T xa and u = dY B.
//
// Bound by memory: x or dY [8192, 4096] of bf16 is 67 MB, 20.0 to 22.4 us at 3.35 to 3.0 TB/s (H100). Tensor cores need
// as long from rank 180 to 300 on (lora_linear_down.cu). In this page C is K for dA and N for dB.
//
// dA, dB: the sum is over rows. A CTA owns a slice of 256 columns, a part of the rows, which it takes 32 at a time, and
// all ranks up to 128 (more: x is read again, from L2, by the CTA beside it). A warp has 32 columns and keeps their
// sums in registers: R of them a lane. Partial sums: 4 * R * C bytes for each part of the rows, written and read.
//   C = 4096: 8 parts of the rows, 2 * 2.1 MB at rank 16, 2 * 8.4 MB at 64
//
// dB and u in one pass, up to rank 32: u sums over columns and dB over rows, so one of them is cut finely whatever a
// CTA owns. Of m rows and n columns the partial sums, written and read, are 4 * R * (1 / m + 1 / n) times the bytes of
// dY:
//   whole rows (m = 64, n = N): R / 16          two passes: 1, the second reading of dY
//   m = n = 512 (132 CTAs of dY [8192, 4096]): R / 64
// So a CTA owns 512 columns, 64 a warp, and about 512 rows, 16 at a time. dB stays in registers as above; B, too: 16 or
// 32 registers. Each warp has a part of u over its columns, and the CTA adds the eight parts in shared memory. At rank
// 32 the partial sums are half of dY, most of it in L2; at 64 they would be all of it, and B would need 64 kB of shared
// memory: there u is the pass of lora_down.
//
// Shared memory: a stage is 16 kB of x and 0.5 to 8 kB of the panel; 4 or 5 of them and 8 or 16 kB for u: 80 to 98 kB.
//
// Instructions of a warp in a step (8192 elements), counted in the machine code for 9.0, and what they take to issue in
// all (132 SMs, four a clock, 1.755 GHz), [8192, 4096] as above:
//   dA       rank 16: 114, 4.0 us    rank 64: 185, 6.5 us    rank 128: 251, 8.9 us
//   dropout           378, 13.4 us            435, 15.4 us             516, 18.2 us
//   dB and u rank 16: 207, 7.3 us    rank 32: 220, 7.8 us
#include <algorithm>

#include "lora_linear.cuh"

namespace fastpeft {
namespace lora {
namespace {

constexpr int kFusedRanks = 32;  // up to which u and dB share a pass

enum class Product {
  da,          // dA [R, C]
  da_dropout,  // of x * keep
  db,          // dB [C, R]
  db_u,        // dB and u
};

template <int RANKS, Product PRODUCT>
struct Shape {
  static constexpr bool with_u = PRODUCT == Product::db_u;
  static constexpr int warp_columns = with_u ? 64 : 32, columns = kWarps * warp_columns;
  static constexpr int rows = with_u ? 16 : 32;           // of a step
  static constexpr int stage = rows * (columns + RANKS);  // elements of 16 bits
  static constexpr int u_bytes = with_u ? kWarps * rows * RANKS * 4 : 0;
  static constexpr int room = (99 * 1024 - u_bytes) / (2 * stage), stages = room < 5 ? room : 5;
  static constexpr int smem_bytes = stages * 2 * stage + u_bytes;
  // On an SM; more than 64 registers of sums and of B leave no room for a second.
  static constexpr int ctas = RANKS * warp_columns / 32 + (with_u ? RANKS : 0) <= 64 ? 2 : 1;
};

template <class T>
struct Arguments {
  Matrix<T> x;                  // [M, C]: x or dY
  Matrix<T> v;                  // [M, R] or [M, R8]: u or xa
  float* partials;              // [splits, R, C8] or [splits, C, R8]
  int R, chunks, slices, rows;  // chunks of RANKS ranks; rows of a split
  Dropout dropout;
  // With u:
  const void* lora_b;  // B [C, R]
  DType adapter_dtype;
  float* u_partials;  // [slices, M, R8]
};

// Rows column to column + 63 of B as the second operand of 4 products of 16 of them, for each 8 ranks.
template <class T, int RANKS>
__device__ __forceinline__ void load_b(uint32_t (&b)[4][RANKS / 8][2], const Arguments<T>& p, int column, int r0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < RANKS / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = column + i * 16 + half * 8 + lane % 4 * 2 + e, r = r0 + j * 8 + lane / 4;
          const bool valid = n < p.x.columns && r < p.R;
          pair[e] = valid ? load_adapter<T>(p.lora_b, p.adapter_dtype, static_cast<int64_t>(n) * p.R + r) : T(0.0f);
        }
        b[i][j][half] = *reinterpret_cast<const uint32_t*>(pair);
      }
    }
  }
}

template <class T, int RANKS, Product PRODUCT>
__global__ void __launch_bounds__(kThreads, Shape<RANKS, PRODUCT>::ctas) lora_grad_kernel(Arguments<T> p) {
  using S = Shape<RANKS, PRODUCT>;
  constexpr bool is_db = PRODUCT == Product::db || PRODUCT == Product::db_u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunk = static_cast<int>(blockIdx.x % p.chunks), slice = static_cast<int>(blockIdx.x / p.chunks % p.slices);
  const int split = static_cast<int>(blockIdx.x / p.chunks / p.slices);
  const int r0 = chunk * RANKS, column0 = slice * S::columns, row0 = split * p.rows;
  const int warp_column = warp * S::warp_columns;
  const int rows = min(p.x.rows, row0 + p.rows), steps = (rows - row0 + S::rows - 1) / S::rows;
  const int ranks = min(p.R - r0, RANKS), ranks8 = (p.R + kVector - 1) / kVector * kVector;

  DYNAMIC_SMEM(smem);
  const auto x_of = [&](int stage) { return reinterpret_cast<T*>(smem) + stage * S::stage; };
  const auto v_of = [&](int stage) { return x_of(stage) + S::rows * S::columns; };
  const TileCopy<S::rows, S::columns> copy_x;
  const TileCopy<S::rows, RANKS> copy_v;
  const auto fetch = [&](int step, int stage) {
    const int row = row0 + step * S::rows;
    copy_x(x_of(stage), p.x, row, column0, rows);
    copy_v(v_of(stage), p.v, row, r0, rows);
  };
#pragma unroll 1
  for (int step = 0; step < S::stages - 1; ++step) {
    if (step < steps) fetch(step, step);
    cp_async_commit();
  }

  [[maybe_unused]] uint32_t b[4][RANKS / 8][2];
  if constexpr (S::with_u) load_b<T, RANKS>(b, p, column0 + warp_column, r0);
  [[maybe_unused]] uint32_t column_words[S::warp_columns / 8];  // of columns lane / 4 + 8 * j of the warp's
  if constexpr (PRODUCT == Product::da_dropout) {
#pragma unroll
    for (int j = 0; j < S::warp_columns / 8; ++j) {
      column_words[j] = Dropout::column(column0 + warp_column + j * 8 + lane / 4);
    }
  }

  const Fragments<is_db ? Operand::a : Operand::b, S::columns, true> x_fragments(warp_column, 0);
  const Fragments<is_db ? Operand::b : Operand::a, RANKS, true> v_fragments(0, 0);
  const Fragments<Operand::a, S::columns, false> u_fragments(0, warp_column);  // of x again, summed along its rows
  constexpr int tiles_m = (is_db ? S::warp_columns : RANKS) / 16, tiles_n = (is_db ? RANKS : S::warp_columns) / 8;
  float sum[tiles_m][tiles_n][4] = {};
#pragma unroll 1
  for (int step = 0, stage = 0; step < steps; ++step, stage = stage + 1 < S::stages ? stage + 1 : 0) {
    cp_async_wait<S::stages - 2>();
    __syncthreads();  // the step is there for all, and all are done with the stage of the step before
    if (step + S::stages - 1 < steps) fetch(step + S::stages - 1, stage > 0 ? stage - 1 : S::stages - 1);
    cp_async_commit();

    [[maybe_unused]] uint32_t row_word = 0;
    if constexpr (PRODUCT == Product::da_dropout) row_word = p.dropout.row(row0 + step * S::rows + lane);
#pragma unroll
    for (int m = 0; m < S::rows; m += 16) {
      uint32_t x[S::warp_columns / 16][4];
#pragma unroll
      for (int i = 0; i < S::warp_columns / 16; ++i) {
        x_fragments.load(x[i], x_of(stage), i * 16, m);
      }
      if constexpr (PRODUCT == Product::da_dropout) {
        static_assert(S::rows == 32, "a lane has the word of one row");
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t low = __shfl_sync(0xffffffff, row_word, m + half * 8 + lane % 4 * 2);
          const uint32_t high = __shfl_sync(0xffffffff, row_word, m + half * 8 + lane % 4 * 2 + 1);
#pragma unroll
          for (int j = 0; j < S::warp_columns / 8; ++j) {
            uint32_t& pair = x[j / 2][j % 2 * 2 + half];
            pair = p.dropout.template kept<T>(pair, low, column_words[j], high, column_words[j]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < RANKS / 16; ++i) {
        if (i == 0 || i * 16 < ranks) {
          uint32_t v[4];
          v_fragments.load(v, v_of(stage), i * 16, m);
#pragma unroll
          for (int j = 0; j < S::warp_columns / 16; ++j) {
            if constexpr (is_db) {
              multiply<T>(sum[j][2 * i], sum[j][2 * i + 1], x[j], v);
            } else {
              multiply<T>(sum[i][2 * j], sum[i][2 * j + 1], v, x[j]);
            }
          }
        }
      }
    }

    if constexpr (S::with_u) {
      float u[RANKS / 8][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t x[4];
        u_fragments.load(x, x_of(stage), 0, i * 16);
#pragma unroll
        for (int j = 0; j < RANKS / 8; ++j) mma_m16n8k16<T>(u[j], x, b[i][j]);
      }
      // The warps' parts of u, a lane's at the lane's place; then a thread adds eight parts of two elements in order.
      float2* const parts = reinterpret_cast<float2*>(smem + S::stages * 2 * S::stage);
      constexpr int pairs = S::rows * RANKS / 2;
#pragma unroll
      for (int j = 0; j < RANKS / 8; ++j) {
        parts[warp * pairs + (2 * j) * 32 + lane] = make_float2(u[j][0], u[j][1]);
        parts[warp * pairs + (2 * j + 1) * 32 + lane] = make_float2(u[j][2], u[j][3]);
      }
      __syncthreads();
      static_assert(pairs <= kThreads);
      const int pair = threadIdx.x, row = row0 + step * S::rows + lane / 4 + pair / 32 % 2 * 8;
      const int r = r0 + pair / 64 * 8 + lane % 4 * 2;
      if (pair < pairs && row < rows && r < ranks8) {
        float2 whole = parts[pair];
#pragma unroll
        for (int other = 1; other < kWarps; ++other) {
          const float2 part = parts[other * pairs + pair];
          whole.x += part.x;
          whole.y += part.y;
        }
        float* const to = p.u_partials + (static_cast<int64_t>(slice) * p.x.rows + row) * ranks8 + r;
        *reinterpret_cast<float2*>(to) = whole;
      }
    }
  }

  const int out_rows = is_db ? p.x.columns : p.R;
  const int out_columns = is_db ? ranks8 : (p.x.columns + kVector - 1) / kVector * kVector;
  const int m0 = is_db ? column0 + warp_column : r0, n0 = is_db ? r0 : column0 + warp_column;
#pragma unroll
  for (int i = 0; i < tiles_m; ++i) {
#pragma unroll
    for (int j = 0; j < tiles_n; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = m0 + i * 16 + half * 8 + lane / 4, n = n0 + j * 8 + lane % 4 * 2;
        if (m < out_rows && n < out_columns) {
          float* const to = p.partials + (static_cast<int64_t>(split) * out_rows + m) * out_columns + n;
          *reinterpret_cast<float2*>(to) = make_float2(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
        }
      }
    }
  }
}

// How the work of a pass is cut, and where its pieces lie in the workspace.
struct Plan {
  int ranks, chunks, slices, rows, splits;
  float *partials, *u_partials;
  void* packed;  // room for v, its rows filled up

  Plan(int M, int C, int R, Product product, Workspace& workspace) {
    const bool with_u = product == Product::db_u, is_db = with_u || product == Product::db;
    ranks = R <= 16 ? 16 : with_u ? kFusedRanks : R <= 64 ? 64 : 128;
    chunks = static_cast<int>(ceil_div(R, ranks));
    slices =
        static_cast<int>(ceil_div(C, with_u ? Shape<16, Product::db_u>::columns : Shape<16, Product::db>::columns));
    // With fewer rows a part would write more bytes than it reads, or do little but start and end.
    const int least_rows = std::max(64, 2 * ranks);
    rows = static_cast<int>(round_up(ceil_div(M, splits_for(int64_t{slices} * chunks, M / least_rows)), 32));
    splits = M > 0 ? static_cast<int>(ceil_div(M, rows)) : 1;
    const int64_t ranks8 = round_up(R, kVector);
    partials = workspace.take<float>(splits * (is_db ? C * ranks8 : R * round_up(C, kVector)));
    u_partials = workspace.take<float>(with_u ? int64_t{slices} * M * ranks8 : 0);
    packed = workspace.take<uint16_t>(R % kVector == 0 ? 0 : M * ranks8);
  }
};

// The product of x [M, C] and v [M, R]; `out` is dA [R, C] or dB [C, R] of adapter_dtype.
struct GradPass {
  const void* x;
  const void* v;
  void* out;
  DType adapter_dtype;
  float scale;
  Dropout dropout;
  DType dtype;
  int M, C, R;
  const void* lora_b;  // this and u: for db_u alone
  void* u;             // [M, R] of dtype
};

template <class T, int RANKS, Product PRODUCT>
cudaError_t launch_pass(const Arguments<T>& arguments, int64_t ctas, cudaStream_t stream) {
  return launch(lora_grad_kernel<T, RANKS, PRODUCT>, dim3(static_cast<unsigned>(ctas)), dim3(kThreads),
                Shape<RANKS, PRODUCT>::smem_bytes, stream, arguments);
}

template <class T, Product PRODUCT>
cudaError_t run(const GradPass& p, Workspace workspace, cudaStream_t stream) {
  const Plan plan(p.M, p.C, p.R, PRODUCT, workspace);
  Matrix<T> v(p.v, p.M, p.R);
  if (p.R % kVector != 0) {
    T* const packed = static_cast<T*>(plan.packed);
    const cudaError_t error = pack(p.v, p.dtype, p.M, p.R, packed, stream);
    if (error != cudaSuccess) return error;
    v = Matrix<T>(packed, p.M, static_cast<int>(round_up(p.R, kVector)));
  }
  const Arguments<T> arguments{Matrix<T>(p.x, p.M, p.C),
                               v,
                               plan.partials,
                               p.R,
                               plan.chunks,
                               plan.slices,
                               plan.rows,
                               p.dropout,
                               p.lora_b,
                               p.adapter_dtype,
                               plan.u_partials};
  const int64_t ctas = int64_t{plan.slices} * plan.splits * plan.chunks;
  cudaError_t error;
  if (plan.ranks == 16) {
    error = launch_pass<T, 16, PRODUCT>(arguments, ctas, stream);
  } else if constexpr (PRODUCT == Product::db_u) {
    error = launch_pass<T, kFusedRanks, PRODUCT>(arguments, ctas, stream);
  } else if (plan.ranks == 64) {
    error = launch_pass<T, 64, PRODUCT>(arguments, ctas, stream);
  } else {
    error = launch_pass<T, 128, PRODUCT>(arguments, ctas, stream);
  }
  if (error != cudaSuccess) return error;

  constexpr bool is_db = PRODUCT == Product::db || PRODUCT == Product::db_u;
  const int rows = is_db ? p.C : p.R, columns = is_db ? p.R : p.C;
  const Sum sums[] = {{plan.partials, p.out, p.adapter_dtype, rows, columns, plan.splits, p.scale},
                      {plan.u_partials, p.u, p.dtype, p.M, p.R, plan.slices, 1.0f}};
  return add_partials(sums, PRODUCT == Product::db_u ? 2 : 1, stream);
}

template <Product PRODUCT>
cudaError_t grad_pass(const GradPass& p, void* workspace, cudaStream_t stream) {
  return p.dtype == DType::bf16 ? run<__nv_bfloat16, PRODUCT>(p, Workspace(workspace), stream)
                                : run<__half, PRODUCT>(p, Workspace(workspace), stream);
}

size_t grad_pass_workspace_bytes(int M, int C, int R, Product product) {
  Workspace workspace;
  Plan(M, C, R, product, workspace);
  return workspace.bytes();
}

}  // namespace
}  // namespace lora

cudaError_t lora_down_grad(const LoraDownGradParams& p, cudaStream_t stream) {
  using namespace lora;
  if (!is_valid(p.dtype, p.adapter_dtype, p.M, p.K, p.R, p.workspace)) return cudaErrorInvalidValue;
  if (p.K == 0 || p.R == 0) return cudaSuccess;
  const Dropout dropout(p.seed, p.dropout_p);
  const GradPass pass{p.x, p.u, p.d_a, p.adapter_dtype, p.scale, dropout, p.dtype, p.M, p.K, p.R, nullptr, nullptr};
  return dropout.drops() ? grad_pass<Product::da_dropout>(pass, p.workspace, stream)
                         : grad_pass<Product::da>(pass, p.workspace, stream);
}

size_t lora_down_grad_workspace_bytes(int M, int K, int R) {
  using namespace lora;
  return K > 0 && R > 0 ? grad_pass_workspace_bytes(M, K, R, Product::da) : 0;
}

cudaError_t lora_up_grad(const LoraUpGradParams& p, cudaStream_t stream) {
  using namespace lora;
  if (!is_valid(p.dtype, p.adapter_dtype, p.M, p.N, p.R, p.workspace)) return cudaErrorInvalidValue;
  const bool want_u = p.u && p.M > 0 && p.R > 0, want_db = p.d_b && p.N > 0 && p.R > 0;
  const Dropout none(nullptr, 0);
  const GradPass pass{p.dy, p.xa, p.d_b, p.adapter_dtype, p.scale, none, p.dtype, p.M, p.N, p.R, p.lora_b, p.u};
  if (want_u && want_db && p.R <= kFusedRanks) return grad_pass<Product::db_u>(pass, p.workspace, stream);
  if (want_u) {  // one pass after the other, over the same workspace
    const DownPass u{p.dy, p.lora_b, p.adapter_dtype, true, p.u, none, p.dtype, p.M, p.N, p.R};
    const cudaError_t error = down_pass(u, Workspace(p.workspace), stream);
    if (error != cudaSuccess) return error;
  }
  return want_db ? grad_pass<Product::db>(pass, p.workspace, stream) : cudaSuccess;
}

size_t lora_up_grad_workspace_bytes(int M, int N, int R) {
  using namespace lora;
  if (R == 0) return 0;
  size_t bytes = M > 0 ? down_pass_workspace_bytes(M, N, R) : 0;
  if (N > 0) bytes = std::max(bytes, grad_pass_workspace_bytes(M, N, R, Product::db));
  if (M > 0 && N > 0 && R <= kFusedRanks) bytes = std::max(bytes, grad_pass_workspace_bytes(M, N, R, Product::db_u));
  return bytes;
}

}  // namespace fastpeft
