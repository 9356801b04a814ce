// What the low-rank passes of training share: matrices in global memory, tiles of them in shared memory, the fragments
// that tensor cores take, the workspace, and the kernels that fill it before a pass and empty it after.
//
// All matrices are row-major. R8 and C8 are R and C rounded up to a multiple of 8, so that rows in the workspace are
// whole vectors of 16 bytes.
//
// The passes have the same plan. A CTA streams its part of x (or dY) through shared memory in steps, by copies of 16
// bytes (cp.async) that are several steps ahead; mma.m16n8k16 multiplies a step with the part of the panel that goes
// with it, the adapter or another matrix R wide. Ranks are filled up with zeros to a multiple of 16 in shared memory.
// Sums are float32; where a sum is cut, each part goes to the workspace and add_partials adds the parts in order, so
// that results depend on the sizes alone.
#pragma once

#include "common.cuh"
#include "dropout.cuh"
#include "ptx.cuh"

namespace fastpeft::lora {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kVector = 8;  // elements of 16 bits in 16 bytes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
struct Matrix {
  const T* data;
  int rows, columns;
  bool vectors;  // rows are whole aligned vectors

  Matrix(const void* data, int rows, int columns)
      : data(static_cast<const T*>(data)),
        rows(rows),
        columns(columns),
        vectors(columns % kVector == 0 && is_aligned(data, 16)) {}
};

// A is [R, K], B is [N, R], in T or as a float32 master copy that is rounded when it is read.
template <class T>
__device__ __forceinline__ T load_adapter(const void* data, DType dtype, int64_t i) {
  return dtype == DType::fp32 ? Rounded<T>::one(__ldg(static_cast<const float*>(data) + i))
                              : __ldg(static_cast<const T*>(data) + i);
}

__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

// A tile in shared memory is COLUMNS wide, in vectors of 16 bytes, and the vectors of a row are swizzled: eight rows
// that follow each other have vector v in eight different groups of four banks, so ldmatrix does not conflict, and
// neither do the copies that fill the tile. Returns where vector 0 of a row goes; vector v goes to v ^ that.
template <int COLUMNS>
__device__ __forceinline__ int swizzle(int row) {
  constexpr int vectors = COLUMNS / kVector, mixed = vectors < 8 ? vectors : 8;
  static_assert((vectors & (vectors - 1)) == 0 && vectors >= 2);
  return static_cast<unsigned>(row) / (8 / mixed) % mixed;
}
// The element where vector `vector` of row `row` begins.
template <int COLUMNS>
__device__ __forceinline__ int vector_at(int row, int vector) {
  return row * COLUMNS + (vector ^ swizzle<COLUMNS>(row)) * kVector;
}

// x. The compiler would compute what follows from threadIdx again in every step; it cannot compute a shuffle again.
__device__ __forceinline__ int in_register(int x) { return __shfl_sync(0xffffffff, x, threadIdx.x % 32); }

// Copies of ROWS by COLUMNS elements of a matrix to a tile, a thread's part of them.
template <int ROWS, int COLUMNS>
class TileCopy {
 public:
  __device__ __forceinline__ TileCopy()
      : row_(in_register(threadIdx.x / kVectors)),
        column_(in_register(threadIdx.x % kVectors * kVector)),
        to_(in_register(vector_at<COLUMNS>(threadIdx.x / kVectors, threadIdx.x % kVectors))) {}

  // Brings the elements from (row, column) on on their way; zeros for what lies past the matrix' first `rows` rows or
  // past its columns. What is not aligned is brought by the element, at once.
  template <class T>
  __device__ __forceinline__ void operator()(T* tile, const Matrix<T>& matrix, int row, int column, int rows) const {
    if (ROWS < kRows && row_ >= ROWS) return;
    row += row_;
    column += column_;
    const T* from = matrix.data + static_cast<int64_t>(row) * matrix.columns + column;
    const int64_t stride = static_cast<int64_t>(kRows) * matrix.columns;
    if (matrix.vectors) {
#pragma unroll
      for (int m = 0; m < ROWS; m += kRows, from += stride) {
        cp_async_16(tile + to(m), from, row + m < rows && column < matrix.columns);
      }
    } else {
#pragma unroll 1
      for (int m = 0; m < ROWS; m += kRows, from += stride) {
        alignas(16) T x[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) x[e] = row + m < rows && column + e < matrix.columns ? from[e] : T(0.0f);
        *reinterpret_cast<uint4*>(tile + to(m)) = *reinterpret_cast<const uint4*>(x);
      }
    }
  }

