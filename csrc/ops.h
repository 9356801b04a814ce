// Every operation of the native module: pointers, sizes and a stream, nothing of torch.
//
// The caller (fastpeft/ops) has checked what a pointer cannot carry: dtype, shape, device, contiguity. It has also made
// the tensors' device the current one. A launcher only enqueues work on `stream` and returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace fastpeft {

enum class DType { bf16, fp16, fp32 };

// An NF4 weight as bitsandbytes stores it, read in place. Two 4-bit codes a byte, row-major over the flattened tensor,
// the even element in the high nibble. Blocks of `blocksize` elements of the flattened tensor share one absmax, so a
// block may cross a row. The absmax is either float32 or itself quantized ("nested"):
//   absmax[i] = absmax_code[absmax_u8[i]] * absmax2[i / 256] + *absmax_offset
struct Nf4Storage {
  const uint8_t* packed;       // [ceil(numel / 2)]
  const float* absmax;         // [blocks], null when nested
  const uint8_t* absmax_u8;    // [blocks], null unless nested, and so are the next three
  const float* absmax_code;    // [256]
  const float* absmax2;        // [ceil(blocks / 256)]
  const float* absmax_offset;  // one float
  int blocksize;               // a power of two, 32 to 4096
};

// out[i] = nf4_code[nibble i] * absmax[i / blocksize], in float32, rounded once to out_dtype.
struct Nf4DequantizeParams {
  Nf4Storage weight;
  void* out;  // [numel] of out_dtype
  DType out_dtype;
  int64_t numel;
};
cudaError_t nf4_dequantize(const Nf4DequantizeParams& p, cudaStream_t stream);

// absmax[b] = largest magnitude of block b; nibble i = index of the value of nf4_code nearest to weight[i] / absmax, in
// the arithmetic of bitsandbytes on a CPU (fastpeft/reference/nf4.py). The last nibble of an odd numel holds the code
// of zero.
struct Nf4QuantizeParams {
  const void* weight;  // [numel] of weight_dtype
  DType weight_dtype;
  uint8_t* packed;  // [ceil(numel / 2)]
  float* absmax;    // [ceil(numel / blocksize)]
  int64_t numel;
  int blocksize;  // as above
};
cudaError_t nf4_quantize(const Nf4QuantizeParams& p, cudaStream_t stream);

// Double quantization, the "nested" absmax above:
//   absmax2[g] = largest magnitude of absmax - *offset in group g of 256
//   absmax_u8[i] = index of the value of absmax_code nearest to (absmax[i] - *offset) / absmax2[i / 256]
struct Nf4QuantizeAbsmaxParams {
  const float* absmax;       // [blocks]
  const float* offset;       // one float, the mean of absmax
  const float* absmax_code;  // [256], ascending
  uint8_t* absmax_u8;        // [blocks]
  float* absmax2;            // [ceil(blocks / 256)]
  int64_t blocks;
};
cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmaxParams& p, cudaStream_t stream);

// out[n, k] = gain[n] * (W[n, k] + scaling * sum_r B[n, r] * A[r, k]) with W the dequantized weight, all in float32 and
// rounded once to dtype.
struct Nf4MergeParams {
  Nf4Storage weight;
  const void* lora_a;           // A [R, K] of dtype
  const void* lora_b;           // B [N, R] of dtype
  float scaling;                // multiplied by
  const float* scaling_tensor;  // one float, or null for 1
  const float* gain;            // [N], or null for 1
  void* out;                    // [N, K] of dtype
  DType dtype;                  // bf16 or fp16
  int N, K, R;                  // R may be 0
};
cudaError_t nf4_merge(const Nf4MergeParams& p, cudaStream_t stream);

// y[m, n] = gain[n] * (sum_k x[m, k] * W[n, k] + scale * sum_r xa[m, r] * B[n, r]) + bias[n], xa = x A^T,
// scale = scaling * *scaling_tensor.
struct LoraLinearDecodeParams {
  const void* x;                // [M, K] of dtype
  const void* weight;           // W [N, K] of dtype, or null for nf4
  Nf4Storage nf4;               // all zeros where weight is given
  const void* lora_a;           // A [R, K] of adapter_dtype
  const void* lora_b;           // B [N, R] of adapter_dtype
  DType adapter_dtype;          // dtype, or fp32, then rounded to dtype
  float scaling;                // multiplied by
  const float* scaling_tensor;  // one float, or null for 1
  const float* gain;            // [N], or null for 1
  const void* bias;             // [N] of dtype, or null for 0
  void* y;                      // [M, N] of dtype
  void* workspace;
  DType dtype;
  int M, N, K, R;
};
cudaError_t lora_linear_decode(const LoraLinearDecodeParams& p, cudaStream_t stream);
// For the current device, whatever the weight and the dtypes.
cudaError_t lora_linear_decode_workspace_bytes(int M, int N, int K, int R, size_t* bytes);

// The low-rank products of lora_linear's training, each one pass over x [M, K] or dy [M, N]. Rank R >= 1. dtype is bf16
// or fp16, that of x, dy, xa, u and y; adapters (and their gradients) have adapter_dtype, which is dtype or fp32: a
// float32 master copy, rounded to dtype when it is read. Sums are float32 in an order that depends on the sizes alone.
// keep(m, k) is 1 or 0: the mask of fastpeft/reference/dropout.py from *seed, one int64 on the device; seed null or
// dropout_p 0 keeps all. Nothing divides by 1 - dropout_p: that is the caller's part of `scale`.
// A workspace has <op>_workspace_bytes(...) bytes, 16-byte aligned, and no meaning after the call; null if that is 0.

