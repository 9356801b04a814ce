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

}  // namespace fastpeft
