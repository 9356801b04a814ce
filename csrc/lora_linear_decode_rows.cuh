// Rows of a matrix as the 16-row operand of mma.m16n8k16, for lora_linear_decode_multiply.cu: NF4 by table look-up
// (Kind::nf4_rows), NF4 in any arrangement (nf4_words), dense.
//
// A warp takes 16 * kRowTiles rows and a slice of 64 elements of K at a time. Which element of K is which column of the
// product is free, as long as the other operand agrees: a lane takes 16 elements of the slice in two runs of eight that
// it can load as vectors, and finds the same ones of a token in two 16-byte chunks, kChunk * quarter and that ^ kHalf.
// With group = lane / 4 and quarter = lane % 4, element 2 * j and the next one of its run `half` are
//   a[.][2 * half + j / 2][2 * (j % 2)] of row `group`, and the register after it of row `group` + 8.
//
// Each class has
//   kRowTiles     tiles of 16 rows a warp takes
//   depth<TILES>  how many slices are on their way or in use
//   kScaled       whether fragments hold values before their scale, which load_scale and decode give
//   seek          goes to the rows and the slice of this warp
//   advance       goes to a later slice of the same rows
//   load          starts to load a slice, relative to that
//   prepare       is called once, by all threads, before decode and fragments
//   fragments     makes a[tile][step of 16 elements][register] of a loaded slice
// A row that is not there is a copy of the last one, an element of K that is not there is zero.
#pragma once

#include "lora_linear_decode.cuh"
#include "nf4.cuh"

namespace fastpeft::decode {

struct Lane {
  int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
};

template <class Pair>
__device__ __forceinline__ uint32_t bits_of(const Pair& pair) {
  static_assert(sizeof(Pair) == 4);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The values of a look-up are rounded to T, where the formula rounds their product with absmax. Times kTableScale,
// which the scale takes back in float32, they are all near values of T: for the codes of Gaussian weights in blocks of
// 64 the root-mean-square error of a weight is then 0.86 (bf16) and 0.50 (fp16) of that of the formula. What matters
// more, it is so for the mean error, 0.003 and 0.001 of that: a mean error of the codes would add up where all x have
// one sign. Both numbers are the result of a search over [1, 2).
template <class T>
constexpr float kTableScale = 0.0f;
template <>
constexpr float kTableScale<__nv_bfloat16> = 1.28695f;
template <>
constexpr float kTableScale<__half> = 1.3886f;

// NF4 where K % 64 == 0 and blocksize >= 64, so that a slice of a row has one absmax: its products are summed before it
// is applied. A byte of codes is looked up as a pair of T.
template <class T, bool NESTED>
class Nf4Rows {
 public:
  static constexpr int kRowTiles = 2;
  template <int TILES>
  static constexpr int depth = TILES == 1 || TILES == 4 ? 4 : 3;  // what fits in registers
  static constexpr bool kScaled = true;
  static constexpr int kChunk = 2, kHalf = 1;  // 16 neighbours: 8 bytes
  struct Raw {
    uint2 codes[4];  // of rows group + 8 * i
  };
  using Scale = Absmax<NESTED>;

  __device__ __forceinline__ Nf4Rows(const Nf4Storage& w, int rows, int K, int blocksize_log2)
      : w_(w), rows_(rows), K_(K), slices_log2_(blocksize_log2 - 6), offset_(NESTED ? __ldg(w.absmax_offset) : 0.0f) {}

  __device__ __forceinline__ void seek(int row, int slice) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = min(row + lane.group + 8 * i, rows_ - 1);
      codes_[i] = w_.packed + n * (K_ / 2) + slice * (kSlice / 2) + lane.quarter * 8;
    }
  }
  __device__ __forceinline__ void seek_scale(int row, int slice) {
    scale_ = static_cast<unsigned>(min(row, rows_ - 1)) * (K_ / kSlice) + slice;
  }
  __device__ __forceinline__ void advance(int slices) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes_[i] += slices * (kSlice / 2);
    scale_ += slices;
  }

  __device__ __forceinline__ void load(Raw& raw, int slice) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw.codes[i] = __ldcs(reinterpret_cast<const uint2*>(codes_[i] + slice * (kSlice / 2)));
    }
  }
  __device__ __forceinline__ void load_scale(Scale& scale, int slice) const {
    scale.load(w_, (scale_ + slice) >> slices_log2_);
  }

  template <class Shared>
  __device__ __forceinline__ void prepare(Shared& shared) const {
    static_assert(kThreads == 256);
    const unsigned byte = threadIdx.x;
    const uint32_t pair =
        bits_of(Rounded<T>::two(kNf4Code[byte >> 4] * kTableScale<T>, kNf4Code[byte & 15] * kTableScale<T>));
    uint4* const copies = reinterpret_cast<uint4*>(shared.line[byte].pair);
    // Lines are 256 bytes apart: each lane begins elsewhere in its own, or eight would write to the same four banks.
#pragma unroll
    for (int i = 0; i < 8; ++i) copies[(byte + i) % 8] = make_uint4(pair, pair, pair, pair);
    if constexpr (NESTED) shared.absmax_code[byte] = __ldg(w_.absmax_code + byte);
  }
  __device__ __forceinline__ float decode(const Scale& scale, const float* absmax_code) const {
    return scale.decode(absmax_code, offset_) * (1.0f / kTableScale<T>);
  }
  // One PRMT and one LDS for two weights. Lane l reads bank l only.
  template <class Shared>
  __device__ __forceinline__ void fragments(uint32_t (&a)[2][4][4], const Raw& raw, const Shared& shared) const {
    const auto* const table = reinterpret_cast<const unsigned char*>(shared.line);
    const unsigned column = threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int byte = 0; byte < 8; ++byte) {
        const unsigned codes = byte < 4 ? raw.codes[i].x : raw.codes[i].y;
        const unsigned at = __byte_perm(codes, column, 0x5504 | byte % 4 << 4);  // column | code << 8
        a[i / 2][byte / 2][i % 2 + byte % 2 * 2] = *reinterpret_cast<const uint32_t*>(table + at);
      }
    }
  }

 private:
  const Nf4Storage& w_;
  const int rows_, K_, slices_log2_;
  const float offset_;
  const uint8_t* codes_[4];
  unsigned scale_;  // number of the slice, counted over all rows
};

