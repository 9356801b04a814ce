// How lora_linear_decode divides its matrices among CTAs, and the two kernels that share this division.
#pragma once

#include "common.cuh"

namespace fastpeft::decode {

constexpr int kMaxTokens = 64;
constexpr int kTokens = 8;  // of a token tile, the 8 columns of an mma
constexpr int kSlice = 64;  // elements of K that a warp multiplies at a time
constexpr int kWarps = 8;   // of a CTA of the first kernel

// How the weight is stored, see lora_linear_decode_rows.cuh.
enum class Kind { nf4_rows, nf4_words, dense };

// A matrix [rows, K] in units: a row group, which is what a CTA holds, by a slice of K; counted along K first. Each CTA
// has a range of units, all as long or one shorter. What of it lies in one row group is a segment; its sum is a
// partial, in the slot that tells the how-manieth CTA of this row group it is.
struct Split {
  int rows, group_rows, groups;
  int slices;  // of a row
  int ctas;
  int units_of_cta, longer_ctas;  // the first longer_ctas have one more
  int slots;                      // of a row group at most

  __device__ int begin(int cta) const { return cta * units_of_cta + min(cta, longer_ctas); }
  __device__ int cta_of(int unit) const {
    const int in_longer = longer_ctas * (units_of_cta + 1);
    return unit < in_longer ? unit / (units_of_cta + 1) : longer_ctas + (unit - in_longer) / units_of_cta;
  }
  // Of the eight tokens of a tile for one row, in the partials [slot][tile][row, padded to whole groups][token].
  __host__ __device__ int64_t partial(int slot, int tiles, int tile, int row) const {
    return ((static_cast<int64_t>(slot) * tiles + tile) * groups * group_rows + row) * kTokens;
  }
};

struct Plan {
  Kind kind;
  int tiles;              // of eight tokens: 1, 2, 4 or 8
  Split weight, adapter;  // the adapter's is all zeros where R is
  float *weight_partials, *adapter_partials;
};

// The partials of weight and adapter (lora_linear_decode_multiply.cu), and how many of its CTAs fit on an SM.
cudaError_t multiply(const LoraLinearDecodeParams& p, const Plan& plan, cudaStream_t stream);
int ctas_of_sm(int tiles, int smem_bytes);
// y from them (lora_linear_decode_finish.cu). `early`: its launch may overlap the end of the first kernel.
cudaError_t finish(const LoraLinearDecodeParams& p, const Plan& plan, bool early, cudaStream_t stream);

}  // namespace fastpeft::decode
