// The race checker. Kernels are compiled with -fsanitize=thread for the calls that it puts before each load and store,
// but linked without its runtime: the calls land here, and what orders accesses is known from CUDA, not from a CPU.
//
// An error, in whatever order the threads ran: two accesses to a byte, not both reads and not both atomic, that nothing
// orders; a read of shared memory that the block has not written. Accesses are ordered by
//   __syncthreads, in a block; __syncwarp, for the lanes that take part (shuffles and votes order nothing);
//   an atomic (or volatile) access that sees what another one wrote after a __threadfence, between blocks too: "the
//   last block reduces";
//   the end of a launch, unless the next one may begin early: then its wait for the dependency.
#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>

#include "places.h"
#include "state.h"

namespace emulation {
namespace {

using Place = uint32_t;  // where an access stands: its pc, relative to the module, or kIsSite + the number of a Site
constexpr Place kIsSite = 1u << 31;

struct Event {  // an access, as a byte of memory remembers it; 20 bytes, since there are three for each byte
  uint32_t block;
  uint32_t epoch;  // barriers that the block had passed
  uint32_t clock;  // __syncwarps that the thread had taken part in
  Place place;
  int16_t thread = -1;  // -1: there was none
  bool atomic;
  bool under_way;  // a cp.async that has not arrived
};

struct Cell {
  uint32_t scope = 0;  // launch of global memory, block of shared memory: an older one means nothing any more
  Event write;
  Event reads[2];  // two are enough to find every race with a later write, see `remember_read`
};

// What an atomic hands over: of each block the epochs that are over, and threads whose accesses count as well.
struct Published {
  uint32_t epoch = 0;
  std::set<int16_t> threads;
};
using Knowledge = std::map<uint32_t, Published>;  // by block

void merge(Knowledge& into, const Knowledge& from) {
  for (const auto& [block, published] : from) {
    Published& mine = into[block];
    mine.epoch = std::max(mine.epoch, published.epoch);
    mine.threads.insert(published.threads.begin(), published.threads.end());
  }
}

struct ThreadClock {
  uint32_t own = 0;
  std::array<uint32_t, warpSize> lanes{};  // how far the accesses of each lane of the warp are known to be done
  bool unfenced = false;                   // wrote to global memory, or was told of such, since its last fence
  bool waited = false;                     // for the launches before
  Knowledge acquired;
};

// Memory that is shared by threads. The rest is the thread's own stack, and what the compiler makes of threadIdx.
enum class Space { own, shared, global };

Space space_of(const void* address) {
  if (state.current->fiber.holds(address)) return Space::own;
  if (state.static_smem.holds(address) || state.dynamic_smem.holds(address)) return Space::shared;
  const auto in = [address](const auto& variable) { return address >= &variable && address < &variable + 1; };
  return in(threadIdx) || in(blockIdx) || in(blockDim) || in(gridDim) ? Space::own : Space::global;
}

class RaceChecker final : public Checker {
 public:
  void launch_starts() override {
    first_block_ = ++last_scope_;
    if (!state.begins_early) scope_of_launch_ = first_block_;
    published_.clear();
    if (pages_.size() > kKeptPages && !state.begins_early) {
      pages_.clear();
      latest_ = nullptr;
    }
  }

  void block_starts() override {
    block_ = ++last_scope_;
    epoch_ = 0;
    acquired_by_block_.clear();
    unwritten_.clear();
    clocks_.assign(state.block_threads, {});
  }

  void barrier_passed() override {
    ++epoch_;
    bool unfenced = false, waited = false;
    for (ThreadClock& clock : clocks_) {
      unfenced |= clock.unfenced;
      waited |= clock.waited;
      merge(acquired_by_block_, clock.acquired);
    }
    for (ThreadClock& clock : clocks_) {
      clock.unfenced = unfenced;
      clock.waited = waited;
    }
  }

  void warp_synchronized(int warp, unsigned lanes) override {
    ThreadClock* const clocks = &clocks_[warp * warpSize];
    std::array<uint32_t, warpSize> joined{};
    Knowledge acquired;
    bool unfenced = false;
    for (int i = 0; i < warpSize; ++i) {
      if (!(lanes >> i & 1)) continue;
      clocks[i].lanes[i] = ++clocks[i].own;
      for (int j = 0; j < warpSize; ++j) joined[j] = std::max(joined[j], clocks[i].lanes[j]);
      merge(acquired, clocks[i].acquired);
      unfenced |= clocks[i].unfenced;
    }
    for (int i = 0; i < warpSize; ++i) {
      if (!(lanes >> i & 1)) continue;
      clocks[i].lanes = joined;
      clocks[i].acquired = acquired;
      clocks[i].unfenced = unfenced;
    }
  }

