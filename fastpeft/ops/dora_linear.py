"""dora_linear: a frozen linear layer, dense or 4-bit, with a low-rank update and a trainable length of its rows."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import backend as backends
from fastpeft.ops.dora_linear_backends import RUNNERS
from fastpeft.ops.dora_norm import dora_norm
from fastpeft.ops.lora_linear import (
    _WEIGHT,
    _as_matrix,
    _check,
    _describe,
    _flatten,
    _seed_tensor,
    _unflatten,
    autocast_dtype,
)
from fastpeft.ops.lora_linear_backends import RULES, choose
from fastpeft.quant import NF4Weight
from fastpeft.reference.dora import dora_divisor, dora_gain
from fastpeft.reference.dora import dora_linear as _reference

_RULES = RULES | {"reference": backends.always}


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y = g * (x W^T + scaling * (x A^T) B^T) + bias`, g = magnitude / norm, the norm taken as a constant.

    With dropout, xd of x: `y = x W^T + bias + (g - 1) * xd W^T + g * scaling * (xd A^T) B^T`, as in peft.
    magnitude: [N], any float dtype. norm: [N], `dora_norm(weight, A, B, scaling)`, computed when None. Where it is
    zero, so are g and the gradient of the magnitude, and y is finite. All else as in `lora_linear`.

    The gain is float32 and applied in float32. Saved for backward: what `lora_linear` saves, and z [M, N] = y without
    gain and bias, in the compute type. The gradients of magnitude and bias are sums of float32, in a fixed order. The
    memory of a call beside these and the output is that of `lora_linear` with as much again.

    Raises ValueError (shapes, ranges, devices, an unable backend) or TypeError (dtypes) before anything is computed.
    Source: Liu et al., "DoRA", 2024 (https://arxiv.org/abs/2402.09353).
    """
    autocast = autocast_dtype(x)
    if autocast is not None and x.dtype != torch.float64:
        x = x.to(autocast)
    _check(x, weight, A, B, scaling, bias, dropout_p, seed, autocast is not None)
    _check_rows("magnitude", magnitude, x, weight.shape[0])
    if norm is None:
        norm = dora_norm(weight, A, B, scaling, backend=backend)
    _check_rows("norm", norm, x, weight.shape[0])
    norm = norm.detach()
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling, 1.0
    seed = _seed_tensor(seed, x.device) if dropout_p > 0 else None
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, B, magnitude))
    arguments = (A, B, magnitude, bias, norm, scaling, dropout_p, seed, training)
    if torch.compiler.is_compiling() and backend != "reference":
        # The backend is chosen when the op runs: use_backend is invisible to the tracer.
        return torch.ops.fastpeft.dora_linear(x, *_flatten(weight), *arguments, backend)[0]
    name = _choose(x, weight, training, backend, _RULES)
    if name == "reference":
        options = dict(norm=norm, dropout_p=dropout_p, seed=seed)
        return _reference(x, weight, A, B, magnitude, scaling, bias, **options)
    return DoraLinearFn.apply(x, weight, *arguments, RUNNERS[name])


def _choose(x, weight, training, backend, rules=RULES) -> str:
    """By lora_linear's table: what DoRA adds is the same for every backend."""
    return choose(x, weight, training, backend, rules, "dora_linear")


def _check_rows(name: str, tensor: Tensor, x: Tensor, N: int) -> None:
    if tensor.shape != (N,) or tensor.device != x.device:
        raise ValueError(f"{name} is {_describe(tensor)}; it must be ({N},) on {x.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")


