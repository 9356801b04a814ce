// Barriers of a block.
#pragma once

#include "language.h"

namespace emulation {

struct Votes {  // what the threads brought to the barrier
  int count, all, any;
};
Votes barrier(bool predicate, Site site);

}  // namespace emulation

inline void __syncthreads(emulation::Site site = emulation::Site::current()) { emulation::barrier(false, site); }
inline int __syncthreads_count(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::barrier(predicate != 0, site).count;
}
inline int __syncthreads_and(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::barrier(predicate != 0, site).all;
}
inline int __syncthreads_or(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::barrier(predicate != 0, site).any;
}
