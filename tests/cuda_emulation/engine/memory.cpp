#include "../include/emulation/memory.h"

#include <cstring>

#include "../include/emulation/atomics.h"
#include "state.h"

namespace emulation {
namespace {

bool is_multiple(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

void make_copy(Thread& thread, const AsyncCopy& copy) {
  announce(thread, copy.dst, copy.bytes, kWrite, copy.site);
  if (copy.src_bytes) announce(thread, copy.src, copy.src_bytes, kRead, copy.site);
  std::memset(copy.dst, 0, copy.bytes);
  std::memcpy(copy.dst, copy.src, copy.src_bytes);
}

}  // namespace

unsigned char* dynamic_smem() { return state.dynamic_smem.begin; }

void cp_async(void* dst, const void* src, int bytes, int src_bytes, Site site) {
  Thread& thread = *state.current;
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail(site, "cp.async copies 4, 8 or 16 bytes, not " + std::to_string(bytes));
  if (src_bytes < 0 || src_bytes > bytes) fail(site, "cp.async: more bytes to read than to write");
  if (!is_multiple(dst, bytes)) fail(site, "cp.async: misaligned destination");
  if (src_bytes && !is_multiple(src, bytes)) fail(site, "cp.async: misaligned source");
  if (!is_shared(dst)) fail(site, "cp.async: the destination is not in shared memory");
  const AsyncCopy copy{dst, src, bytes, src_bytes, site};
  if (state.config.eager_copies) return make_copy(thread, copy);
  announce(thread, dst, bytes, kCopyBegins, site);
  if (src_bytes) announce(thread, src, src_bytes, kRead, site);
  std::memset(dst, 0xff, bytes);
  thread.copies.push_back(copy);
}

void cp_async_commit() {
  Thread& thread = *state.current;
  thread.copy_groups.push_back(thread.copies.size());
}

void cp_async_wait(int groups_left) {
  Thread& thread = *state.current;
  auto& groups = thread.copy_groups;
  if (groups.size() <= static_cast<size_t>(groups_left)) return;
  const auto last = groups.end() - groups_left - 1;
  const size_t complete = *last;  // copies that no group holds stay under way
  groups.erase(groups.begin(), last + 1);
  for (size_t& group : groups) group -= complete;
  for (size_t i = 0; i < complete; ++i) make_copy(thread, thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(complete));
}

void fence() {
  if (checker) checker->fenced(*state.current);
}

AtomicAccess::AtomicAccess(void* address, size_t bytes, Site site) {
  if (!is_multiple(address, bytes)) fail(site, "misaligned atomic");
  announce(*state.current, address, bytes, kAtomicUpdate, site);
  ++state.uninterruptible;
}

AtomicAccess::~AtomicAccess() { --state.uninterruptible; }

}  // namespace emulation
