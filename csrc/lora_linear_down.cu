// lora_down: xa = (x * keep) A^T. The same pass makes u = dY B for lora_up_grad where that is not fused.
//
// Bound by memory. x [8192, 4096] of bf16 on an H100: 67 MB, A and xa 0.4 MB at rank 16; 20.1 to 22.5 us at 3.35 to
// 3.0 TB/s. x is read once up to rank 128; above, once for each 128 ranks, by CTAs that run at the same time, so that
// all but the first find it in L2. Tensor cores need as long as memory from rank 180 on if mma.sync does 600 TFLOP/s,
// from 300 on at the peak of 989.
//
// Work split: a CTA owns 64 rows (128 above rank 64, since the panel is read anew for each block of rows: R / 64 bytes
// from L2 for each byte of x) and a part of the columns, in steps of 64. Of its 8 warps two have 32 rows each, in four
// groups, and a group has 16 columns of every step (above rank 64: four warps, two groups, 32 columns). 32 rows a warp
// halve what 16 would read of the panel in shared memory; a split by ranks would make each warp hash every element.
// From M = 8192 on there are enough blocks of rows, no partial sums and one launch; below, columns are cut.
//
// Shared memory: 6 stages of 16 kB at rank 64, 8 of 10 kB at 16, 3 of 32 kB at 128; at most 96 kB, as a CTA of 8.6, 8.9
// and 12.0 has 99. 56 (40, 32) kB of x are under way on an SM with one CTA; 3.35 TB/s at a latency of 0.8 us take 20.
//
// Instructions of a warp in a step, counted in the machine code for 9.0, and what they take to issue in all (132 SMs,
// four a clock, 1.755 GHz), [8192, 4096] as above:
//   rank 16: 80, 5.7 us     rank 64: 108, 7.6 us     rank 128: 180, 6.4 us (a step has twice the rows)
//   dropout: 211, 14.9 us            239, 16.9 us              439, 15.5 us
// The hash of dropout costs 8 instructions an element and keeps the integer pipe (two clocks an instruction) busy for
// 14.6 to 16 us. That hides behind 3.35 TB/s at any rank; at 8 TB/s it would be the bound.
#include "lora_linear.cuh"

