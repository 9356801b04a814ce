"""lora_linear: a frozen linear layer, dense or 4-bit, with a low-rank update, forward and backward."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import backend as backends
from fastpeft.ops.lora_linear_backends import RULES, RUNNERS, Folded, choose
from fastpeft.quant import NF4Weight
from fastpeft.reference.lora_linear import lora_linear as _reference

_RULES = RULES | {"reference": backends.always}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    fold: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`y = x W^T + bias + scaling * (dropout(x) A^T) B^T`.

    x: [..., K] bf16|fp16|fp32|fp64, any strides. weight: [N, K] in x's dtype, or an NF4Weight, dequantized to it.
    A: [R, K], B: [N, R]: any float dtype (the master copy may be float32); cast to the compute type, gradients return
    in their own type. bias: [N] or None. scaling: a float, or a 0-d tensor, which is never read on the host.
    dropout_p: in [0, 1), applied to the x of the low-rank path only. seed: fixes the mask; drawn from torch's
    generator when None, so that a checkpoint's recomputation sees the same one.
    fold: multiply with `W + scaling * B A`, summed in float32 and rounded once to the compute type, instead of adding
    the update to the output; where dropout is active it has no effect. One product less each way and x A^T is not
    saved, but an update below the rounding of W is lost for all tokens alike: see Folded.

    Compute type: x's dtype, or autocast's where it is on; products accumulate in float32. Returns [..., N] in the
    compute type. Saved for backward: x, x A^T and the parameters as they are; neither the mask nor a dequantized
    weight. Differentiable once with respect to x, A, B, bias and a dense weight.

    Raises ValueError (shapes, ranges, devices, an unable backend) or TypeError (dtypes) before anything is computed.
    Source: Hu et al., "LoRA", 2021 (https://arxiv.org/abs/2106.09685).
    """
    autocast = autocast_dtype(x)
    if autocast is not None and x.dtype != torch.float64:
        x = x.to(autocast)
    _check(x, weight, A, B, scaling, bias, dropout_p, seed, autocast is not None)
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling, 1.0
    seed = _seed_tensor(seed, x.device) if dropout_p > 0 else None
    scaling /= 1 - dropout_p
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, B))
    if torch.compiler.is_compiling() and backend != "reference":
        # The backend is chosen when the op runs: use_backend is invisible to the tracer.
        options = (scaling, dropout_p, seed, training, fold, backend)
        return torch.ops.fastpeft.lora_linear(x, *_flatten(weight), A, B, bias, *options)[0]
    name = choose(x, weight, training, backend, _RULES)
    if name == "reference":
        return _reference(x, weight, A, B, scaling * (1 - dropout_p), bias, dropout_p=dropout_p, seed=seed)
    return LoraLinearFn.apply(x, weight, A, B, bias, scaling, dropout_p, seed, training, _runner(name, fold, dropout_p))


