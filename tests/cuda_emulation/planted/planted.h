// Kernels with a planted bug, and the same kernels without it: <true> and <false>. A line that the message must name is
// marked "named" (test_planted.py reads the marks).
#pragma once

#include <map>
#include <string>

#include "common.cuh"
#include "ptx.cuh"

namespace planted {

using fastpeft::cp_async_16;
using fastpeft::cp_async_commit;
using fastpeft::cp_async_wait;
using fastpeft::wait_for_dependency;

constexpr int kThreads = 128;

struct Launch {
  unsigned blocks = 1;
  unsigned threads = kThreads;
  size_t smem_bytes = 0;
  bool twice = false;  // the second may begin early
};

using Kernel = void (*)(const float* in, float* out, unsigned n);
struct Pair {
  Kernel healthy, buggy;
  Launch launch = {};
  Launch buggy_launch = launch;
};

// in and out have n = 128 floats. out may be accumulated into.
using Table = std::map<std::string, Pair>;
extern const Table kSynchronization, kMemory, kCopies, kGrids;

}  // namespace planted

#define PLANTED(name) planted::name##_kernel<false>, planted::name##_kernel<true>
