// Device functions on numbers that g++ lacks. Those of <cmath> (fmaf, expf, ...) are there already.
//
// __expf and the other fast ones are exact here and approximate on a GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "language.h"

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }

inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}

// Byte i of the result is byte (selector nibble i) of the eight in y:x; bit 3 of the nibble asks for copies of its
// sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// The 64 bits high:low shifted, the upper (lower) half kept; the shift is taken modulo 32, by the c ones clamped to 32.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}

// Rounded to nearest even. The module is compiled without contraction, so no product melts into a sum.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float __saturatef(float a) { return a >= 0.0f ? std::min(a, 1.0f) : 0.0f; }  // NaN becomes 0
// glibc has functions of these names, hence macros.
#define __expf(x) std::exp(static_cast<float>(x))
#define __exp10f(x) std::pow(10.0f, static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __powf(x, y) std::pow(static_cast<float>(x), static_cast<float>(y))

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

namespace emulation {
// Out of range saturates and NaN is 0, where C++ leaves it undefined. The argument is whole already.
template <class T>
T saturated(float whole) {
  constexpr auto lowest = static_cast<double>(std::numeric_limits<T>::min());
  constexpr auto highest = static_cast<double>(std::numeric_limits<T>::max());
  return std::isnan(whole) ? T(0) : static_cast<T>(std::clamp(static_cast<double>(whole), lowest, highest));
}
}  // namespace emulation
inline int __float2int_rn(float x) { return emulation::saturated<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emulation::saturated<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return emulation::saturated<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emulation::saturated<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return emulation::saturated<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return emulation::saturated<unsigned>(std::trunc(x)); }

// CUDA's global min and max: mixed types are converted as by the operators; of a number and a NaN the number is taken,
// and -0 is less than 0. (glibc's fmin makes a NaN of a signalling one.)
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr auto min(A first, B second) {
  using T = std::common_type_t<A, B>;
  const T a = static_cast<T>(first), b = static_cast<T>(second);
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return std::signbit(a) ? a : b;
    return b < a ? b : a;
  } else {
    return b < a ? b : a;
  }
}
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr auto max(A first, B second) {
  using T = std::common_type_t<A, B>;
  const T a = static_cast<T>(first), b = static_cast<T>(second);
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return b;
    if (a == b) return std::signbit(a) ? b : a;
    return b > a ? b : a;
  } else {
    return b > a ? b : a;
  }
}

long long clock64();  // counts switches between threads: moves, measures nothing
[[noreturn]] void __trap();
void __nanosleep(unsigned nanoseconds);
