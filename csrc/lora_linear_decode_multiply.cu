// The first kernel of lora_linear_decode: what x multiplies, the weight and A, in parts of K; each sum of a CTA goes to
// the workspace. The plan is in lora_linear_decode.cu.
#include <type_traits>

#include "lora_linear_decode.cuh"
#include "lora_linear_decode_rows.cuh"
#include "ptx.cuh"

namespace fastpeft::decode {
namespace {

static_assert(kThreads == 32 * kWarps);
constexpr int kStageLines = 64;  // of x, see Shared
constexpr int kLineBytes = 128;  // of L2
constexpr int kTilesOfTwo = 2;   // up to so many token tiles, the registers of two CTAs fit on an SM

// TILES token tiles: the more of them, the more rows have to share a slice of x, and the fewer warps divide K. A stage,
// what the warps of a CTA multiply between two barriers, is always 64 slices of a token.
template <int TILES>
struct Warps {
  static constexpr int n = TILES, k = kWarps / TILES;
};

// Line b holds for each lane the pair of values that byte b stands for, and 64 elements of a token in its other half.
// So the address of a value is column | b << 8, which one PRMT puts together from the codes; a table without gaps would
// take a shift and a LOP3. The lines of x are as many as there are entries: four stages of 64.
template <int TILES>
struct Shared {
  static constexpr int kSums = Warps<TILES>::n * (Warps<TILES>::k - 1) * 2 * TILES;
  struct {
    uint32_t pair[32];
    uint4 x[8];
  } line[256];
  float4 scale[4][kThreads / 4];  // [stage][warp][row % 8, see ScaleAt]: of rows row % 8 + 8 * i
  float absmax_code[256];
  float4 sums[kSums > 0 ? kSums : 1][32];  // of the warps of k > 0: [warp, row tile, token tile][lane]
};

// Up to `depth` stages of a segment. A segment begins with a new one, so that a stage's place in it is known to the
// compiler and what is on its way can lie in registers.
struct Round {
  int row_group, slice;
  int end;   // of the segment
  int left;  // units of the range behind the segment

  __device__ __forceinline__ Round(const Split& split, int cta) {
    const int begin = split.begin(cta), units = split.begin(cta + 1) - begin;
    row_group = begin / split.slices;
    slice = begin % split.slices;
    end = min(split.slices, slice + units);
    left = units - (end - slice);
  }
  // The round after this one, which has `slices`; its end is 0 if there is none.
  __device__ __forceinline__ Round next(const Split& split, int slices) const {
    Round r = *this;
    r.slice += slices;
    if (r.slice >= r.end) {
      ++r.row_group;
      r.slice = 0;
      r.end = min(split.slices, left);
      r.left -= r.end;
    }
    return r;
  }
};

// The tokens of a stage on their way to shared memory: 16 bytes a thread, twice. Chunk c of a token lies at c, of an
// odd token at c ^ kHalf of the rows: then the eight lanes that are served at a time, two tokens by four quarters, read
// 128 different bytes.
template <class T, int TILES, class Rows>
class Tokens {
 public:
  __device__ __forceinline__ Tokens(const LoraLinearDecodeParams& p, Shared<TILES>& shared) : K_(p.K) {
    const int line = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const int token = line % (TILES * kTokens), slice = line / (TILES * kTokens);
    to_ = &shared.line[line].x[chunk ^ line % 2 * Rows::kHalf];
    from_ = static_cast<const T*>(p.x) + token * K_ + slice * kSlice + chunk * 8;
    k_ = slice * kSlice + chunk * 8;
    slice_ = token < p.M ? slice : Warps<TILES>::k;
    second_ = TILES < 8 || token + kLines < p.M;
    // What nobody copies stays zero: the tokens of the last tile that are not there.
#pragma unroll
    for (int stage = 0; stage < Rows::template depth<TILES>; ++stage) {
      if (token >= p.M) to_[stage * kStageLines * kLineVectors] = make_uint4(0, 0, 0, 0);
      if (TILES < 8 ? token >= p.M : !second_) {
        to_[(stage * kStageLines + kLines) * kLineVectors] = make_uint4(0, 0, 0, 0);
      }
    }
  }
  __device__ __forceinline__ void advance(int slices) {
    from_ += slices * kSlice;
    k_ += slices * kSlice;
  }
  // The first `slices` of the stage, which begins `slice` slices from here.
  __device__ __forceinline__ void copy(int stage, int slice, int slices) const {
    copy_line(stage * kStageLines, 0, slice, slice_ < min(slices, Warps<TILES>::k));
    if constexpr (TILES < 8) {  // the second line is of a later slice, or else of a later token
      constexpr int later = kLines / (TILES * kTokens);
      copy_line(stage * kStageLines + kLines, 0, slice + later, slice_ + later < min(slices, Warps<TILES>::k));
    } else {
      copy_line(stage * kStageLines + kLines, kLines, slice, slice_ < slices && second_);
    }
    cp_async_commit();
  }

