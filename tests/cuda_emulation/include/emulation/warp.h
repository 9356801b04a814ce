// Operations of a warp: __syncwarp, shuffles, votes, reductions.
//
// Each lane waits until every lane of its mask that has not ended is in the same operation with the same mask. Values
// travel as 64 bits; the work is done in engine/warp.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "language.h"

namespace emulation {

enum class Shuffle { index, up, down, xor_ };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site);

enum class Vote { ballot, any, all, match_any, match_all };
unsigned vote(Vote kind, unsigned mask, uint64_t value, Site site);

enum class Reduction { add, min, max, and_, or_, xor_ };
int64_t reduce(Reduction kind, unsigned mask, int64_t value, Site site);

void sync_warp(unsigned mask, Site site);

template <class T>
uint64_t to_bits(const T& value) {
  static_assert(sizeof(T) <= 8);  // no more can be asked: __half2 copies itself by a function of its own
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const void*>(&value), sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Site site = emulation::Site::current()) {
  emulation::sync_warp(mask, site);
}

// NVIDIA's header overloads the shuffles for half and bfloat16 in device code only; these templates serve all types.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulation::Site site = emulation::Site::current()) {
  using namespace emulation;
  return from_bits<T>(shuffle(Shuffle::index, mask, to_bits(value), source, width, site));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulation::Site site = emulation::Site::current()) {
  using namespace emulation;
  return from_bits<T>(shuffle(Shuffle::up, mask, to_bits(value), static_cast<int>(delta), width, site));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulation::Site site = emulation::Site::current()) {
  using namespace emulation;
  return from_bits<T>(shuffle(Shuffle::down, mask, to_bits(value), static_cast<int>(delta), width, site));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulation::Site site = emulation::Site::current()) {
  using namespace emulation;
  return from_bits<T>(shuffle(Shuffle::xor_, mask, to_bits(value), lane_mask, width, site));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::vote(emulation::Vote::ballot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return static_cast<int>(emulation::vote(emulation::Vote::any, mask, predicate != 0, site));
}
inline int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return static_cast<int>(emulation::vote(emulation::Vote::all, mask, predicate != 0, site));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulation::Site site = emulation::Site::current()) {
  return emulation::vote(emulation::Vote::match_any, mask, emulation::to_bits(value), site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all_equal, emulation::Site site = emulation::Site::current()) {
  const unsigned lanes = emulation::vote(emulation::Vote::match_all, mask, emulation::to_bits(value), site);
  *all_equal = lanes != 0;
  return lanes;
}

// T is int or unsigned, as in CUDA; the bitwise ones exist for unsigned only.
#define EMULATION_REDUCE(name, kind, T)                                                      \
  inline T name(unsigned mask, T value, emulation::Site site = emulation::Site::current()) { \
    return static_cast<T>(emulation::reduce(emulation::Reduction::kind, mask, value, site)); \
  }
EMULATION_REDUCE(__reduce_add_sync, add, int)
EMULATION_REDUCE(__reduce_add_sync, add, unsigned)
EMULATION_REDUCE(__reduce_min_sync, min, int)
EMULATION_REDUCE(__reduce_min_sync, min, unsigned)
EMULATION_REDUCE(__reduce_max_sync, max, int)
EMULATION_REDUCE(__reduce_max_sync, max, unsigned)
EMULATION_REDUCE(__reduce_and_sync, and_, unsigned)
EMULATION_REDUCE(__reduce_or_sync, or_, unsigned)
EMULATION_REDUCE(__reduce_xor_sync, xor_, unsigned)
#undef EMULATION_REDUCE

// Nothing promises that lanes are together: the least that a GPU may answer.
unsigned __activemask();
