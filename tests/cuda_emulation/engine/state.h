// What the engine knows: settings, counters, the launch and the block that run, their threads.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/emulation/language.h"
#include "fiber.h"

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { forward, reverse, random };

struct Config {
  Order order = Order::forward;  // of the lanes in a warp, the warps in a block, the blocks in a grid
  uint64_t seed = 1;             // of the random order
  bool eager_copies = false;     // cp.async copies at once instead of at its wait
  int sms = 4;                   // what a launcher that divides work among the SMs is told there are
};

inline constexpr size_t kDefaultMaxSmem = 48 << 10;  // of a kernel that did not ask for more
inline constexpr size_t kMaxSmem =
    99 << 10;  // the least of the targets: 8.6, 8.9 and 12.0 (8.0 has 163, 9.0 has 227 kB)
// Basic blocks that a thread may execute between two barriers or collectives. Then it spins: no honest loop at the
// sizes of tests is this long, and a whole block of spinning threads is found within seconds.
inline constexpr uint64_t kMaxSteps = 1 << 20;

struct Counters {
  uint64_t launches, blocks, threads, switches, barriers, collectives, mma, ldmatrix;
  uint64_t ldmatrix_conflicts;  // 16-byte rows that waited for another row of their 8x8 matrix in the same banks
  uint64_t undefined_shuffles;  // lanes that read a lane which took no part
};

struct Launched {
  uint64_t times;
  uint64_t dynamic_smem_bytes;  // the most
};

struct AsyncCopy {
  void* dst;
  const void* src;
  int bytes, src_bytes;
  Site site;
};

// An operation of a warp, as one lane entered it. `run` does the work of all lanes; lanes[i] is the `arguments` of lane
// i, null if it takes no part.
struct Collective {
  const char* name;
  unsigned mask;
  void* arguments;
  void (*run)(void* const* lanes, unsigned mask);
};

enum class Status : uint8_t { ready, at_barrier, in_collective, ended };

struct Thread {
  Fiber fiber;
  Status status = Status::ended;
  int index = 0, warp = 0, lane = 0;
  uint3 id{};  // threadIdx
  Site site;   // where it waits
  Collective collective{};
  std::vector<AsyncCopy> copies;    // under way, oldest first
  std::vector<size_t> copy_groups;  // their groups: how many copies had been started at each commit
  uint64_t steps = 0;               // basic blocks since it last waited
};

struct Barrier {
  int waiting = 0;
  int count = 0, all = 1, any = 0;  // of the predicates that came so far
  Site site;
};

struct MemoryRange {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* address) const { return address >= begin && address < begin + bytes; }
};

struct State {
  Config config;
  Counters counters{};
  std::map<const void*, Launched> launched;         // by kernel
  std::map<const void*, std::string> kernel_names;  // told by Python, for messages
  std::map<const void*, size_t> max_smem;           // by kernel, where it asked for more

  const void* kernel = nullptr;
  void (*thread_body)(const void*) = nullptr;
  const void* arguments = nullptr;
  bool begins_early = false;  // the launch may begin before the one before it has ended
  uint64_t random = 1;
  MemoryRange static_smem;  // every __shared__ variable of the module; empty under ASan
  MemoryRange dynamic_smem;

  std::vector<Thread> threads;  // those of the block come first, the others keep their stacks
  int block_threads = 0, live = 0;
  unsigned live_lanes[32] = {};  // by warp
  Barrier barrier;
  Thread* current = nullptr;     // null while the scheduler or the host runs
  int uninterruptible = 0;       // depth of engine code and atomics that the current thread is in
  int64_t whole_time_slice = 0;  // basic blocks that the current thread may execute before others get their turn
  int64_t time_slice = 0;        // what is left of it
  bool preempted = false;
  std::string error;  // of the thread that failed
};
inline State state;

// The launch ends with an error that names the site, the kernel, the block and the thread. From a thread of the grid it
// leaves its stack for good: nothing is unwound, nothing in kernels needs to be.
[[noreturn]] void fail(const std::string& site, const std::string& message);
[[noreturn]] void fail(const Site& site, const std::string& message);
std::string text(const Site& site);      // file:line
std::string text(const Thread& thread);  // thread (x,y,z)
std::string text_of_block();
std::string text_of_kernel();

uint64_t random_number();

// Shared memory (shared_memory.cpp)
inline bool static_smem_is_in_segment = true;  // not under ASan, which guards ordinary static variables only
void find_static_smem();
bool is_shared(const void* address);  // true as well where that cannot be known
void poison_shared_memory();

// What a race checker or ASan adds. One is linked into the module of its mode.
struct Access {
  bool reads, writes;
  bool atomic = false;     // or volatile, which the memory model of CUDA takes for a relaxed atomic
  bool under_way = false;  // the write of a cp.async that begins; its end is a plain write
};
inline constexpr Access kRead{true, false}, kWrite{false, true};
inline constexpr Access kAtomicUpdate{.reads = true, .writes = true, .atomic = true};
inline constexpr Access kCopyBegins{.reads = false, .writes = true, .under_way = true};
struct Checker {
  virtual ~Checker() = default;
  virtual void launch_starts() {}
  virtual void block_starts() {}
  virtual void barrier_passed() {}
  virtual void warp_synchronized(int /*warp*/, unsigned /*lanes*/) {}
  virtual void fenced(Thread&) {}
  virtual void waited_for_dependency(Thread&) {}
  virtual void accessed(Thread&, const void* /*address*/, size_t /*bytes*/, Access, const Site&) = 0;  // by the engine
  virtual void block_ends() {}
};
inline Checker* checker = nullptr;

inline void announce(Thread& thread, const void* address, size_t bytes, Access access, const Site& site) {
  if (checker) checker->accessed(thread, address, bytes, access, site);
}

struct Uninterrupted {
  Uninterrupted() { ++state.uninterruptible; }
  ~Uninterrupted() { --state.uninterruptible; }
};

// Scheduler (scheduler.cpp)
void run_block();
void wait(Thread& thread, Status why, const Site& site);  // until somebody makes it ready
void give_way(Thread& thread);                            // lets others run
void permute(std::vector<uint32_t>& order, size_t n);     // 0..n-1 in the configured order
// After a thread's end: may what others wait for happen without it?
void barrier_without(Thread& ended);      // barrier.cpp
void collectives_without(Thread& ended);  // warp.cpp

void collective(const Collective& call, const Site& site);  // warp.cpp

}  // namespace emulation