 private:
  static constexpr int kLines = kThreads / 8;
  static constexpr int kLineVectors = sizeof(Shared<TILES>::line[0]) / sizeof(uint4);
  static_assert(2 * kLines == kStageLines);

  __device__ __forceinline__ void copy_line(int line, int token, int slice, bool wanted) const {
    if (!wanted) return;
    const bool valid = Rows::kScaled || k_ + slice * kSlice < K_;
    cp_async_16(to_ + line * kLineVectors, from_ + token * K_ + slice * kSlice, valid);
  }

  const int K_;
  uint4* to_;
  const T* from_;
  int k_, slice_;
  bool second_;
};

// A thread decodes the scale of one row for one warp of K: neighbours in K, where the absmax lie together. The four
// rows of a lane make a float4, and that of row % 8 lies at row % 8 ^ k * TILES: so the 32 scales of a warp go to
// different banks.
template <int TILES>
struct ScaleAt {
  int row, k;  // in the row group, of the warp
  float* to;   // in stage 0

  __device__ __forceinline__ explicit ScaleAt(Shared<TILES>& shared) {
    using W = Warps<TILES>;
    const int i = threadIdx.x / W::k, group = i / 4 % 8;
    k = threadIdx.x % W::k;
    row = i / 32 * 32 + i % 4 * 8 + group;
    to = reinterpret_cast<float*>(&shared.scale[0][(k * W::n + i / 32) * 8 + (group ^ k * TILES)]) + i % 4;
  }
  static __device__ __forceinline__ float4 read(const Shared<TILES>& shared, int stage) {
    const int warp = threadIdx.x / 32;
    return shared.scale[stage][warp * 8 + (Lane().group ^ warp / Warps<TILES>::n * TILES)];
  }
};

// What a warp accumulates: sum[row tile * TILES + token tile], in the registers of mma.
template <int TILES, class Rows>
struct Sums {
  static constexpr int kCount = Rows::kRowTiles * TILES;
  float sum[kCount][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[t][e] = 0.0f;
    }
  }

  // Adds the products of this warp's slice of a stage.
  template <class T>
  __device__ __forceinline__ void add(const Rows& rows, const typename Rows::Raw& raw, int stage,
                                      const Shared<TILES>& shared) {
    const Lane lane;
    const int warp_k = threadIdx.x / 32 / Warps<TILES>::n;
    uint32_t a[Rows::kRowTiles][4][4];
    rows.fragments(a, raw, shared);
    float4 scale = {};
    if constexpr (Rows::kScaled) scale = ScaleAt<TILES>::read(shared, stage);
    const float row_scale[4] = {scale.x, scale.y, scale.z, scale.w};
    const int chunk = lane.quarter * Rows::kChunk ^ lane.group % 2 * Rows::kHalf;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      if (TILES == 8 && j % 4 == 0) hold_loads();  // those of all tiles at once do not fit in registers
      const uint4* const x = shared.line[stage * kStageLines + (warp_k * TILES + j) * kTokens + lane.group].x;
      const uint4 x0 = x[chunk], x1 = x[chunk ^ Rows::kHalf];
      const uint32_t b[4][2] = {{x0.x, x0.y}, {x0.z, x0.w}, {x1.x, x1.y}, {x1.z, x1.w}};
#pragma unroll
      for (int i = 0; i < Rows::kRowTiles; ++i) {
        float (&s)[4] = sum[i * TILES + j];
        if constexpr (Rows::kScaled) {
          float product[4] = {};
#pragma unroll
          for (int step = 0; step < 4; ++step) mma_m16n8k16<T>(product, a[i][step], b[step]);
#pragma unroll
          for (int e = 0; e < 4; ++e) s[e] = __fmaf_rn(row_scale[2 * i + e / 2], product[e], s[e]);
        } else {
#pragma unroll
          for (int step = 0; step < 4; ++step) mma_m16n8k16<T>(s, a[i][step], b[step]);
        }
      }
    }
  }