// What Nf4Words and DenseRows have in common: two runs of eight at 8 * quarter and 32 + 8 * quarter, one row tile.
class UnscaledRows {
 public:
  static constexpr int kRowTiles = 1;
  static constexpr bool kScaled = false;
  static constexpr int kChunk = 1, kHalf = 4;
  static constexpr int kRun = 32;  // elements from one run to the next
  struct Scale {};

  __device__ __forceinline__ UnscaledRows(int rows, int K) : rows_(rows), K_(K) {}
  __device__ __forceinline__ void seek(int row, int slice) {
    const Lane lane;
    k_ = slice * kSlice + lane.quarter * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) at_[i] = static_cast<int64_t>(min(row + lane.group + 8 * i, rows_ - 1)) * K_ + k_;
  }
  __device__ __forceinline__ void advance(int slices) {
    k_ += slices * kSlice;
#pragma unroll
    for (int i = 0; i < 2; ++i) at_[i] += slices * kSlice;
  }

 protected:
  const int rows_, K_;
  int k_;          // of the first run
  int64_t at_[2];  // of its elements in rows group and group + 8 in the matrix
};

// NF4 with any blocksize and K % 8 == 0, so that eight neighbours have one absmax, but those of a quad may not: each
// weight is dequantized, in the arithmetic of nf4_dequantize.
template <class T, bool NESTED>
class Nf4Words : public UnscaledRows {
 public:
  template <int TILES>
  static constexpr int depth = 2;
  struct Raw {
    uint32_t codes[2][2];  // [row][run]
    Absmax<NESTED> absmax[2][2];
  };

