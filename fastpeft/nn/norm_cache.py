"""What a DoRA layer keeps between its calls: its norm, and for decoding its gain folded into the 4-bit storage.

Both are functions of tensors that others change: optimizers (fused ones and those of bitsandbytes without a trace in
`_version`), `.data` writes, merges, loads. A kept value is used only where all of this is as it was when it was made:
the count of optimizer steps, of all optimizers; each tensor's identity, address and version; the scaling; and on a CPU
the contents of A, B and the magnitude, which are compared with a copy, and an element of each row of the weight.

On other devices contents cannot be compared without waiting for the device. There the norm is made anew at each call,
which is one launch and cheaper than any check; only what decoding folds is kept, and after a write through `.data` in
place, of which nothing tells, `forget` is due. A compiled graph and a captured CUDA graph make their own norm.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from fastpeft.nn import frozen
from fastpeft.ops import dora_norm
from fastpeft.quant import NF4Weight, bnb_quant_state
from fastpeft.reference.dora import dora_gain


@dataclass
class _Kept:
    mark: tuple
    contents: list[Tensor]
    value: Tensor | tuple[Tensor, Tensor]


# By the adapter's B, which every layer has for itself. Nothing here keeps a model's tensor alive.
_norms: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()
_folds: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()
_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def forget() -> None:
    """Drops all that is kept: the next call of every layer makes it anew."""
    _norms.clear()
    _folds.clear()


def norm(base: nn.Module, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    """`dora_norm` of the frozen linear `base` with its update; [N] float32, not to be written to."""

    def compute() -> Tensor:
        return dora_norm(frozen.weight_of(base), A, B, scaling)

    return _keep(_norms, base, (A, B), scaling, compute) if _is_readable(B) else compute()


def folded(
    base: nn.Module, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float | Tensor
) -> tuple[NF4Weight, Tensor]:
    """`gain * W` as a 4-bit weight, the gain in its absmax, and `gain * scaling * B`: with them DoRA is LoRA.

    For a 4-bit `base` of which `can_fold` is True.
    """
    weight = frozen.weight_of(base)

    def compute() -> tuple[Tensor, Tensor]:
        gain = dora_gain(magnitude, norm(base, A, B, scaling))
        absmax = weight.absmax_float() * gain.repeat_interleave(weight.shape[1] // weight.blocksize)
        return absmax.float(), gain.unsqueeze(1) * (B * scaling)

    absmax, B = _keep(_folds, base, (A, B, magnitude), scaling, compute)
    return replace(weight, absmax=absmax, absmax_code=None, absmax_scale=None, absmax_offset=None), B


def can_fold(weight: Tensor | NF4Weight) -> bool:
    """Each absmax belongs to one row."""
    return isinstance(weight, NF4Weight) and weight.shape[1] % weight.blocksize == 0


def _keep(store: MutableMapping, base: nn.Module, tensors: tuple[Tensor, ...], scaling, compute: Callable):
    if torch.compiler.is_compiling() or _is_capturing(tensors[0]):
        return compute()
    readable = _is_readable(tensors[0])
    if isinstance(scaling, Tensor):
        tensors, scaling = (*tensors, scaling), None
    if not readable and any(tensor.is_inference() for tensor in tensors):
        return compute()  # has no version
    state = bnb_quant_state(base)
    identities = (base.weight, *tensors) if state is None else (base.weight, state.absmax, *tensors)
    # A tensor of inference mode is of no use to autograd: what was made there is used there.
    mark = (_steps, torch.is_inference_mode_enabled(), scaling, *map(_identity, identities))
    contents = [*tensors, _sample(base.weight, tensors[1].shape[0])] if readable else []
    kept = store.get(tensors[1])
    if kept is not None and kept.mark == mark and all(map(torch.equal, kept.contents, contents)):
        return kept.value
    with torch.no_grad():
        value = compute()
        store[tensors[1]] = _Kept(mark, [tensor.detach().clone() for tensor in contents], value)
    return value


def _is_readable(tensor: Tensor) -> bool:
    """Contents can be compared without waiting for a device."""
    return tensor.device.type == "cpu"


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _identity(tensor: Tensor) -> tuple:
    return WeakIdRef(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _sample(weight: Tensor, rows: int) -> Tensor:
    """At least an element of each row of the storage, at another column in each: one less than a row is the stride."""
    flat = (weight if weight.is_contiguous() else weight.t()).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // rows - 1)]
