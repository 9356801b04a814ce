// lora_add: y += scale * keep * (xa B^T), in place, or with A [R, N] for B^T. With a gain, DoRA's: out = gain * y +
// bias too, of the sum y before it is rounded.
//
// Bound by memory: y [8192, 4096] of bf16 is 67 MB, read and written, 40 to 45 us at 3.35 to 3.0 TB/s (H100); xa and B
// come from L2, R / 128 bytes for each byte of y moved. Tensor cores need as long from rank 400 on
// (lora_linear_down.cu). A second output adds 20 to 22 us, half of what a kernel of its own would take.
//
// Work split: a CTA owns 128x128 of y, a warp 32x64. Nothing is pipelined in a CTA: y is on its way to shared memory
// while the product is formed, 32 ranks at a time, and the second CTA on the SM moves its y meanwhile. y goes through
// shared memory, since in the registers of mma a row has 16 contiguous bytes only over four lanes: so it is loaded and
// stored in rows of 256 bytes, and two elements of a lane are added to in between, without a bank conflict. The second
// output goes the same way when the first is stored; its float32 sums wait in the registers of the product.
//
// Shared memory: 32 kB of y, 8 kB of xa, 8 kB of the adapter: what a CTA may have without asking, and two fit on any
// SM. The hash of dropout adds 7 instructions an element (dropout.cuh), a quarter of what memory leaves room for.
#include "lora_linear.cuh"

namespace fastpeft {
namespace lora {
namespace {

constexpr int kTile = 128;  // rows and columns of y, a CTA
constexpr int kWarpRows = 32, kWarpColumns = 64;
static_assert(kTile / kWarpRows * (kTile / kWarpColumns) == kWarps);
constexpr int kRanks = 32;  // in shared memory at a time

template <class T>
struct Arguments {
  Matrix<T> y;          // [M, N]
  Matrix<T> xa;         // [M, R]
  const void* adapter;  // B [N, R] or A [R, N]
  DType adapter_dtype;
  bool adapter_vectors;  // its rows are whole aligned vectors
  int column_tiles;
  float scale;
  Dropout dropout;
  // With a gain:
  const float* gain;  // [N]
  const T* bias;      // [N] or null
  Matrix<T> out;      // [M, N]; where it is y, y is not stored before
};

template <class T>
struct Shared {
  alignas(16) T y[kTile * kTile];
  alignas(16) T xa[kTile * kRanks];
  alignas(16) T adapter[kTile * kRanks];  // [n][r], or [r][n]
};

// Elements column to column + 7 of a row of the adapter, in T; zeros from `columns` on, where nothing is read.
template <class T>
__device__ __forceinline__ uint4 load_vector(const Arguments<T>& p, int row, int columns, int column) {
  const int64_t at = static_cast<int64_t>(row) * columns + column;
  alignas(16) T x[kVector];
  if (!p.adapter_vectors) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      x[e] = column + e < columns ? load_adapter<T>(p.adapter, p.adapter_dtype, at + e) : T(0.0f);
    }
  } else if (column >= columns) {
    return make_uint4(0, 0, 0, 0);
  } else if (p.adapter_dtype != DType::fp32) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.adapter) + at));
  } else {
    const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(p.adapter) + at);
    const float4 low = __ldg(from), high = __ldg(from + 1);
    typename Rounded<T>::Pair* const pairs = reinterpret_cast<typename Rounded<T>::Pair*>(x);
    pairs[0] = Rounded<T>::two(low.x, low.y);
    pairs[1] = Rounded<T>::two(low.z, low.w);
    pairs[2] = Rounded<T>::two(high.x, high.y);
    pairs[3] = Rounded<T>::two(high.z, high.w);
  }
  return *reinterpret_cast<const uint4*>(x);
}

template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_adapter_tile(T* tile, const Arguments<T>& p, int row, int column, int rows,
                                                  int columns) {
  constexpr int vectors = COLUMNS / kVector;
#pragma unroll
  for (int first = 0; first < ROWS * vectors; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x), m = row + i / vectors, k = column + i % vectors * kVector;
    const uint4 x = m < rows ? load_vector(p, m, columns, k) : make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(tile + vector_at<COLUMNS>(i / vectors, i % vectors)) = x;
  }
}

template <class T>
__device__ __forceinline__ void store_tile(const Matrix<T>& matrix, const T* tile, int row0, int column0) {
#pragma unroll
  for (int first = 0; first < kTile * kTile / kVector; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int row = row0 + i / (kTile / kVector), vector = i % (kTile / kVector), column = column0 + vector * kVector;
    if (row >= matrix.rows || column >= matrix.columns) continue;
    T* const to = const_cast<T*>(matrix.data) + static_cast<int64_t>(row) * matrix.columns + column;
    const T* const from = tile + vector_at<kTile>(i / (kTile / kVector), vector);
    if (matrix.vectors) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < kVector && column + e < matrix.columns; ++e) to[e] = from[e];
    }
  }
}

