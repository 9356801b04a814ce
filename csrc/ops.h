// Every operation of the native module: pointers, sizes and a stream, nothing of torch.
//
// The caller (fastpeft/ops) has checked what a pointer cannot carry: dtype, shape, device, contiguity. It has also made
// the tensors' device the current one. A launcher only enqueues work on `stream` and returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

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
  int blocksize;               // a power of two, at least 32
};

// out[i] = nf4_code[nibble i] * absmax[i / blocksize], in float32, rounded once to out_dtype.
struct Nf4DequantizeParams {
  Nf4Storage weight;
  void* out;  // [numel] of out_dtype
  DType out_dtype;
  int64_t numel;
};
cudaError_t nf4_dequantize(const Nf4DequantizeParams& p, cudaStream_t stream);

}  // namespace fastpeft
