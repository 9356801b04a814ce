"""Which half types the CPU multiplies with instructions of its own; where it has none, float32 is many times faster.

Without them torch multiplies bf16 and fp16 in a scalar loop, 10 to 40 times slower than float32 (AVX2); with AVX512 but
without its bf16 instructions oneDNN emulates them in float32.
"""

from __future__ import annotations

import logging
import os
import platform
from functools import cache

import torch
from torch import nn

from fastpeft.backend import HALF_TYPES

_logger = logging.getLogger("fastpeft")


@cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of `dtype` with this CPU's own instructions; True for all but bf16 and fp16.

    FASTPEFT_CPU_HALF=0 makes it believe that the CPU has none, 1 that it has both: results differ by rounding alone, so
    that tests walk both ways on one machine. Asked once a process. Raises ValueError for another value.
    """
    if dtype not in HALF_TYPES:
        return True
    believed = os.environ.get("FASTPEFT_CPU_HALF") or None
    if believed is not None:
        if believed not in ("0", "1"):
            raise ValueError(f"FASTPEFT_CPU_HALF is {believed!r}; allowed are 0 (the CPU has none) and 1 (it has both)")
        return believed == "1"
    # Where torch is built without oneDNN (macOS, for one), or does not say, float32 is the safe answer.
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    if not getattr(torch.ops.mkldnn, name, lambda: False)():
        return False
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN takes bf16 wherever there is AVX512, and emulates it. Every CPU with AMX has the instructions too.
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return True


def advise_float32(model: nn.Module) -> None:
    """Logs once a process that float32 would be faster, where `model` has bf16 or fp16 parameters on such a CPU."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not multiplies_natively(parameter.dtype):
            _say_once(parameter.dtype)
            return


@cache
def _say_once(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    _logger.warning(
        "the model is in %s, for which this CPU has no instructions: outside of fastpeft's layers torch multiplies it "
        "many times slower than float32; model.float() is the remedy",
        name,
    )