def _runner(name: str, fold: bool, dropout_p: float):
    return Folded(RUNNERS[name]) if fold and dropout_p == 0 else RUNNERS[name]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device; None where it is off, or unknown as on `meta`."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _check(x, weight, A, B, scaling, bias, dropout_p, seed, autocast) -> None:
    if not isinstance(weight, Tensor | NF4Weight) or len(weight.shape) != 2:
        raise TypeError(f"weight must be a tensor [N, K] or an NF4Weight; got {_describe(weight)}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x is {tuple(x.shape)}, but weight is [{N}, {K}]: the last dimension of x must be {K}")
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or A.shape[0] != B.shape[1]:
        raise ValueError(f"A is {tuple(A.shape)} and B is {tuple(B.shape)}; for a weight of [{N}, {K}] "
                         f"they must be [R, {K}] and [{N}, R]")  # fmt: skip
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1:
            raise ValueError(f"scaling is {_describe(scaling)}; it must be a number or a tensor with one element")
    elif not isinstance(scaling, int | float):
        raise TypeError(f"scaling is {_describe(scaling)}; it must be a number or a tensor with one element")
    if bias is not None and (bias.shape != (N,) or not bias.is_floating_point() or bias.device != x.device):
        raise ValueError(f"bias is {_describe(bias)}; it must be ({N},), floating point, on {x.device}")
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device:
            raise ValueError(f"seed is {_describe(seed)}; it must be a 0-d int64 tensor on {x.device}")
    elif seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed is {seed!r}; it must be a 64-bit integer or a 0-d int64 tensor")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be in [0, 1)")
    if x.dtype not in _FLOATS or not A.is_floating_point() or not B.is_floating_point():
        raise TypeError(f"x is {x.dtype}, A is {A.dtype}, B is {B.dtype}; all must be floating point")
    if isinstance(weight, Tensor) and weight.dtype != x.dtype and not (autocast and weight.is_floating_point()):
        raise TypeError(f"x is {x.dtype}, but weight is {weight.dtype}: cast one of them, or use torch.autocast")
    device = x.device
    if weight.device != device or A.device != device or B.device != device:
        raise ValueError(f"x is on {device}, weight on {weight.device}, A on {A.device}, B on {B.device}")


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(0, 2**31 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class LoraLinearFn(torch.autograd.Function):
    """The autograd node of `lora_linear`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, scale, dropout_p, seed, training, runner):
        shape = x.shape
        x = _as_matrix(x)
        y, xa = runner.forward(x, weight, A, B, bias, scale, dropout_p, seed, training)
        if any(ctx.needs_input_grad):
            _, need_weight, need_A, need_B, _ = ctx.needs_input_grad[:5]
            # A 4-bit weight is frozen and never written in place: kept as it is, outside of autograd's bookkeeping.
            dense = weight if isinstance(weight, Tensor) else None
            ctx.nf4 = weight if dense is None else None
            kept_x = x if need_A or need_weight or (need_B and xa is None) else None
            ctx.save_for_backward(kept_x, xa if need_B else None, dense, A, B, bias, seed)
            ctx.arguments = (shape, scale, dropout_p, runner)
        # Not a view: autograd forbids in-place operations on a view that a Function returns.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, xa, weight, A, B, bias, seed = ctx.saved_tensors
        shape, scale, dropout_p, runner = ctx.arguments
        weight = ctx.nf4 if weight is None else weight
        dy = _as_matrix(dy)
        needs = ctx.needs_input_grad[:5]
        # All dtypes are settled: an autocast that is on in backward, but was off in forward, must not mix in.
        guard = torch.autocast(dy.device.type, enabled=False) if autocast_dtype(dy) is not None else nullcontext()
        with guard:
            grads = runner.backward(dy, x, xa, weight, A, B, bias, scale, dropout_p, seed, needs)
        if grads[0] is not None:
            grads[0] = grads[0].view(shape)
        return *grads, None, None, None, None, None


# The same computation as a torch.library op: one opaque node in a compiled graph. Eager mode calls the Function above,
# which has less to dispatch.

_WEIGHT = "Tensor weight, Tensor? absmax, Tensor? absmax_code, Tensor? absmax_scale, Tensor? absmax_offset, "
_WEIGHT += "int[] shape, int blocksize"


def _flatten(weight: Tensor | NF4Weight) -> tuple:
    if isinstance(weight, Tensor):
        return weight, None, None, None, None, weight.shape, 0
    w = weight
    return w.packed, w.absmax, w.absmax_code, w.absmax_scale, w.absmax_offset, w.shape, w.blocksize


def _unflatten(weight, absmax, absmax_code, absmax_scale, absmax_offset, shape, blocksize) -> Tensor | NF4Weight:
    if absmax is None:
        return weight
    nested = (absmax_code, absmax_scale, absmax_offset)
    return NF4Weight(weight, absmax, tuple(shape), blocksize, torch.float32, *nested)


@torch.library.custom_op(
    "fastpeft::lora_linear",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHT}, Tensor A, Tensor B, Tensor? bias, float scale, float dropout_p, Tensor? seed,"
    " bool training, bool fold, str? backend) -> (Tensor, Tensor)",
)
def _op(x, w0, w1, w2, w3, w4, shape, blocksize, A, B, bias, scale, dropout_p, seed, training, fold, backend):
    weight = _unflatten(w0, w1, w2, w3, w4, shape, blocksize)
    runner = _runner(choose(x, weight, training, backend), fold, dropout_p)
    flat = _as_matrix(x)
    y, xa = runner.forward(flat, weight, A, B, bias, scale, dropout_p, seed, training)
    kept = _kept_rows(flat.shape[0], training, fold, dropout_p)
    return y.view(*x.shape[:-1], y.shape[-1]), x.new_empty(0, A.shape[0]) if xa is None or kept == 0 else xa


def _kept_rows(rows: int, training: bool, fold: bool, dropout_p: float) -> int:
    return rows if training and not (fold and dropout_p == 0) else 0


@_op.register_fake
def _(x, w0, w1, w2, w3, w4, shape, blocksize, A, B, bias, scale, dropout_p, seed, training, fold, backend):
    rows = _kept_rows(math.prod(x.shape[:-1]), training, fold, dropout_p)
    return x.new_empty(*x.shape[:-1], B.shape[0]), x.new_empty(rows, A.shape[0])


@torch.library.custom_op(
    "fastpeft::lora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor xa, {_WEIGHT}, Tensor A, Tensor B, Tensor? bias, float scale,"
    " float dropout_p, Tensor? seed, bool fold, str? backend, bool[] needs) -> Tensor[]",
)
def _op_backward(
    dy, x, xa, w0, w1, w2, w3, w4, shape, blocksize, A, B, bias, scale, dropout_p, seed, fold, backend, needs
):
    weight = _unflatten(w0, w1, w2, w3, w4, shape, blocksize)
    runner = _runner(choose(x, weight, True, backend), fold, dropout_p)
    dy, x2 = _as_matrix(dy), _as_matrix(x)
    grads = runner.backward(dy, x2, xa, weight, A, B, bias, scale, dropout_p, seed, needs)
    if grads[0] is not None:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None]


@_op_backward.register_fake
def _(dy, x, xa, w0, w1, w2, w3, w4, shape, blocksize, A, B, bias, scale, dropout_p, seed, fold, backend, needs):
    like = (x, w0, A, B, bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(like, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, *weight, A, B, bias, scale, dropout_p, seed, _, fold, backend = inputs
    ctx.save_for_backward(x, output[1], *weight[:5], A, B, bias, seed)
    ctx.arguments = (*weight[5:], scale, dropout_p, fold, backend)


def _autograd(ctx, dy, _dxa):
    x, xa, *weight, A, B, bias, seed = ctx.saved_tensors
    shape, blocksize, scale, dropout_p, fold, backend = ctx.arguments
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[1], *needed[8:11]]
    options = (scale, dropout_p, seed, fold, backend, needs)
    grads = iter(_op_backward(dy, x, xa, *weight, shape, blocksize, A, B, bias, *options))
    dx, dweight, dA, dB, dbias = (next(grads) if need else None for need in needs)
    return dx, dweight, *[None] * 6, dA, dB, dbias, *[None] * 6


_op.register_autograd(_autograd, setup_context=_setup_context)
