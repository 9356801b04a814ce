"""What must hold before a fused forward may read a module's parameters instead of calling the module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.nn import frozen
from fastpeft.ops.lora_linear import autocast_dtype


def is_plain(tensor: Tensor) -> bool:
    """Neither a sharded nor a quantized tensor subclass."""
    return type(tensor) in (nn.Parameter, Tensor)


def is_hooked(module: nn.Module) -> bool:
    """Somebody wants to see the calls of this module (hooks, offloading): they must not be bypassed."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not(base: nn.Module) -> str | None:
    """Why no call over this frozen layer can be fused; None where some can."""
    if not frozen.is_supported(base):
        return f"the base layer is a {type(base).__name__}"
    if frozen.is_linear4bit(base):
        try:
            frozen.weight_of(base)
        except ValueError as error:
            return str(error)
    elif not is_plain(base.weight):
        return f"the base weight is a {type(base.weight).__name__}"
    return None


def can_bypass(base: nn.Module, x: Tensor) -> bool:
    """Whether a call with x can be: nobody watches the layer, and both agree on a type to compute in."""
    if is_hooked(base):
        return False
    if type(base) is nn.Linear or frozen.is_conv1d(base):
        return is_plain(base.weight) and (x.dtype == base.weight.dtype or autocast_dtype(x) is not None)
    if not frozen.is_linear4bit(base):
        return False
    # Where a 4-bit base computes in float16, peft's float32 adapter keeps gradients that would vanish in float16.
    return base.compute_dtype is not torch.float16 or x.dtype is torch.float16 or autocast_dtype(x) is not None
