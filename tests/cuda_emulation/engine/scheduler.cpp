// One block: who runs when. A thread runs until it waits, ends, or its time slice is over.
#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <utility>

#include "faults.h"
#include "places.h"
#include "state.h"

namespace emulation {
namespace {

void thread_ends() {
  Thread& thread = *state.current;
  if (!thread.copies.empty()) {
    fail(thread.copies.front().site, "the thread ends without waiting for this cp.async");
  }
  thread.status = Status::ended;
  --state.live;
  state.live_lanes[thread.warp] &= ~(1u << thread.lane);
  barrier_without(thread);
  collectives_without(thread);
}

void thread_main() {
  state.thread_body(state.arguments);
  thread_ends();
  leave_for_ever(state.current->fiber);
}

// In random order a thread may lose its turn after any basic block; else only so that one which waits for another in
// a loop does not wait for ever.
int64_t new_time_slice() {
  constexpr int kRandomSlice = 256, kFairSlice = 1 << 14;
  return state.config.order == Order::random ? 1 + static_cast<int64_t>(random_number() % kRandomSlice) : kFairSlice;
}

void resume(Thread& thread) {
  state.current = &thread;
  threadIdx = thread.id;
  state.time_slice = state.whole_time_slice = new_time_slice();
  ++state.counters.switches;
  run(thread.fiber);
  report_fault();
  state.current = nullptr;
  if (!state.error.empty()) throw Error(std::exchange(state.error, {}));
}

void start_threads() {
  const int n = state.block_threads;
  if (static_cast<int>(state.threads.size()) < n) state.threads.resize(n);
  state.live = n;
  state.barrier = {};
  std::fill(std::begin(state.live_lanes), std::end(state.live_lanes), 0u);
  for (int i = 0; i < n; ++i) {
    Thread& thread = state.threads[i];
    thread.status = Status::ready;
    thread.index = i;
    thread.warp = i / warpSize;
    thread.lane = i % warpSize;
    thread.id = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.steps = 0;
    state.live_lanes[thread.warp] |= 1u << thread.lane;
    prepare(thread.fiber, thread_main);
  }
}

// Runs the lanes of a warp until all of them wait. Returns whether any of them ran.
bool run_warp(int warp, std::vector<uint32_t>& order) {
  const int first = warp * warpSize;
  bool ran = false;
  for (;;) {
    bool ran_now = false;
    state.preempted = false;
    permute(order, std::min(warpSize, state.block_threads - first));
    for (const uint32_t lane : order) {
      Thread& thread = state.threads[first + lane];
      if (thread.status != Status::ready) continue;
      resume(thread);
      ran_now = true;
    }
    ran |= ran_now;
    if (!ran_now || state.preempted) return ran;
    if (state.config.order == Order::random && random_number() % 4 == 0) return ran;  // warps overtake one another
  }
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::vector<const Thread*>> places;
  for (int i = 0; i < state.block_threads; ++i) {
    const Thread& thread = state.threads[i];
    if (thread.status == Status::ended) continue;
    std::string what = "the barrier";
    if (thread.status == Status::in_collective) {
      char mask[32];
      std::snprintf(mask, sizeof mask, " with mask %#x", thread.collective.mask);
      what = thread.collective.name + std::string(mask);
    }
    places["in " + what + ", " + text(thread.site)].push_back(&thread);
  }
  std::string message = "deadlock, these threads wait for one another:";
  for (const auto& [place, threads] : places) {
    message += "\n  " + text(*threads[0]);
    if (threads.size() > 1) message += " and " + std::to_string(threads.size() - 1) + " more";
    message += ' ' + place;
  }
  fail(places.begin()->second[0]->site, message);
}

}  // namespace

void permute(std::vector<uint32_t>& order, size_t n) {
  order.resize(n);
  std::iota(order.begin(), order.end(), 0u);
  if (state.config.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (state.config.order == Order::random) {
    for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  }
}

void wait(Thread& thread, Status why, const Site& site) {
  thread.status = why;
  thread.site = site;
  thread.steps = 0;
  leave(thread.fiber);
}

void give_way(Thread& thread) {
  state.preempted = true;
  leave(thread.fiber);
}

void run_block() {
  start_threads();
  poison_shared_memory();
  if (checker) checker->block_starts();
  const int warps = (state.block_threads + warpSize - 1) / warpSize;
  std::vector<uint32_t> warp_order, lane_order;
  while (state.live) {
    bool ran = false;
    permute(warp_order, warps);
    for (const uint32_t warp : warp_order) ran |= run_warp(static_cast<int>(warp), lane_order);
    if (!ran) report_deadlock();
  }
  if (checker) checker->block_ends();
  ++state.counters.blocks;
  state.counters.threads += state.block_threads;
}

}  // namespace emulation

// The compiler calls this at the start of every basic block of a kernel (-fsanitize-coverage=trace-pc).
extern "C" void __sanitizer_cov_trace_pc() {
  using namespace emulation;
  if (--state.time_slice > 0 || state.uninterruptible) return;
  if (!state.current) return;
  Thread& thread = *state.current;
  thread.steps += state.whole_time_slice;
  if (thread.steps > kMaxSteps) {
    fail(source_line(__builtin_return_address(0)),
         "the thread spins here: it waits for something that other threads of its block cannot bring, or for ever");
  }
  give_way(thread);
}