  __device__ __forceinline__ Nf4Words(const Nf4Storage& w, int rows, int K, int blocksize_log2)
      : UnscaledRows(rows, K),
        w_(w),
        blocksize_log2_(blocksize_log2),
        offset_(NESTED ? __ldg(w.absmax_offset) : 0.0f) {}

  __device__ __forceinline__ void load(Raw& raw, int slice) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const int k = slice * kSlice + run * kRun;
        const bool valid = k_ + k < K_;
        const int64_t at = valid ? at_[i] + k : 0;
        const uint32_t codes = __ldcs(reinterpret_cast<const uint32_t*>(w_.packed + at / 2));
        raw.codes[i][run] = valid ? codes : 0x77777777;  // eight zeros
        raw.absmax[i][run].load(w_, at >> blocksize_log2_);
        if (!valid) raw.absmax[i][run].value = 0.0f;
      }
    }
  }
  template <class Shared>
  __device__ __forceinline__ void prepare(Shared& shared) const {
    if constexpr (NESTED) shared.absmax_code[threadIdx.x] = __ldg(w_.absmax_code + threadIdx.x);
  }
  template <class Shared>
  __device__ __forceinline__ void fragments(uint32_t (&a)[1][4][4], const Raw& raw, const Shared& shared) const {
    const Nf4Table nf4_code;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const float absmax = raw.absmax[i][run].decode(shared.absmax_code, offset_);
        const auto value = [&](int shift) { return __fmul_rn(nf4_code[raw.codes[i][run] >> shift], absmax); };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[0][run * 2 + j / 2][i + j % 2 * 2] = bits_of(Rounded<T>::two(value(8 * j + 4), value(8 * j)));
        }
      }
    }
  }

 private:
  const Nf4Storage& w_;
  const int blocksize_log2_;
  const float offset_;
};

// Elements of E, which is T, or float and then rounded; K % 8 == 0 and rows aligned to 16 bytes.
template <class T, class E>
class DenseRows : public UnscaledRows {
 public:
  template <int TILES>
  static constexpr int depth = sizeof(E) == 2 || TILES >= 4 ? 4 : 2;  // what fits in registers
  static constexpr int kVectors = 8 * sizeof(E) / 16;                 // of a run
  struct Raw {
    uint4 vectors[2][2][kVectors];  // [row][run]
  };

  __device__ __forceinline__ DenseRows(const void* matrix, int rows, int K)
      : UnscaledRows(rows, K), matrix_(static_cast<const E*>(matrix)) {}

  __device__ __forceinline__ void load(Raw& raw, int slice) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const int k = slice * kSlice + run * kRun;
        const auto* const from = reinterpret_cast<const uint4*>(matrix_ + at_[i] + k);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          raw.vectors[i][run][v] = k_ + k < K_ ? __ldcs(from + v) : make_uint4(0, 0, 0, 0);
        }
      }
    }
  }
  template <class Shared>
  __device__ __forceinline__ void prepare(Shared&) const {}
  template <class Shared>
  __device__ __forceinline__ void fragments(uint32_t (&a)[1][4][4], const Raw& raw, const Shared&) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const uint4 x = rounded(raw.vectors[i][run]);
        a[0][run * 2][i] = x.x;
        a[0][run * 2][i + 2] = x.y;
        a[0][run * 2 + 1][i] = x.z;
        a[0][run * 2 + 1][i + 2] = x.w;
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t two(unsigned a, unsigned b) {
    return bits_of(Rounded<T>::two(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint4 rounded(const uint4 (&v)[kVectors]) {
    if constexpr (kVectors == 1) {
      return v[0];
    } else {
      return make_uint4(two(v[0].x, v[0].y), two(v[0].z, v[0].w), two(v[1].x, v[1].y), two(v[1].z, v[1].w));
    }
  }

  const E* const matrix_;
};

}  // namespace fastpeft::decode
