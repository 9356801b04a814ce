#include "../include/emulation/barrier.h"

#include "state.h"

namespace emulation {
namespace {

Votes last_votes;  // of the barrier that was passed; read by its threads before any of them can reach the next

void pass_barrier() {
  Barrier& barrier = state.barrier;
  last_votes = {barrier.count, barrier.all, barrier.any};
  barrier = {};
  ++state.counters.barriers;
  if (checker) checker->barrier_passed();
  for (int i = 0; i < state.block_threads; ++i) {
    Thread& thread = state.threads[i];
    if (thread.status == Status::at_barrier) thread.status = Status::ready;
  }
}

bool same_line(const Site& a, const Site& b) { return a.line() == b.line() && text(a) == text(b); }

}  // namespace

// Strict: every thread of the block comes, and to the same line. A GPU lets more pass and gives no promise.
Votes barrier(bool predicate, Site site) {
  Thread& thread = *state.current;
  Barrier& barrier = state.barrier;
  if (state.live < state.block_threads) {
    fail(site, std::to_string(state.block_threads - state.live) + " thread(s) of the block ended before this barrier");
  }
  if (barrier.waiting && !same_line(barrier.site, site)) {
    fail(site, "divergent barrier: other threads of the block wait at the barrier " + text(barrier.site));
  }
  barrier.site = site;
  ++barrier.waiting;
  barrier.count += predicate;
  barrier.all &= predicate;
  barrier.any |= predicate;
  if (barrier.waiting < state.block_threads) {
    wait(thread, Status::at_barrier, site);
  } else {
    pass_barrier();
    thread.steps = 0;
    if (state.config.order == Order::random)
      give_way(thread);  // else the last one to come is always the first to go on
  }
  return last_votes;
}

void barrier_without(Thread&) {
  if (state.barrier.waiting) fail(state.barrier.site, "a thread ended while others wait at this barrier");
}

}  // namespace emulation
