// Atomic operations on shared and global memory.
#pragma once

#include <type_traits>

#include "language.h"

namespace emulation {

// While one exists, no other thread runs; its construction tells the checkers of the access.
struct AtomicAccess {
  AtomicAccess(void* address, size_t bytes, Site site);
  ~AtomicAccess();
};

template <class T, class Next>
T read_modify_write(T* address, Next next, Site site) {
  const AtomicAccess access(address, sizeof(T), site);
  const T old = *address;
  *address = next(old);
  return old;
}

}  // namespace emulation

#define EMULATION_ATOMIC(name, expression)                                                                     \
  template <class T>                                                                                           \
  T name(T* address, std::type_identity_t<T> value, emulation::Site site = emulation::Site::current()) {       \
    return emulation::read_modify_write(address, [value](T old) { return static_cast<T>(expression); }, site); \
  }
EMULATION_ATOMIC(atomicAdd, old + value)
EMULATION_ATOMIC(atomicSub, old - value)
EMULATION_ATOMIC(atomicExch, (static_cast<void>(old), value))
EMULATION_ATOMIC(atomicMin, value < old ? value : old)
EMULATION_ATOMIC(atomicMax, value > old ? value : old)
EMULATION_ATOMIC(atomicAnd, old& value)
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicXor, old ^ value)
EMULATION_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATION_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATION_ATOMIC

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            emulation::Site site = emulation::Site::current()) {
  return emulation::read_modify_write(address, [=](T old) { return old == compare ? value : old; }, site);
}