// xa[m, r] = sum_k keep(m, k) * x[m, k] * A[r, k]
struct LoraDownParams {
  const void* x;       // [M, K]
  const void* lora_a;  // A [R, K] of adapter_dtype
  DType adapter_dtype;
  void* xa;  // [M, R]
  const int64_t* seed;
  double dropout_p;
  DType dtype;
  int M, K, R;
  void* workspace;
};
cudaError_t lora_down(const LoraDownParams& p, cudaStream_t stream);
size_t lora_down_workspace_bytes(int M, int K, int R);

// u[m, r] = sum_n dy[m, n] * B[n, r]
// d_b[n, r] = scale * sum_m dy[m, n] * xa[m, r]
struct LoraUpGradParams {
  const void* dy;      // [M, N]
  const void* lora_b;  // B [N, R] of adapter_dtype, read if u is wanted
  DType adapter_dtype;
  const void* xa;  // [M, R], read if d_b is wanted
  void* u;         // [M, R], or null: not wanted
  void* d_b;       // [N, R] of adapter_dtype, or null: not wanted
  float scale;
  DType dtype;
  int M, N, R;
  void* workspace;
};
cudaError_t lora_up_grad(const LoraUpGradParams& p, cudaStream_t stream);
size_t lora_up_grad_workspace_bytes(int M, int N, int R);

// d_a[r, k] = scale * sum_m u[m, r] * keep(m, k) * x[m, k]
struct LoraDownGradParams {
  const void* x;  // [M, K]
  const void* u;  // [M, R]
  void* d_a;      // [R, K] of adapter_dtype
  DType adapter_dtype;
  float scale;
  const int64_t* seed;
  double dropout_p;
  DType dtype;
  int M, K, R;
  void* workspace;
};
cudaError_t lora_down_grad(const LoraDownGradParams& p, cudaStream_t stream);
size_t lora_down_grad_workspace_bytes(int M, int K, int R);

// y[m, n] += scale * keep(m, n) * sum_r xa[m, r] * B[n, r], in float32, rounded once.
// DoRA's, with a gain: out[m, n] = gain[n] * y[m, n] + bias[n] too, of the sum in float32. Where out is y, it alone is
// kept. Without dropout, not transposed; R may be 0.
struct LoraAddParams {
  void* y;             // [M, N]
  const void* xa;      // [M, R]
  const void* lora_b;  // B [N, R] of adapter_dtype
  DType adapter_dtype;
  bool transposed;  // lora_b is [R, N]: dx += scale * keep * u A
  float scale;
  const int64_t* seed;
  double dropout_p;
  const float* gain;  // [N], or null, and so are the next two
  const void* bias;   // [N] of dtype, or null for 0
  void* out;          // [M, N]
  DType dtype;
  int M, N, R;
};
cudaError_t lora_add(const LoraAddParams& p, cudaStream_t stream);

// norm[n] = sqrt(sum_k (W[n, k] + scale * sum_r B[n, r] * A[r, k])^2), scale = scaling * *scaling_tensor, all in
// float32: NF4 weights are float32 products of value and absmax, and so is the arithmetic of float32 adapters.
struct DoraNormParams {
  const void* weight;           // W [N, K] of dtype, or null for nf4
  Nf4Storage nf4;               // all zeros where weight is given
  const void* lora_a;           // A [R, K] of adapter_dtype
  const void* lora_b;           // B [N, R] of adapter_dtype
  DType adapter_dtype;          // dtype or fp32
  float scaling;                // multiplied by
  const float* scaling_tensor;  // one float, or null for 1
  float* norm;                  // [N]
  void* workspace;              // dora_norm_workspace_bytes, aligned to 16
  DType dtype;                  // bf16 or fp16
  int N, K, R;                  // R may be 0
};
cudaError_t dora_norm(const DoraNormParams& p, cudaStream_t stream);
size_t dora_norm_workspace_bytes(int N, int K, int R);  // whatever the dtypes are

// What dora_linear's training does besides: passes over [M, N]. dtype is bf16 or fp16; keep as above.

// out[m, n] = keep(m, n) * gain[n] * x[m, n] + offset[m, n], in float32, rounded once. out may be x or offset.
struct DoraLinearAddParams {
  const void* x;       // [M, N]
  const float* gain;   // [N], or null for 1
  const void* offset;  // [M, N], or null for 0
  void* out;           // [M, N]
  const int64_t* seed;
  double dropout_p;
  DType dtype;
  int M, N;
};
cudaError_t dora_linear_add(const DoraLinearAddParams& p, cudaStream_t stream);

// d_gain[n] = sum_m dy[m, n] * z[m, n], in float32, in an order that depends on the sizes alone.
struct DoraLinearGainGradParams {
  const void* dy;  // [M, N]
  const void* z;   // [M, N]
  float* d_gain;   // [N]
  DType dtype;
  int M, N;
  void* workspace;  // dora_linear_gain_grad_workspace_bytes, aligned to 16
};
cudaError_t dora_linear_gain_grad(const DoraLinearGainGradParams& p, cudaStream_t stream);
size_t dora_linear_gain_grad_workspace_bytes(int M, int N);

}  // namespace fastpeft
