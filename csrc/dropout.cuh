// The dropout mask in device code: a hash of (seed, row, column), bit for bit that of fastpeft/reference/dropout.py, so
// that no mask is stored. The header there says what is hashed.
//
// The first step of mixing row ^ column, h ^ h >> 16, is linear over xor, so it is done to the row and to the column
// before they meet. An element costs
//   xor, multiply, shift, xor, multiply, compare
// four instructions of the integer pipe (16 lanes a clock and scheduler) and two of the multiply pipe, and one more of
// that to apply the answer; rows and columns add about one.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.cuh"

namespace fastpeft {

class Dropout {
 public:
  // seed: one int64 on the device, or null to keep every element. p: in [0, 1).
  Dropout(const int64_t* seed, double p) : seed_(p > 0 ? seed : nullptr) {
    const double words = std::nearbyint(p * 4294967296.0);  // half to even, as Python's round
    threshold_ = static_cast<int>((words < 4294967295.0 ? static_cast<int64_t>(words) : 4294967295) - 2147483648);
  }

  __host__ __device__ bool drops() const { return seed_ != nullptr; }

  // The word of a row, past the first step. Only the low halves of seed and product count.
  __device__ __forceinline__ uint32_t row(int m) const {
    uint32_t h = folded(static_cast<uint32_t>(m) * kWeyl + static_cast<uint32_t>(__ldg(seed_))) * kMix1;
    return folded(folded((h ^ h >> 13) * kMix2));
  }
  __device__ __forceinline__ static uint32_t column(int k) { return folded(static_cast<uint32_t>(k) * kWeyl); }

  __device__ __forceinline__ bool keeps(uint32_t row, uint32_t column) const {
    uint32_t h = (row ^ column) * kMix1;
    h = (h ^ h >> 13) * kMix2;
    return static_cast<int>(h) >= threshold_;
  }

  // Two elements in a register, those that are dropped times zero, as the formula says. By a product, because the pipe
  // of the integer operations has most to do.
  template <class T>
  __device__ __forceinline__ uint32_t kept(uint32_t elements, uint32_t row_low, uint32_t column_low, uint32_t row_high,
                                           uint32_t column_high) const {
    using Pair = typename Rounded<T>::Pair;
    constexpr uint32_t one = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80, high_alone = one << 16;
    Pair pair = reinterpret_cast<const Pair&>(elements);
    if (!keeps(row_low, column_low)) pair = __hmul2(pair, reinterpret_cast<const Pair&>(high_alone));
    if (!keeps(row_high, column_high)) pair = __hmul2(pair, reinterpret_cast<const Pair&>(one));
    return reinterpret_cast<const uint32_t&>(pair);
  }

 private:
  static constexpr uint32_t kMix1 = 0x85ebca6b, kMix2 = 0xc2b2ae35, kWeyl = 0x9e3779b9;

  __device__ __forceinline__ static uint32_t folded(uint32_t h) { return h ^ h >> 16; }

  const int64_t* seed_;
  int threshold_;  // of the words, taken as signed
};

}  // namespace fastpeft