 private:
  static constexpr int kVectors = COLUMNS / kVector;  // of a row
  static constexpr int kRows = kThreads / kVectors;   // that the CTA does at once

  __device__ __forceinline__ int to(int m) const {
    return kRows % 8 == 0 ? to_ + m * COLUMNS : vector_at<COLUMNS>(row_ + m, column_ / kVector);
  }

  int row_, column_, to_;
};

// 16x16 fragments of a tile for mma. With m the dimension that stays and k the one that is summed over, the registers
// of an A are the 8x8 blocks (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8). The B of two products, eight columns of
// the result each, has the second and the third swapped: each B lies in neighbouring registers. A tile holds k along
// its rows, or, TRANSPOSED, m.
enum class Operand { a, b };

template <Operand OPERAND, int COLUMNS, bool TRANSPOSED>
class Fragments {
 public:
  // Those from (m, k) on, multiples of 16.
  __device__ __forceinline__ Fragments(int m, int k) {
    constexpr bool swapped = TRANSPOSED != (OPERAND == Operand::b);
    const int lane = threadIdx.x % 32;
    const int row = (TRANSPOSED ? k : m) + (swapped ? lane / 16 * 8 + lane % 8 : lane % 16);
    const int vector = (TRANSPOSED ? m : k) / kVector + (swapped ? lane / 8 % 2 : lane / 16);
    at_ = in_register(vector_at<COLUMNS>(row, vector));
  }

  // The one at (m, k) from there, multiples of 16. Along a row they are no carry into the bits of the origin.
  template <class T>
  __device__ __forceinline__ void load(uint32_t (&r)[4], const T* tile, int m, int k) const {
    const T* const at = tile + (TRANSPOSED ? k : m) * COLUMNS + (at_ ^ (TRANSPOSED ? m : k));
    TRANSPOSED ? ldmatrix_x4_trans(r, at) : ldmatrix_x4(r, at);
  }

 private:
  int at_;
};

// d [16, 8] and e [16, 8] += a * each half of b.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], float (&e)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma_m16n8k16<T>(d, a, {b[0], b[1]});
  mma_m16n8k16<T>(e, a, {b[2], b[3]});
}

// Into how many parts to cut a sum, at most `most`, so that `ctas` times as many CTAs fill the 132 SMs of an H100: one
// CTA an SM, which makes the fewest parts, or two where that left a third of the SMs idle. Other GPUs run the same grid
// and get the same bits.
inline int splits_for(int64_t ctas, int64_t most) {
  constexpr int sms = 132;
  int64_t splits = sms / ctas;
  if (splits * ctas < sms * 2 / 3) splits = 2 * sms / ctas;
  splits = splits < most ? splits : most;
  return static_cast<int>(splits > 1 ? splits : 1);
}

// Hands out the caller's workspace piece by piece. Over a null pointer it counts what is needed.
class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
    return piece;
  }
  size_t bytes() const { return bytes_; }

 private:
  uintptr_t begin_;
  size_t bytes_ = 0;
};

// out[i][j] = scale * (partials[0][i][j] + partials[1][i][j] + ...), in this order.
struct Sum {
  const float* partials;  // [splits, rows, columns rounded up to a multiple of 8]
  void* out;              // [rows, columns] of dtype
  DType dtype;
  int rows, columns, splits;
  float scale;
};
cudaError_t add_partials(const Sum* sums, int count, cudaStream_t stream);  // one or two of them in one launch

// to = from [rows, columns] of T or float32, rounded to T, its rows filled up with zeros to a multiple of 8.
template <class T>
cudaError_t pack(const void* from, DType dtype, int rows, int columns, T* to, cudaStream_t stream);

// The pass of lora_down and of lora_up_grad's u: out [M, R] = (x * keep) [M, C] times A^T, A [R, C], or B [C, R] if
// `transposed`. In lora_linear_down.cu.
struct DownPass {
  const void* x;
  const void* adapter;
  DType adapter_dtype;
  bool transposed;
  void* out;
  Dropout dropout;
  DType dtype;
  int M, C, R;
};
cudaError_t down_pass(const DownPass& p, Workspace workspace, cudaStream_t stream);
size_t down_pass_workspace_bytes(int M, int C, int R);

inline bool is_valid(DType dtype, DType adapter_dtype, int M, int C, int R, const void* workspace) {
  return dtype != DType::fp32 && (adapter_dtype == dtype || adapter_dtype == DType::fp32) && M >= 0 && C >= 0 &&
         R >= 0 && is_aligned(workspace, 16);
}

}  // namespace fastpeft::lora