namespace fastpeft {
namespace lora {
namespace {

constexpr int kColumns = 64;    // of x, a step: 128 bytes of a row
constexpr int kLeastSteps = 4;  // of a split; with fewer a CTA would do little but start and end

template <int RANKS>
struct Shape {
  static constexpr int rows = RANKS <= 64 ? 64 : 128;
  static constexpr int warps_m = rows / 32, groups = kWarps / warps_m, group_columns = kColumns / groups;
  static constexpr int stage = (rows + RANKS) * kColumns;  // elements of 16 bits
  static constexpr int stages = 96 * 1024 / (2 * stage) < 8 ? 96 * 1024 / (2 * stage) : 8;
  static constexpr int smem_bytes = stages * 2 * stage;
  static constexpr int sums_stride = RANKS + 8;  // float32; lanes that store pairs of eight rows do not conflict
  static_assert(rows * sums_stride * 4 <= smem_bytes, "the sums take the place of the stages");
};

template <class T>
struct Arguments {
  Matrix<T> x;                   // [M, C]
  Matrix<T> panel;               // A [R, C] or B [C, R]
  T* out;                        // [M, R], if there is one split
  float* partials;               // [splits, M, R8]
  int R, chunks, splits, steps;  // chunks of RANKS ranks; steps of a split
  Dropout dropout;
};

// TRANSPOSED: the panel is B. DROPOUT: of x.
template <class T, int RANKS, bool TRANSPOSED, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, RANKS <= 64 ? 2 : 1) lora_down_kernel(Arguments<T> p) {
  using S = Shape<RANKS>;
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % S::warps_m, group = threadIdx.x / 32 / S::warps_m;
  const int chunk = static_cast<int>(blockIdx.x % p.chunks), split = static_cast<int>(blockIdx.x / p.chunks % p.splits);
  const int r0 = chunk * RANKS, row0 = static_cast<int>(blockIdx.x / p.chunks / p.splits) * S::rows;
  const int column0 = split * p.steps * kColumns;
  const int steps = min(p.steps, (p.x.columns - column0 + kColumns - 1) / kColumns);
  const int ranks = min(p.R - r0, RANKS);

  DYNAMIC_SMEM(smem);
  const auto x_of = [&](int stage) { return reinterpret_cast<T*>(smem) + stage * S::stage; };
  const auto panel_of = [&](int stage) { return x_of(stage) + S::rows * kColumns; };
  const TileCopy<S::rows, kColumns> copy_x;
  const TileCopy<TRANSPOSED ? kColumns : RANKS, TRANSPOSED ? RANKS : kColumns> copy_panel;
  const auto fetch = [&](int step, int stage) {
    const int column = column0 + step * kColumns;
    copy_x(x_of(stage), p.x, row0, column, p.x.rows);
    copy_panel(panel_of(stage), p.panel, TRANSPOSED ? column : r0, TRANSPOSED ? r0 : column, p.panel.rows);
  };
#pragma unroll 1
  for (int step = 0; step < S::stages - 1; ++step) {
    if (step < steps) fetch(step, step);
    cp_async_commit();
  }

  uint32_t row_words[4];  // of rows lane / 4 + 8 * i of the warp's 32
  if constexpr (DROPOUT) {
#pragma unroll
    for (int i = 0; i < 4; ++i) row_words[i] = p.dropout.row(row0 + warp_m * 32 + lane / 4 + 8 * i);
  }

  const Fragments<Operand::a, kColumns, false> x_fragments(warp_m * 32, group * S::group_columns);
  const Fragments<Operand::b, TRANSPOSED ? RANKS : kColumns, TRANSPOSED> panel_fragments(0, group * S::group_columns);
  float sum[2][RANKS / 8][4] = {};
#pragma unroll 1
  for (int step = 0, stage = 0; step < steps; ++step, stage = stage + 1 < S::stages ? stage + 1 : 0) {
    cp_async_wait<S::stages - 2>();
    __syncthreads();  // the step is there for all, and all are done with the stage of the step before
    if (step + S::stages - 1 < steps) fetch(step + S::stages - 1, stage > 0 ? stage - 1 : S::stages - 1);
    cp_async_commit();
#pragma unroll
    for (int k = 0; k < S::group_columns; k += 16) {
      uint32_t x[2][4];
      x_fragments.load(x[0], x_of(stage), 0, k);
      x_fragments.load(x[1], x_of(stage), 16, k);
      if constexpr (DROPOUT) {
        const int column = column0 + step * kColumns + group * S::group_columns + k + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t low = Dropout::column(column + half * 8), high = Dropout::column(column + half * 8 + 1);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            uint32_t& pair = x[m / 2][half * 2 + m % 2];
            pair = p.dropout.template kept<T>(pair, row_words[m], low, row_words[m], high);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < RANKS / 16; ++j) {
        if (j == 0 || j * 16 < ranks) {
          uint32_t a[4];
          panel_fragments.load(a, panel_of(stage), j * 16, k);
          multiply<T>(sum[0][2 * j], sum[0][2 * j + 1], x[0], a);
          multiply<T>(sum[1][2 * j], sum[1][2 * j + 1], x[1], a);
        }
      }
    }
  }

  // The groups add their sums in turn, where the stages were (no copy is under way); then all write them out.
  float* const sums = reinterpret_cast<float*>(smem);  // [S::rows][S::sums_stride]
#pragma unroll 1
  for (int turn = 0; turn < S::groups; ++turn) {
    __syncthreads();
    if (group != turn) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const row = sums + (warp_m * 32 + i * 8 + lane / 4) * S::sums_stride + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < RANKS / 8; ++j) {
        float2* const at = reinterpret_cast<float2*>(row + j * 8);
        float2 pair = make_float2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
        if (turn > 0) pair = make_float2(at->x + pair.x, at->y + pair.y);
        *at = pair;
      }
    }
  }
  __syncthreads();
  const int ranks8 = (p.R + kVector - 1) / kVector * kVector;
#pragma unroll 1
  for (int i = threadIdx.x; i < S::rows * RANKS / 2; i += kThreads) {
    const int m = row0 + i / (RANKS / 2), r = r0 + i % (RANKS / 2) * 2;
    if (m >= p.x.rows) break;
    const float2 pair = *reinterpret_cast<const float2*>(sums + (m - row0) * S::sums_stride + r - r0);
    if (p.splits == 1) {
      T* const to = p.out + static_cast<int64_t>(m) * p.R + r;
      if (r < p.R) to[0] = Rounded<T>::one(pair.x);
      if (r + 1 < p.R) to[1] = Rounded<T>::one(pair.y);
    } else if (r < ranks8) {
      float* const to = p.partials + (static_cast<int64_t>(split) * p.x.rows + m) * ranks8 + r;
      *reinterpret_cast<float2*>(to) = pair;
    }
  }
}

