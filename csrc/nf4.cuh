// NF4 in device code: its sixteen values, the absmax of a block, and the work split of the elementwise kernels.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace fastpeft {

// The 16 values of NF4 (QLoRA, Dettmers et al. 2023, appendix E), the float32 numbers of bitsandbytes. Not in constant
// memory, which serves one address at a time: lanes ask for different ones.
__device__ constexpr float kNf4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// kNf4Code[nibble % 16] out of a register: lane l holds entry l % 16, and a shuffle is the look-up. The source lane
// counts modulo 16, so the nibble needs no mask, and there is no address to compute; in shared memory both cost an
// instruction. All lanes of the warp have to take part.
class Nf4Table {
 public:
  __device__ __forceinline__ Nf4Table() : entry_(kNf4Code[threadIdx.x % 16]) {}
  __device__ __forceinline__ float operator[](unsigned nibble) const {
    return __shfl_sync(0xffffffff, entry_, static_cast<int>(nibble), 16);
  }

 private:
  float entry_;
};

// The elementwise kernels deal out an element array in vectors of 16 bytes and the codes that go with them. A CTA owns
// a tile of kThreads * kVectorsPerThread vectors; the vectors of one thread are kThreads apart, so that a warp touches
// 512 contiguous bytes at a time.
constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;

template <class T>
struct Tile {
  static constexpr int vector = 16 / sizeof(T);                           // elements
  static constexpr int stride = kThreads * vector;                        // elements between two vectors of one thread
  static constexpr int size = stride * kVectorsPerThread;                 // elements of a CTA
  using Packed = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;  // the codes of one vector
};

// The absmax of one quantization block: what is loaded, and what it means.
template <bool NESTED>
struct Absmax {
  float value;
  unsigned code;  // nested only

  __device__ __forceinline__ void load(const Nf4Storage& w, int64_t block) {
    value = NESTED ? __ldg(w.absmax2 + block / 256) : __ldg(w.absmax + block);
    code = NESTED ? __ldg(w.absmax_u8 + block) : 0;
  }
  // bitsandbytes decodes a nested absmax in two passes, hence two roundings: a fused multiply-add would differ from it
  // in the last bit.
  __device__ __forceinline__ float decode(const float* absmax_code, float offset) const {
    return NESTED ? __fadd_rn(__fmul_rn(absmax_code[code], value), offset) : value;
  }
};

// The largest is the smallest tile: a tile is cut into whole blocks.
inline bool is_blocksize(int blocksize) {
  return blocksize >= 32 && blocksize <= Tile<float>::size && (blocksize & (blocksize - 1)) == 0;
}

inline int log2_of(int power_of_two) {
  int exponent = 0;
  while (1 << exponent < power_of_two) ++exponent;
  return exponent;
}

}  // namespace fastpeft
