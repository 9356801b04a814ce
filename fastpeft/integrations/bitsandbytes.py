"""bitsandbytes on a CPU: keeps 4-bit layers from repacking themselves."""

from __future__ import annotations

from torch import nn

from fastpeft.nn.frozen import is_linear4bit
from fastpeft.quant import REPACKED, bnb_quant_state


def close_cpu_trap(model: nn.Module) -> None:
    """Keeps every Linear4bit of `model` from repacking its weight.

    On a CPU with AVX512-BF16 the first eval() forward without gradients rewrites the weight in place for inference;
    training afterwards runs through a path without correct gradients. Raises ValueError, before anything is changed,
    where that has happened already.
    """
    linears = [(name, module) for name, module in model.named_modules() if is_linear4bit(module)]
    for name, linear in linears:
        if getattr(bnb_quant_state(linear), "packing_format_for_cpu", False):
            raise ValueError(f"{name}: {REPACKED}")
    for _, linear in linears:
        if linear.support_avx512bf16_for_cpu:
            linear.support_avx512bf16_for_cpu = False
            linear._fastpeft_closed_trap = True


def reopen_cpu_trap(model: nn.Module) -> None:
    """Undoes `close_cpu_trap`, on the layers that it changed."""
    for module in model.modules():
        if vars(module).pop("_fastpeft_closed_trap", False):
            module.support_avx512bf16_for_cpu = True