class DoraLinearFn(torch.autograd.Function):
    """The autograd node of `dora_linear`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, x, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, training, runner):
        shape = x.shape
        x = _as_matrix(x)
        gain = _gain(magnitude, norm, x.dtype)
        y, z, xa = runner.forward(x, weight, A, B, gain, bias, scaling, dropout_p, seed, training)
        if any(ctx.needs_input_grad):
            _, need_weight, need_A, need_B, need_magnitude, _ = ctx.needs_input_grad[:6]
            # A 4-bit weight is frozen and never written in place: kept as it is, outside of autograd's bookkeeping.
            dense = weight if isinstance(weight, Tensor) else None
            ctx.nf4 = weight if dense is None else None
            kept = (x if need_A or need_weight else None, z if need_magnitude else None, xa if need_B else None)
            ctx.save_for_backward(*kept, dense, A, B, magnitude, bias, norm, seed)
            ctx.arguments = (shape, scaling, dropout_p, runner)
        # Not a view: autograd forbids in-place operations on a view that a Function returns.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, xa, weight, A, B, magnitude, bias, norm, seed = ctx.saved_tensors
        shape, scaling, dropout_p, runner = ctx.arguments
        weight = ctx.nf4 if weight is None else weight
        dy = _as_matrix(dy)
        arguments = (x, z, xa, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed)
        # All dtypes are settled: an autocast that is on in backward, but was off in forward, must not mix in.
        guard = torch.autocast(dy.device.type, enabled=False) if autocast_dtype(dy) is not None else nullcontext()
        with guard:
            grads = _backward(runner, dy, *arguments, ctx.needs_input_grad[:6])
        if grads[0] is not None:
            grads[0] = grads[0].view(shape)
        return *grads, *[None] * 6


def _gain(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    return dora_gain(magnitude, norm).to(torch.promote_types(dtype, torch.float32))


def _backward(runner, dy, x, z, xa, weight, A, B, magnitude, bias, norm, *options) -> list[Tensor | None]:
    """Gradients of (x, weight, A, B, magnitude, bias), None where they are not wanted."""
    gain = _gain(magnitude, norm, dy.dtype)
    grads = runner.backward(dy, x, z, xa, weight, A, B, gain, bias, *options)
    if grads[4] is not None:
        grads[4] = (grads[4] / dora_divisor(norm)).to(magnitude.dtype)
    return grads


# The same computation as a torch.library op: one opaque node in a compiled graph.


@torch.library.custom_op(
    "fastpeft::dora_linear",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHT}, Tensor A, Tensor B, Tensor magnitude, Tensor? bias, Tensor norm, float scaling,"
    " float dropout_p, Tensor? seed, bool training, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _op(x, *arguments):
    *weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, training, backend = arguments
    weight, gain = _unflatten(*weight), _gain(magnitude, norm, x.dtype)
    runner = RUNNERS[_choose(x, weight, training, backend)]
    y, z, xa = runner.forward(_as_matrix(x), weight, A, B, gain, bias, scaling, dropout_p, seed, training)
    if not training:
        z, xa = x.new_empty(0, B.shape[0]), x.new_empty(0, A.shape[0])
    return y.view(*x.shape[:-1], y.shape[-1]), z, xa


@_op.register_fake
def _(x, *arguments):
    A, B, training = *arguments[7:9], arguments[-2]
    rows, N = math.prod(x.shape[:-1]) if training else 0, B.shape[0]
    return x.new_empty(*x.shape[:-1], N), x.new_empty(rows, N), x.new_empty(rows, A.shape[0])


@torch.library.custom_op(
    "fastpeft::dora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor z, Tensor xa, {_WEIGHT}, Tensor A, Tensor B, Tensor magnitude,"
    " Tensor? bias, Tensor norm, float scaling, float dropout_p, Tensor? seed, bool[] needs, str? backend) -> Tensor[]",
)
def _op_backward(dy, x, z, xa, *arguments):
    weight, arguments, backend = _unflatten(*arguments[:7]), arguments[7:-1], arguments[-1]
    runner = RUNNERS[_choose(x, weight, True, backend)]
    grads = _backward(runner, _as_matrix(dy), _as_matrix(x), z, xa, weight, *arguments)
    if grads[0] is not None:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None]


@_op_backward.register_fake
def _(dy, x, z, xa, *arguments):
    weight, A, B, magnitude, bias, needs = arguments[0], *arguments[7:11], arguments[-2]
    like = (x, weight, A, B, magnitude, bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(like, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, *weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, _, backend = inputs
    ctx.save_for_backward(x, *output[1:], *weight[:5], A, B, magnitude, bias, norm, seed)
    ctx.arguments = (weight[5:], scaling, dropout_p, backend)


def _autograd(ctx, dy, _dz, _dxa):
    x, z, xa, *weight, A, B, magnitude, bias, norm, seed = ctx.saved_tensors
    sizes, scaling, dropout_p, backend = ctx.arguments
    needed = ctx.needs_input_grad
    needs = [*needed[:2], *needed[8:12]]
    arguments = (*weight, *sizes, A, B, magnitude, bias, norm, scaling, dropout_p, seed, needs, backend)
    grads = iter(_op_backward(dy, x, z, xa, *arguments))
    dx, dweight, *others = (next(grads) if need else None for need in needs)
    return dx, dweight, *[None] * 6, *others, *[None] * 6


_op.register_autograd(_autograd, setup_context=_setup_context)