  void block_ends() override {
    if (!unwritten_.empty()) throw Error(unwritten_);
  }

  void fenced(Thread& thread) override { clocks_[thread.index].unfenced = false; }
  void waited_for_dependency(Thread& thread) override { clocks_[thread.index].waited = true; }

  void accessed(Thread& thread, const void* address, size_t bytes, Access access, const Site& site) override {
    check(thread, address, bytes, access, place_of(site));
  }

  void accessed(const void* address, size_t bytes, Access access, const void* pc) {
    check(*state.current, address, bytes, access, static_cast<Place>(static_cast<const char*>(pc) - module_begin_));
  }

 private:
  static constexpr size_t kPageBytes = 1024;
  static constexpr size_t kKeptPages = 1024;  // 64 MB
  using Page = std::array<Cell, kPageBytes>;

  void check(Thread& thread, const void* address, size_t bytes, Access access, Place place) {
    const Space space = space_of(address);
    if (space == Space::own) return;
    ThreadClock& clock = clocks_[thread.index];
    const Event now{block_,        epoch_,          clock.own, place, static_cast<int16_t>(thread.index),
                    access.atomic, access.under_way};
    const bool shared = space == Space::shared;
    for (size_t i = 0; i < bytes; ++i) {
      Cell& cell = cell_of(static_cast<const char*>(address) + i, shared ? block_ : scope_of_launch_);
      if (shared && cell.write.thread < 0 && access.reads && unwritten_.empty()) {
        unwritten_ = text(place) + ": uninitialised: reads shared memory" + text_of(address) +
                     " that the block has not written\n  in " + text_of_kernel() + ", " + text_of_block() + ", " +
                     emulation::text(thread);
      }
      const bool both_atomic = cell.write.atomic && now.atomic;
      if (!both_atomic && !ordered(cell.write, now)) report(cell.write, "written", now, access, space, address);
      if (access.reads && cell.write.under_way) {
        fail(text(place), "reads shared memory that the cp.async of " + text(cell.write.place) + " by thread " +
                              std::to_string(cell.write.thread) + " is still to fill: a wait or a commit is missing");
      }
      if (!access.writes) {
        remember_read(cell, now);
        continue;
      }
      for (Event& read : cell.reads) {
        if (!(read.atomic && now.atomic) && !ordered(read, now)) report(read, "read", now, access, space, address);
        read = {};
      }
      cell.write = now;
    }
    if (access.atomic)
      synchronize(thread, address, access);
    else
      clock.unfenced |= access.writes && !shared;
  }

  // The first of the readers since the last write that nothing orders, and one more: of another warp (or block) if
  // there is one, else another thread. Whoever writes then, one of the two is not itself, nor ordered with it if any
  // reader is not (but for __syncwarps of parts of a warp).
  void remember_read(Cell& cell, const Event& now) const {
    const auto warp = [](const Event& e) { return std::pair(e.block, e.thread / warpSize); };
    Event &first = cell.reads[0], &second = cell.reads[1];
    if (ordered(first, now))
      first = now;
    else if (ordered(second, now) || warp(second) == warp(first))
      second = now;
  }

  bool ordered(const Event& then, const Event& now) const {
    if (then.thread < 0) return true;
    const ThreadClock& clock = clocks_[now.thread];
    if (then.block < first_block_) return clock.waited;
    if (then.block == now.block) {
      if (then.thread == now.thread || then.epoch < now.epoch) return true;
      const bool same_warp = then.thread / warpSize == now.thread / warpSize;
      if (same_warp && clock.lanes[then.thread % warpSize] > then.clock) return true;
    }
    return knows(clock.acquired, then) || knows(acquired_by_block_, then);
  }

  static bool knows(const Knowledge& knowledge, const Event& then) {
    if (knowledge.empty()) return false;
    const auto of_block = knowledge.find(then.block);
    return of_block != knowledge.end() &&
           (then.epoch < of_block->second.epoch || of_block->second.threads.count(then.thread));
  }

  // An atomic takes over what earlier ones on the address published. One that writes publishes, after a fence.
  void synchronize(Thread& thread, const void* address, Access access) {
    ThreadClock& clock = clocks_[thread.index];
    Knowledge& published = published_[address];
    if (access.reads) merge(clock.acquired, published);
    if (!access.writes || clock.unfenced) return;
    merge(published, clock.acquired);
    merge(published, acquired_by_block_);
    Published& mine = published[block_];
    mine.epoch = std::max(mine.epoch, epoch_);
    mine.threads.insert(static_cast<int16_t>(thread.index));
  }