  // The sums of all warps of K, which those of k = 0 write; row: the first of the warp.
  __device__ __forceinline__ void store(const Split& split, int slot, int row, float* partials, Shared<TILES>& shared) {
    using W = Warps<TILES>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= W::n) {
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        shared.sums[(warp - W::n) * kCount + t][lane] = make_float4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
      }
    }
    if constexpr (W::k > 1) __syncthreads();
    if (warp >= W::n) return;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      float (&s)[4] = sum[t];
#pragma unroll
      for (int k = 0; k < W::k - 1; ++k) {
        const float4 other = shared.sums[(warp + k * W::n) * kCount + t][lane];
        s[0] += other.x, s[1] += other.y, s[2] += other.z, s[3] += other.w;
      }
      float* const to =
          partials + split.partial(slot, TILES, t % TILES, row + t / TILES * 16 + Lane().group) + Lane().quarter * 2;
      *reinterpret_cast<float2*>(to) = make_float2(s[0], s[1]);
      *reinterpret_cast<float2*>(to + 8 * kTokens) = make_float2(s[2], s[3]);
    }
  }
};

// The partials of one CTA: of each segment of its range one.
template <class T, int TILES, class Rows>
__device__ __forceinline__ void multiply(Rows rows, const Split& split, int cta, const LoraLinearDecodeParams& p,
                                         float* partials, Shared<TILES>& shared) {
  using W = Warps<TILES>;
  constexpr int D = Rows::template depth<TILES>, kWarpRows = 16 * Rows::kRowTiles, kGroupRows = kWarpRows * W::n;
  const int warp = threadIdx.x / 32, warp_n = warp % W::n, warp_k = warp / W::n;

  Tokens<T, TILES, Rows> tokens(p, shared);
  const ScaleAt<TILES> scale_at(shared);
  typename Rows::Raw raw[D];
  typename Rows::Scale scales[D] = {};  // decoded even where there is no slice and nothing was loaded
  const auto seek = [&](const Round& r) {
    rows.seek(r.row_group * kGroupRows + warp_n * kWarpRows, r.slice + warp_k);
    if constexpr (Rows::kScaled) rows.seek_scale(r.row_group * kGroupRows + scale_at.row, r.slice + scale_at.k);
  };
  const auto fetch = [&](int stage, const Round& r) {
    const int slice = stage * W::k, slices = r.end - r.slice - slice;
    tokens.copy(stage, slice, slices);
    if (warp_k < slices) rows.load(raw[stage], slice);
    if constexpr (Rows::kScaled) {
      if (scale_at.k < slices) rows.load_scale(scales[stage], slice);
    }
  };
  const auto store_scale = [&](int stage) {
    if constexpr (Rows::kScaled) scale_at.to[stage * kThreads] = rows.decode(scales[stage], shared.absmax_code);
  };

  Round round(split, cta);
  seek(round);
  tokens.advance(round.slice);
#pragma unroll
  for (int d = 0; d < D - 1; ++d) fetch(d, round);
  rows.prepare(shared);
  if constexpr (Rows::kScaled) __syncthreads();  // a nested scale is decoded by the table
  store_scale(0);

  Sums<TILES, Rows> sums;
  sums.clear();
#pragma unroll 1
  while (round.end > 0) {
    const Round next = round.next(split, D * W::k);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      cp_async_wait<D - 2>();
      __syncthreads();
      // Into the stage that all warps have left: the last one of this round, then those of the next.
      fetch((d + D - 1) % D, d == 0 ? round : next);
      if (d == 0) {
        tokens.advance(next.slice - round.slice);
        if (next.row_group == round.row_group) {
          rows.advance(D * W::k);
        } else {
          seek(next);
        }
      }
      store_scale((d + 1) % D);
      if (round.slice + d * W::k + warp_k < round.end) sums.template add<T>(rows, raw[d], d, shared);
    }
    if (next.row_group != round.row_group) {  // the segment ends
      const int slot = cta - split.cta_of(round.row_group * split.slices);
      sums.store(split, slot, round.row_group * kGroupRows + warp_n * kWarpRows, partials, shared);
      sums.clear();
    }
    round = next;
  }
}

