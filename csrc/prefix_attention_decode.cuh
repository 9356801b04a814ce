// How prefix_attention_decode cuts its work, for the two kernels that share it.
#pragma once

#include "common.cuh"

namespace fastpeft::prefix_attention {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// The prefix, or the sequences' own keys. A CTA has a tile of the rows that meet the same keys, and a split of them.
struct Part {
  int tile_rows;            // 16 or 64
  int row_tiles, row_sets;  // the rows are one set for the prefix, and one for each sequence of own keys
  int chunk, splits;        // keys of a split

  __host__ __device__ int ctas_of_split(int Hkv) const { return row_tiles * row_sets * Hkv; }
  __host__ __device__ int ctas(int Hkv) const { return ctas_of_split(Hkv) * splits; }
};

// The rows of a key head are the queries that meet it: [B][H / Hkv][L].
struct Plan {
  Part prefix, own;
  int rows;
  float* out;  // [splits of the prefix, then of own keys][Hkv][rows][D], divided by the sum of the weights
  float* lse;  // [splits][Hkv][rows], log2 of that sum; -inf where a row sees no key of the split, and has no out

  __host__ __device__ int splits() const { return prefix.splits + own.splits; }
};

// out and lse from the parts (prefix_attention_decode_finish.cu). `early`: its launch may overlap the end of the first.
cudaError_t finish(const PrefixAttentionDecodeParams& p, const Plan& plan, bool early, cudaStream_t stream);

}  // namespace fastpeft::prefix_attention
