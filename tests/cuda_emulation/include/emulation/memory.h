// Memory: dynamic shared memory, asynchronous copies, fences, loads and stores with cache hints.
#pragma once

#include <type_traits>

#include "language.h"

namespace emulation {

unsigned char* dynamic_smem();  // [the launch's dynamic shared memory], aligned to 1024 bytes

// cp.async. The copy is made as late as the program allows, at the wait; until then the destination holds poison. With
// Config::eager_copies it is made at once, as a fast memory would. Bytes past src_bytes become zero.
void cp_async(void* dst, const void* src, int bytes, int src_bytes, Site site = Site::current());
void cp_async_commit();
void cp_async_wait(int groups_left);  // returns when at most this many of the thread's latest groups are under way

void fence();

}  // namespace emulation

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { emulation::fence(); }

// A hint changes no value.
#define EMULATION_LOAD(name)        \
  template <class T>                \
  inline T name(const T* address) { \
    return *address;                \
  }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldca)
EMULATION_LOAD(__ldcg)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldcv)
EMULATION_LOAD(__ldlu)
#undef EMULATION_LOAD

#define EMULATION_STORE(name)                                   \
  template <class T>                                            \
  inline void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                           \
  }
EMULATION_STORE(__stcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stwb)
EMULATION_STORE(__stwt)
#undef EMULATION_STORE