// The second kernel begins with B; nothing would hide its way from memory there.
__device__ __forceinline__ void prefetch_b(const LoraLinearDecodeParams& p, int cta, int ctas) {
  const auto* const lora_b = static_cast<const unsigned char*>(p.lora_b);
  const int64_t bytes = static_cast<int64_t>(p.N) * p.R * (p.adapter_dtype == DType::fp32 ? 4 : 2);
  const int stride = ctas * kThreads * kLineBytes;
  for (int64_t at = (cta * kThreads + threadIdx.x) * kLineBytes; at < bytes; at += stride) prefetch(lora_b + at);
}

template <class T, class Rows, int TILES>
__global__ void __launch_bounds__(kThreads, TILES <= kTilesOfTwo ? 2 : 1)
    lora_linear_decode_kernel(LoraLinearDecodeParams p, Plan plan, int blocksize_log2) {
  DYNAMIC_SMEM(smem);
  Shared<TILES>& shared = *reinterpret_cast<Shared<TILES>*>(smem);
  start_dependents();
  const int cta = static_cast<int>(blockIdx.x);
  const int weight_cta = cta - plan.adapter.ctas;
  if (weight_cta < 0) {
    prefetch_b(p, cta, plan.adapter.ctas);
    if (p.adapter_dtype == DType::fp32) {
      const DenseRows<T, float> a(p.lora_a, p.R, p.K);
      multiply<T, TILES>(a, plan.adapter, cta, p, plan.adapter_partials, shared);
    } else {
      const DenseRows<T, T> a(p.lora_a, p.R, p.K);
      multiply<T, TILES>(a, plan.adapter, cta, p, plan.adapter_partials, shared);
    }
  } else if constexpr (std::is_same_v<Rows, DenseRows<T, T>>) {
    const Rows weight(p.weight, p.N, p.K);
    multiply<T, TILES>(weight, plan.weight, weight_cta, p, plan.weight_partials, shared);
  } else {
    const Rows weight(p.nf4, p.N, p.K, blocksize_log2);
    multiply<T, TILES>(weight, plan.weight, weight_cta, p, plan.weight_partials, shared);
  }
}

template <class T, class Rows, int TILES>
cudaError_t launch_of(const LoraLinearDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  return launch(lora_linear_decode_kernel<T, Rows, TILES>, dim3(plan.adapter.ctas + plan.weight.ctas), dim3(kThreads),
                sizeof(Shared<TILES>), stream, p, plan, p.weight ? 0 : log2_of(p.nf4.blocksize));
}

template <class T, class Rows>
cudaError_t multiply_by(const LoraLinearDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  switch (plan.tiles) {
    case 1:
      return launch_of<T, Rows, 1>(p, plan, stream);
    case 2:
      return launch_of<T, Rows, 2>(p, plan, stream);
    case 4:
      return launch_of<T, Rows, 4>(p, plan, stream);
    default:
      return launch_of<T, Rows, 8>(p, plan, stream);
  }
}

template <class T, bool NESTED>
cudaError_t multiply_nf4(const LoraLinearDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.kind == Kind::nf4_rows) return multiply_by<T, Nf4Rows<T, NESTED>>(p, plan, stream);
  return plan.tiles == 1 ? launch_of<T, Nf4Words<T, NESTED>, 1>(p, plan, stream)
                         : launch_of<T, Nf4Words<T, NESTED>, 8>(p, plan, stream);
}

template <class T>
cudaError_t run(const LoraLinearDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.kind == Kind::dense) return multiply_by<T, DenseRows<T, T>>(p, plan, stream);
  return p.nf4.absmax ? multiply_nf4<T, false>(p, plan, stream) : multiply_nf4<T, true>(p, plan, stream);
}

}  // namespace

int ctas_of_sm(int tiles, int smem_bytes) {
  constexpr int bytes = sizeof(Shared<kTilesOfTwo>) + 1024;  // what the system keeps of each CTA's
  return tiles <= kTilesOfTwo && 2 * bytes <= smem_bytes ? 2 : 1;
}

cudaError_t multiply(const LoraLinearDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  return p.dtype == DType::bf16 ? run<__nv_bfloat16>(p, plan, stream) : run<__half>(p, plan, stream);
}

}  // namespace fastpeft::decode