  Cell& cell_of(const char* address, uint32_t scope) {
    const auto number = reinterpret_cast<uintptr_t>(address);
    const uintptr_t page = number / kPageBytes;
    if (!latest_ || page != latest_page_) {
      std::unique_ptr<Page>& cells = pages_[page];
      if (!cells) cells = std::make_unique<Page>();
      latest_page_ = page;
      latest_ = cells.get();
    }
    Cell& cell = (*latest_)[number % kPageBytes];
    if (cell.scope != scope) {
      cell = {};
      cell.scope = scope;
    }
    return cell;
  }

  [[noreturn]] void report(const Event& then, const char* did, const Event& now, Access access, Space space,
                           const void* address) {
    const bool other_block = then.block != now.block;
    const std::string does = access.reads && access.writes ? "updates" : access.writes ? "writes" : "reads";
    std::string message = "race: thread " + std::to_string(now.thread) + ' ' + does + ' ' +
                          (space == Space::shared ? "shared" : "global") + " memory" + text_of(address) + " that " +
                          (then.block < first_block_ ? "the launch before has "
                           : other_block ? "thread " + std::to_string(then.thread) + " of another block has "
                                         : "thread " + std::to_string(then.thread) + " has ") +
                          did + " at " + text(then.place) + ", and nothing orders the two";
    fail(text(now.place), message);
  }

  static std::string text_of(const void* address) {
    if (!state.dynamic_smem.holds(address)) return "";
    return " (byte " + std::to_string(static_cast<const unsigned char*>(address) - state.dynamic_smem.begin) +
           " of the dynamic one)";
  }

  std::string text(Place place) const {
    return place & kIsSite ? emulation::text(sites_[place & ~kIsSite]) : source_line(module_begin_ + place);
  }

  Place place_of(const Site& site) {
    const auto [known, is_new] = site_numbers_.try_emplace({site.file_name(), site.line()}, sites_.size());
    if (is_new) sites_.push_back(site);
    return kIsSite + static_cast<Place>(known->second);
  }

  static const char* find_module() {
    Dl_info module;
    dladdr(reinterpret_cast<const void*>(&find_module), &module);
    return static_cast<const char*>(module.dli_fbase);
  }

  const char* const module_begin_ = find_module();
  uint32_t last_scope_ = 0;
  uint32_t scope_of_launch_ = 0;  // or of the last one that did not begin early
  uint32_t first_block_ = 0;      // of the launch
  uint32_t block_ = 0, epoch_ = 0;
  std::vector<ThreadClock> clocks_;
  Knowledge acquired_by_block_;
  // The first read of shared memory that nobody had written. A write that comes later, and makes a race of it, says
  // more; so this is an error only when the block ends without one.
  std::string unwritten_;
  std::unordered_map<const void*, Knowledge> published_;  // by the atomics on an address
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t latest_page_ = 0;
  Page* latest_ = nullptr;
  std::vector<Site> sites_;
  std::map<std::pair<const char*, uint32_t>, size_t> site_numbers_;
};

RaceChecker race_checker;
[[maybe_unused]] const bool installed = (checker = &race_checker, true);

}  // namespace
}  // namespace emulation

namespace {

constexpr emulation::Access kVolatileRead{.reads = true, .writes = false, .atomic = true};
constexpr emulation::Access kVolatileWrite{.reads = false, .writes = true, .atomic = true};

inline void on_access(const void* address, size_t bytes, emulation::Access access, const void* pc) {
  if (emulation::state.current && !emulation::state.uninterruptible) {
    emulation::race_checker.accessed(address, bytes, access, pc);
  }
}

}  // namespace

extern "C" {

#define EMULATION_HOOK(name, bytes, access) \
  void __tsan_##name(void* address) { on_access(address, bytes, access, __builtin_return_address(0)); }
#define EMULATION_HOOKS(bytes)                                     \
  EMULATION_HOOK(read##bytes, bytes, emulation::kRead)             \
  EMULATION_HOOK(write##bytes, bytes, emulation::kWrite)           \
  EMULATION_HOOK(unaligned_read##bytes, bytes, emulation::kRead)   \
  EMULATION_HOOK(unaligned_write##bytes, bytes, emulation::kWrite) \
  EMULATION_HOOK(volatile_read##bytes, bytes, kVolatileRead)       \
  EMULATION_HOOK(volatile_write##bytes, bytes, kVolatileWrite)
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  on_access(address, bytes, emulation::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  on_access(address, bytes, emulation::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
}