template <class T, bool TRANSPOSED, bool GAIN>
__global__ void __launch_bounds__(kThreads, 2) lora_add_kernel(Arguments<T> p) {
  using Pair = typename Rounded<T>::Pair;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = static_cast<int>(blockIdx.x / p.column_tiles) * kTile;
  const int column0 = static_cast<int>(blockIdx.x % p.column_tiles) * kTile;
  const int warp_row = warp % (kTile / kWarpRows) * kWarpRows, warp_column = warp / (kTile / kWarpRows) * kWarpColumns;
  const int M = p.y.rows, N = p.y.columns, R = p.xa.columns;

  __shared__ Shared<T> shared;
  T *const y = shared.y, *const xa = shared.xa, *const adapter = shared.adapter;
  TileCopy<kTile, kTile>()(y, p.y, row0, column0, M);
  const TileCopy<kTile, kRanks> copy_xa;
  const Fragments<Operand::a, kRanks, false> xa_fragments(warp_row, 0);
  const Fragments<Operand::b, TRANSPOSED ? kTile : kRanks, TRANSPOSED> adapter_fragments(warp_column, 0);

  float sum[2][kWarpColumns / 8][4] = {};
#pragma unroll 1
  for (int r0 = 0; r0 == 0 || r0 < R; r0 += kRanks) {
    if (r0 > 0) __syncthreads();  // all are done with the ranks before
    copy_xa(xa, p.xa, row0, r0, M);
    cp_async_commit();
    if constexpr (TRANSPOSED) {
      load_adapter_tile<T, kRanks, kTile>(adapter, p, r0, column0, R, N);
    } else {
      load_adapter_tile<T, kTile, kRanks>(adapter, p, column0, r0, N, R);
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRanks; k += 16) {
      if (r0 + k >= R) break;
      uint32_t a[2][4];
      xa_fragments.load(a[0], xa, 0, k);
      xa_fragments.load(a[1], xa, 16, k);
#pragma unroll
      for (int j = 0; j < kWarpColumns / 16; ++j) {
        uint32_t b[4];
        adapter_fragments.load(b, adapter, j * 16, k);
        multiply<T>(sum[0][2 * j], sum[0][2 * j + 1], a[0], b);
        multiply<T>(sum[1][2 * j], sum[1][2 * j + 1], a[1], b);
      }
    }
  }

  const auto y_at = [&](int i, int j) {  // a lane's pair in row 8 * i and columns 8 * j of its warp
    const int row = warp_row + i * 8 + lane / 4, column = warp_column + j * 8 + lane % 4 * 2;
    return reinterpret_cast<Pair*>(y + vector_at<kTile>(row, column / kVector) + column % kVector);
  };
  const bool stores_y = !GAIN || p.out.data != p.y.data;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + warp_row + i * 8 + lane / 4;
    const uint32_t row_word = !GAIN && p.dropout.drops() ? p.dropout.row(row) : 0;
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
      float2 product = make_float2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      if (!GAIN && p.dropout.drops()) {
        const int column = column0 + warp_column + j * 8 + lane % 4 * 2;
        if (!p.dropout.keeps(row_word, Dropout::column(column))) product.x = 0;
        if (!p.dropout.keeps(row_word, Dropout::column(column + 1))) product.y = 0;
      }
      Pair* const at = y_at(i, j);
      const float2 old = to_float2(*at);
      const float2 whole = make_float2(__fmaf_rn(p.scale, product.x, old.x), __fmaf_rn(p.scale, product.y, old.y));
      if (stores_y) *at = Rounded<T>::two(whole.x, whole.y);
      if constexpr (GAIN) {
        sum[i / 2][j][i % 2 * 2] = whole.x;
        sum[i / 2][j][i % 2 * 2 + 1] = whole.y;
      }
    }
  }
  if (stores_y) {
    __syncthreads();
    store_tile(p.y, y, row0, column0);
  }

  if constexpr (GAIN) {
    if (stores_y) __syncthreads();  // the tile has room for `out`
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
      float gain[2], bias[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = column0 + warp_column + j * 8 + lane % 4 * 2 + e;
        gain[e] = n < N ? __ldg(p.gain + n) : 0.0f;
        bias[e] = p.bias && n < N ? static_cast<float>(__ldg(p.bias + n)) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const whole = &sum[i / 2][j][i % 2 * 2];
        *y_at(i, j) = Rounded<T>::two(__fmaf_rn(gain[0], whole[0], bias[0]), __fmaf_rn(gain[1], whole[1], bias[1]));
      }
    }
    __syncthreads();
    store_tile(p.out, y, row0, column0);
  }
}

template <class T>
cudaError_t run(const LoraAddParams& p, cudaStream_t stream) {
  const int columns = p.transposed ? p.N : p.R;
  const bool vectors = columns % kVector == 0 && is_aligned(p.lora_b, 16);
  const int column_tiles = static_cast<int>(ceil_div(p.N, kTile));
  const Arguments<T> arguments{Matrix<T>(p.y, p.M, p.N),
                               Matrix<T>(p.xa, p.M, p.R),
                               p.lora_b,
                               p.adapter_dtype,
                               vectors,
                               column_tiles,
                               p.scale,
                               Dropout(p.seed, p.dropout_p),
                               p.gain,
                               static_cast<const T*>(p.bias),
                               Matrix<T>(p.out, p.M, p.N)};
  const int64_t tiles = ceil_div(p.M, kTile) * column_tiles;
  const auto kernel = p.gain         ? lora_add_kernel<T, false, true>
                      : p.transposed ? lora_add_kernel<T, true, false>
                                     : lora_add_kernel<T, false, false>;
  return launch(kernel, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), 0, stream, arguments);
}

}  // namespace
}  // namespace lora

cudaError_t lora_add(const LoraAddParams& p, cudaStream_t stream) {
  if (!lora::is_valid(p.dtype, p.adapter_dtype, p.M, p.N, p.R, nullptr)) return cudaErrorInvalidValue;
  if (p.M == 0 || p.N == 0) return cudaSuccess;  // pointers may be null
  const bool drops = p.seed != nullptr && p.dropout_p > 0;
  if ((p.gain != nullptr) != (p.out != nullptr) || (p.gain && (p.transposed || drops))) return cudaErrorInvalidValue;
  if (p.R == 0 && !p.gain) return cudaSuccess;
  return p.dtype == DType::bf16 ? lora::run<__nv_bfloat16>(p, stream) : lora::run<__half>(p, stream);
}

}  // namespace fastpeft
