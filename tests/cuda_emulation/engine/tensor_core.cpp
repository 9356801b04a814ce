// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix". With
// group = lane / 4 and pair = lane % 4 * 2, a register holds two neighbours of a row of A (of D), of a column of B.
#include "../include/emulation/tensor_core.h"

#include <cstring>
#include <utility>

#include "state.h"

namespace emulation {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct MmaLane {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  ToFloat to_float;
};

// Products are exact and summed in double, then rounded once. Tensor cores cut bits off while they align the addends,
// so no formula on a CPU gives their last bits.
void run_mma(void* const* lanes, unsigned mask) {
  const auto lane = [&](int i) -> const MmaLane& { return *static_cast<const MmaLane*>(lanes[i]); };
  if (mask != kAllLanes) fail(state.current->site, "mma.sync needs all 32 lanes of the warp");
  const ToFloat to_float = lane(0).to_float;
  const auto low = [&](uint32_t pair) { return to_float(static_cast<uint16_t>(pair)); };
  const auto high = [&](uint32_t pair) { return to_float(static_cast<uint16_t>(pair >> 16)); };
  double a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const int group = i / 4, pair = i % 4 * 2;
    for (int r = 0; r < 4; ++r) {  // rows +0, +8, +0, +8; columns +0, +0, +8, +8
      double* const at = &a[group + r % 2 * 8][pair + r / 2 * 8];
      at[0] = low(lane(i).a[r]);
      at[1] = high(lane(i).a[r]);
    }
    for (int r = 0; r < 2; ++r) {
      b[pair + r * 8][group] = low(lane(i).b[r]);
      b[pair + r * 8 + 1][group] = high(lane(i).b[r]);
    }
  }
  double product[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) product[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int i = 0; i < 32; ++i) {
    float* const d = lane(i).d;
    const int group = i / 4, pair = i % 4 * 2;
    for (int r = 0; r < 4; ++r) d[r] = static_cast<float>(product[group + r / 2 * 8][pair + r % 2] + d[r]);
  }
  ++state.counters.mma;
}

struct LdmatrixLane {
  uint32_t* registers;
  const void* row;
  bool transposed;
};

template <int Matrices>
void run_ldmatrix(void* const* lanes, unsigned mask) {
  const auto lane = [&](int i) -> const LdmatrixLane& { return *static_cast<const LdmatrixLane*>(lanes[i]); };
  Thread* const warp = &state.threads[state.current->warp * warpSize];
  const Site site = state.current->site;
  if (mask != kAllLanes) fail(site, "ldmatrix needs all 32 lanes of the warp");
  for (int matrix = 0; matrix < Matrices; ++matrix) {
    uint16_t elements[8][8];
    bool bank_taken[8] = {};  // a row of 16 bytes takes four of the 32 banks
    for (int r = 0; r < 8; ++r) {
      Thread& owner = warp[matrix * 8 + r];
      const void* const row = lane(owner.lane).row;
      const auto address = reinterpret_cast<uintptr_t>(row);
      if (address % 16)
        fail(site, "ldmatrix: the row address of lane " + std::to_string(owner.lane) + " is misaligned");
      if (!is_shared(row))
        fail(site, "ldmatrix: the row of lane " + std::to_string(owner.lane) + " is not in shared memory");
      announce(owner, row, 16, kRead, owner.site);
      std::memcpy(elements[r], row, 16);
      state.counters.ldmatrix_conflicts += std::exchange(bank_taken[address / 16 % 8], true);
    }
    for (int i = 0; i < 32; ++i) {
      const int group = i / 4, pair = i % 4 * 2;
      const bool t = lane(i).transposed;
      const uint32_t low = t ? elements[pair][group] : elements[group][pair];
      const uint32_t high = t ? elements[pair + 1][group] : elements[group][pair + 1];
      lane(i).registers[matrix] = low | high << 16;
    }
  }
  ++state.counters.ldmatrix;
}

}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, ToFloat to_float, Site site) {
  MmaLane lane{d, a, b, to_float};
  collective({"mma.sync.m16n8k16", kAllLanes, &lane, run_mma}, site);
}

void ldmatrix(int matrices, bool transposed, uint32_t* registers, const void* row, Site site) {
  LdmatrixLane lane{registers, row, transposed};
  const auto run = matrices == 1 ? run_ldmatrix<1> : matrices == 2 ? run_ldmatrix<2> : run_ldmatrix<4>;
  collective({transposed ? "ldmatrix.trans" : "ldmatrix", kAllLanes, &lane, run}, site);
}

}  // namespace emulation
