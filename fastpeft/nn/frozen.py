"""The frozen linear under an adapter: dense `nn.Linear`, transformers' `Conv1D`, or bitsandbytes' `Linear4bit`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastpeft.ops import lora_linear
from fastpeft.quant import NF4Weight, bnb_quant_state


def is_linear4bit(module: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")  # nobody has such a module who has not imported it
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def is_conv1d(module: nn.Module) -> bool:
    # By name: the modules of fastpeft work without transformers.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_supported(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_linear4bit(module) or is_conv1d(module)


def weight_of(base: nn.Module) -> Tensor | NF4Weight:
    """The weight as [N, K], without a copy. Raises what `NF4Weight.from_bnb` raises."""
    if type(base) is nn.Linear:
        return base.weight
    # The view is made again at each call: whatever peft or bitsandbytes did to the storage since, it is seen.
    return NF4Weight.from_bnb(base) if is_linear4bit(base) else base.weight.t()


def lora_forward(
    base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling, dropout_p: float, fold: bool = False
) -> Tensor:
    """`base(x) + scaling * dropout(x) A^T B^T`, fused; x: [..., K] -> [..., N] in the dtype that the base returns."""

    def call(x: Tensor, weight: Tensor | NF4Weight) -> Tensor:
        return lora_linear(x, weight, A, B, scaling, base.bias, dropout_p=dropout_p, fold=fold)

    return in_type_of(base, x, call)


def in_type_of(base: nn.Module, x: Tensor, call: Callable[[Tensor, Tensor | NF4Weight], Tensor]) -> Tensor:
    """`call(x, weight)` in the type that `base` computes in, the result in the one that it returns."""
    weight = weight_of(base)
    if isinstance(weight, Tensor):
        return call(x, weight)
    # A 4-bit base computes in a dtype of its own, settled at the first call, and converts back.
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    # The gradients of the adapter would vanish in float16 under activations of a wider range.
    dtype = x.dtype if base.compute_dtype in (None, torch.float16) else base.compute_dtype
    return call(x.to(dtype), weight).to(x.dtype)


def freeze(base: nn.Module) -> None:
    """No gradients for the base; a 4-bit one no longer repacks its storage at an evaluation on a CPU."""
    base.requires_grad_(False)
    if is_linear4bit(base):
        base.support_avx512bf16_for_cpu = False


@torch.no_grad()
def add_to_weight(base: nn.Module, delta: Tensor) -> float:
    """`W <- W + delta` in the storage of `base`; delta: [N, K] float32. The old parameter is replaced, not written.

    Summed in float32 and rounded, or quantized, once. Returns what was lost: the norm of (new weight - exact sum)
    relative to the norm of delta; 0.0 for a delta of zeros. Raises ValueError when the sum is not finite.
    """
    weight = weight_of(base)
    exact = (weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()) + delta
    rounded = exact if isinstance(weight, NF4Weight) else exact.to(weight.dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError("the merged weight is not finite; the adapter seems to be broken")
    if isinstance(weight, NF4Weight):
        base.weight = _requantized(base, exact)
        rounded = weight_of(base).dequantize(torch.float32)
    else:
        base.weight = nn.Parameter(rounded.t().contiguous() if is_conv1d(base) else rounded, requires_grad=False)
    size = delta.norm()
    return ((rounded.float() - exact).norm() / size).item() if size > 0 else 0.0


def _requantized(linear: nn.Module, weight: Tensor) -> nn.Parameter:
    """weight: [N, K] float32 -> a Params4bit with the settings of `linear`'s own."""
    old, state = linear.weight, bnb_quant_state(linear)
    parameter = type(old)(
        weight,
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.quant_storage,
        module=linear,
    )
    parameter = parameter.to(weight.device)  # quantizes
    parameter.quant_state.dtype = state.dtype
    return parameter


def restore_weight(base: nn.Module, weight: nn.Parameter) -> None:
    """Undoes `add_to_weight`: `weight` is the parameter that it replaced, moved to where the base is now."""
    if is_linear4bit(base):
        moved = weight.device != base.weight.device
        base.weight = weight.to(base.weight.device) if moved else weight
        base.quant_state = base.weight.quant_state
    else:
        weight.data = weight.data.to(base.weight)
        base.weight = weight
