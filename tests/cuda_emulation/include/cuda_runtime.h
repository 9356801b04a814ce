// Found before NVIDIA's header of this name when csrc/ is compiled for the CPU.
#pragma once

// clang-format off
#include "emulation/language.h"      // first: it gives __device__ and friends their meaning for all that follows
// clang-format on
#include "emulation/arithmetic.h"
#include "emulation/atomics.h"
#include "emulation/barrier.h"
#include "emulation/half.h"
#include "emulation/launch.h"
#include "emulation/memory.h"
#include "emulation/tensor_core.h"
#include "emulation/warp.h"