// How the work is cut, and where its pieces lie in the workspace.
struct Plan {
  int ranks, chunks, row_blocks, splits, steps;
  float* partials;
  void* packed;  // room for the adapter in T, its rows aligned

  Plan(int M, int C, int R, Workspace& workspace) {
    ranks = R <= 16 ? 16 : R <= 64 ? 64 : 128;
    chunks = static_cast<int>(ceil_div(R, ranks));
    row_blocks = static_cast<int>(ceil_div(M, ranks <= 64 ? Shape<64>::rows : Shape<128>::rows));
    const int64_t all_steps = ceil_div(C, kColumns);
    const int wanted = splits_for(int64_t{row_blocks} * chunks, all_steps / kLeastSteps);
    steps = static_cast<int>(ceil_div(all_steps, wanted));
    splits = steps > 0 ? static_cast<int>(ceil_div(all_steps, steps)) : 1;
    partials = workspace.take<float>(splits > 1 ? int64_t{splits} * M * round_up(R, kVector) : 0);
    const int64_t of_a = R * round_up(C, kVector), of_b = C * round_up(R, kVector);
    packed = workspace.take<uint16_t>(of_a > of_b ? of_a : of_b);
  }
};

template <class T, int RANKS>
cudaError_t launch_pass(const Arguments<T>& arguments, bool transposed, int64_t ctas, cudaStream_t stream) {
  const auto kernel = transposed                  ? lora_down_kernel<T, RANKS, true, false>
                      : arguments.dropout.drops() ? lora_down_kernel<T, RANKS, false, true>
                                                  : lora_down_kernel<T, RANKS, false, false>;
  return launch(kernel, dim3(static_cast<unsigned>(ctas)), dim3(kThreads), Shape<RANKS>::smem_bytes, stream, arguments);
}

template <class T>
cudaError_t run(const DownPass& p, Workspace workspace, cudaStream_t stream) {
  const Plan plan(p.M, p.C, p.R, workspace);
  const int rows = p.transposed ? p.C : p.R, columns = p.transposed ? p.R : p.C;
  Matrix<T> panel(p.adapter, rows, columns);
  if (p.adapter_dtype == DType::fp32 || !panel.vectors) {
    T* const packed = static_cast<T*>(plan.packed);
    const cudaError_t error = pack(p.adapter, p.adapter_dtype, rows, columns, packed, stream);
    if (error != cudaSuccess) return error;
    panel = Matrix<T>(packed, rows, static_cast<int>(round_up(columns, kVector)));
  }
  const Arguments<T> arguments{Matrix<T>(p.x, p.M, p.C),
                               panel,
                               static_cast<T*>(p.out),
                               plan.partials,
                               p.R,
                               plan.chunks,
                               plan.splits,
                               plan.steps,
                               p.dropout};
  const int64_t ctas = int64_t{plan.row_blocks} * plan.splits * plan.chunks;
  const cudaError_t error = plan.ranks == 16   ? launch_pass<T, 16>(arguments, p.transposed, ctas, stream)
                            : plan.ranks == 64 ? launch_pass<T, 64>(arguments, p.transposed, ctas, stream)
                                               : launch_pass<T, 128>(arguments, p.transposed, ctas, stream);
  if (error != cudaSuccess || plan.splits == 1) return error;
  const Sum sum{plan.partials, p.out, p.dtype, p.M, p.R, plan.splits, 1.0f};
  return add_partials(&sum, 1, stream);
}

}  // namespace

cudaError_t down_pass(const DownPass& p, Workspace workspace, cudaStream_t stream) {
  return p.dtype == DType::bf16 ? run<__nv_bfloat16>(p, workspace, stream) : run<__half>(p, workspace, stream);
}

size_t down_pass_workspace_bytes(int M, int C, int R) {
  Workspace workspace;
  Plan(M, C, R, workspace);
  return workspace.bytes();
}

}  // namespace lora

cudaError_t lora_down(const LoraDownParams& p, cudaStream_t stream) {
  if (!lora::is_valid(p.dtype, p.adapter_dtype, p.M, p.K, p.R, p.workspace)) return cudaErrorInvalidValue;
  if (p.M == 0 || p.R == 0) return cudaSuccess;
  return lora::down_pass(
      {p.x, p.lora_a, p.adapter_dtype, false, p.xa, Dropout(p.seed, p.dropout_p), p.dtype, p.M, p.K, p.R},
      lora::Workspace(p.workspace), stream);
}

size_t lora_down_workspace_bytes(int M, int K, int R) {
  return M > 0 && R > 0 ? lora::down_pass_workspace_bytes(M, K, R) : 0;
}

}  // namespace fastpeft
