#include "../include/emulation/warp.h"

#include <algorithm>
#include <bit>

#include "state.h"

namespace emulation {
namespace {

template <class F>
void for_each_lane(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

// Runs the collective that `one` waits in, if all of its lanes are there. Lanes that ended are not waited for.
bool run_if_complete(const Thread& one) {
  Thread* const lanes = &state.threads[one.warp * warpSize];
  const Collective& call = one.collective;
  const unsigned mask = call.mask & state.live_lanes[one.warp];
  void* arguments[warpSize] = {};
  bool complete = true;
  for_each_lane(mask, [&](int i) {
    const Collective& other = lanes[i].collective;
    complete &= lanes[i].status == Status::in_collective && other.mask == call.mask && other.run == call.run &&
                other.name == call.name;
    arguments[i] = other.arguments;
  });
  if (!complete) return false;
  ++state.counters.collectives;
  {
    const Uninterrupted all_lanes_at_once;  // `run` may call back into code of the kernel's file
    call.run(arguments, mask);
  }
  for_each_lane(mask, [&](int i) { lanes[i].status = Status::ready; });
  return true;
}

struct ShuffleLane {
  uint64_t value;
  int operand, width;
  uint64_t result;
};

int source_lane(Shuffle kind, int lane, const ShuffleLane& call) {
  const int first = lane & ~(call.width - 1), last = first + call.width - 1;
  int source = lane;
  switch (kind) {
    case Shuffle::index:
      return first + (call.operand & (call.width - 1));
    case Shuffle::up:
      source = lane - call.operand;
      break;
    case Shuffle::down:
      source = lane + call.operand;
      break;
    case Shuffle::xor_:
      source = lane ^ call.operand;
      return source > last ? lane : source;  // an earlier segment may be read, a later one not
  }
  return source < first || source > last ? lane : source;
}

template <Shuffle Kind>
void run_shuffle(void* const* lanes, unsigned mask) {
  for_each_lane(mask, [&](int i) {
    auto& call = *static_cast<ShuffleLane*>(lanes[i]);
    const int source = source_lane(Kind, i, call);
    const bool defined = mask >> source & 1;
    call.result = defined ? static_cast<ShuffleLane*>(lanes[source])->value : ~uint64_t{0};  // NaN in every type
    state.counters.undefined_shuffles += !defined;
  });
}

struct VoteLane {
  uint64_t value;
  unsigned result;
};

template <Vote Kind>
void run_vote(void* const* lanes, unsigned mask) {
  const auto value = [&](int i) { return static_cast<VoteLane*>(lanes[i])->value; };
  for_each_lane(mask, [&](int i) {
    const uint64_t own = Kind == Vote::match_any || Kind == Vote::match_all ? value(i) : 1;
    unsigned equal = 0;  // lanes whose value is mine, or true
    for_each_lane(mask, [&](int j) { equal |= static_cast<unsigned>(value(j) == own) << j; });
    unsigned result = equal;
    if (Kind == Vote::any) result = equal != 0;
    if (Kind == Vote::all) result = equal == mask;
    if (Kind == Vote::match_all) result = equal == mask ? mask : 0;
    static_cast<VoteLane*>(lanes[i])->result = result;
  });
}

struct ReductionLane {
  int64_t value, result;
};

template <Reduction Kind>
void run_reduction(void* const* lanes, unsigned mask) {
  bool first = true;
  int64_t total = 0;
  for_each_lane(mask, [&](int i) {
    const int64_t value = static_cast<ReductionLane*>(lanes[i])->value;
    if (first)
      total = value;
    else if (Kind == Reduction::add)
      total += value;
    else if (Kind == Reduction::min)
      total = std::min(total, value);
    else if (Kind == Reduction::max)
      total = std::max(total, value);
    else if (Kind == Reduction::and_)
      total &= value;
    else if (Kind == Reduction::or_)
      total |= value;
    else
      total ^= value;
    first = false;
  });
  for_each_lane(mask, [&](int i) { static_cast<ReductionLane*>(lanes[i])->result = total; });
}

void run_sync(void* const* lanes, unsigned mask) {
  const Thread& one = *static_cast<Thread*>(lanes[std::countr_zero(mask)]);
  if (checker) checker->warp_synchronized(one.warp, mask);
}

}  // namespace

void collective(const Collective& call, const Site& site) {
  Thread& thread = *state.current;
  if (!(call.mask >> thread.lane & 1)) {
    fail(site, std::string(call.name) + ": the calling lane " + std::to_string(thread.lane) + " is not in its mask");
  }
  thread.collective = call;
  thread.status = Status::in_collective;
  thread.site = site;
  thread.steps = 0;
  if (!run_if_complete(thread)) {
    wait(thread, Status::in_collective, site);
  } else if (state.config.order == Order::random) {
    give_way(thread);
  }
}

void collectives_without(Thread& ended) {
  for_each_lane(state.live_lanes[ended.warp], [&](int i) {
    Thread& thread = state.threads[ended.warp * warpSize + i];
    if (thread.status == Status::in_collective) run_if_complete(thread);
  });
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
  if (width < 1 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail(site, "shuffle: width " + std::to_string(width) + " is not a power of two up to 32");
  }
  ShuffleLane lane{value, operand, width, 0};
  switch (kind) {
    case Shuffle::index:
      collective({"__shfl_sync", mask, &lane, run_shuffle<Shuffle::index>}, site);
      break;
    case Shuffle::up:
      collective({"__shfl_up_sync", mask, &lane, run_shuffle<Shuffle::up>}, site);
      break;
    case Shuffle::down:
      collective({"__shfl_down_sync", mask, &lane, run_shuffle<Shuffle::down>}, site);
      break;
    case Shuffle::xor_:
      collective({"__shfl_xor_sync", mask, &lane, run_shuffle<Shuffle::xor_>}, site);
  }
  return lane.result;
}

unsigned vote(Vote kind, unsigned mask, uint64_t value, Site site) {
  VoteLane lane{value, 0};
  switch (kind) {
    case Vote::ballot:
      collective({"__ballot_sync", mask, &lane, run_vote<Vote::ballot>}, site);
      break;
    case Vote::any:
      collective({"__any_sync", mask, &lane, run_vote<Vote::any>}, site);
      break;
    case Vote::all:
      collective({"__all_sync", mask, &lane, run_vote<Vote::all>}, site);
      break;
    case Vote::match_any:
      collective({"__match_any_sync", mask, &lane, run_vote<Vote::match_any>}, site);
      break;
    case Vote::match_all:
      collective({"__match_all_sync", mask, &lane, run_vote<Vote::match_all>}, site);
  }
  return lane.result;
}

int64_t reduce(Reduction kind, unsigned mask, int64_t value, Site site) {
  ReductionLane lane{value, 0};
  switch (kind) {
    case Reduction::add:
      collective({"__reduce_add_sync", mask, &lane, run_reduction<Reduction::add>}, site);
      break;
    case Reduction::min:
      collective({"__reduce_min_sync", mask, &lane, run_reduction<Reduction::min>}, site);
      break;
    case Reduction::max:
      collective({"__reduce_max_sync", mask, &lane, run_reduction<Reduction::max>}, site);
      break;
    case Reduction::and_:
      collective({"__reduce_and_sync", mask, &lane, run_reduction<Reduction::and_>}, site);
      break;
    case Reduction::or_:
      collective({"__reduce_or_sync", mask, &lane, run_reduction<Reduction::or_>}, site);
      break;
    case Reduction::xor_:
      collective({"__reduce_xor_sync", mask, &lane, run_reduction<Reduction::xor_>}, site);
  }
  return lane.result;
}

void sync_warp(unsigned mask, Site site) { collective({"__syncwarp", mask, state.current, run_sync}, site); }

}  // namespace emulation

unsigned __activemask() { return 1u << emulation::state.current->lane; }
