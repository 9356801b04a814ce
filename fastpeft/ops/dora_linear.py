"""dora_linear: a frozen linear layer, dense or 4-bit, with a low-rank update and a trainable length of its rows."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fastpeft import backend as backends
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
from fastpeft.ops.lora_linear_backends import Eager, dense
from fastpeft.quant import NF4Weight
from fastpeft.reference.dora import dora_divisor, dora_gain
from fastpeft.reference.dora import dora_linear as _reference
from fastpeft.reference.dropout import keep_mask

_RULES = {"eager": backends.always, "reference": backends.always}
_OPAQUE_RULES = {name: rule for name, rule in _RULES.items() if name != "reference"}


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
    arguments = (A, B, magnitude, bias, norm, scaling, dropout_p, seed)
    if torch.compiler.is_compiling() and backend != "reference":
        return torch.ops.fastpeft.dora_linear(x, *_flatten(weight), *arguments, backend)[0]
    if backends.choose("dora_linear", _RULES, x, backend=backend) == "reference":
        options = dict(norm=norm, dropout_p=dropout_p, seed=seed)
        return _reference(x, weight, A, B, magnitude, scaling, bias, **options)
    return DoraLinearFn.apply(x, weight, *arguments)


def _check_rows(name: str, tensor: Tensor, x: Tensor, N: int) -> None:
    if tensor.shape != (N,) or tensor.device != x.device:
        raise ValueError(f"{name} is {_describe(tensor)}; it must be ({N},) on {x.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")


# With z = xd W^T + scaling * (xd A^T) B^T the formula is y = g * z + bias without dropout, and with it
# y = lora_linear(x) + (g - 1) * z. The 1 / (1 - p) of xd = keep * x / (1 - p) goes into the gain, z is of keep * x.


def _forward(x, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed) -> tuple[Tensor, Tensor, Tensor]:
    """x: [M, K]. Returns y [M, N], z [M, N] and xa = x A^T [M, R]; with dropout the latter two are of keep * x."""
    gain, y = _gain(magnitude, norm, x.dtype), None
    if dropout_p > 0:
        weight = dense(weight, x.dtype)  # once for two products
        y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        x = x * keep_mask(seed, *x.shape, dropout_p)
    z, xa = Eager.forward(x, weight, A, B, None, scaling, 0.0, None, True)
    if y is None:
        return _times_gain(z, gain, bias), z, xa
    y.addmm_(xa, B.to(x.dtype).t(), alpha=scaling / (1 - dropout_p))
    return y.add_(_times_gain(z, (gain - 1) / (1 - dropout_p))), z, xa


def _backward(
    dy, x, z, xa, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, needs
) -> list[Tensor | None]:
    """dy: [M, N]. Gradients of (x, weight, A, B, magnitude, bias), None where `needs` is False."""
    need_x, need_weight, need_A, need_B, need_magnitude, need_bias = needs
    full, kept_x = weight, x
    if dropout_p > 0:
        full, keep = dense(weight, dy.dtype), keep_mask(seed, dy.shape[0], A.shape[1], dropout_p)
        kept_x = None if x is None else x * keep
    gain = _gain(magnitude, norm, dy.dtype) / (1 - dropout_p)
    dz, sums = _gain_backward(dy, z if need_magnitude else None, gain)
    lora_needs = (need_x, need_weight, need_A, need_B, False)
    dx, dweight, dA, dB, _ = Eager.backward(dz, kept_x, xa, full, A, B, None, scaling, 0.0, None, lora_needs)
    if dropout_p > 0:
        # y holds (x - xd) W^T too: x itself where it was dropped, elsewhere -p / (1 - p) * x.
        if need_x:
            dx_rest = torch.mm(dy, full)
            dx = torch.where(keep, dx.sub_(dx_rest, alpha=dropout_p / (1 - dropout_p)), dx_rest)
        if need_weight:
            dweight += torch.mm(dy.t(), torch.sub(x, kept_x, alpha=1 / (1 - dropout_p)))
    dmagnitude = dbias = None
    if need_magnitude:
        dmagnitude = (sums / (dora_divisor(norm) * (1 - dropout_p))).to(magnitude.dtype)
    if need_bias:
        dbias = dy.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32)).to(bias.dtype)
    return [dx, dweight, dA, dB, dmagnitude, dbias]


def _gain(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    return dora_gain(magnitude, norm).to(torch.promote_types(dtype, torch.float32))


# A product of 16-bit rows with a float32 gain: written with torch's arithmetic it makes float32 copies of the rows. A
# batch norm of mean 0 and variance 1 is the same product, and so is its backward, in one pass each.


def _times_gain(z: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gain * z + bias`, in gain's dtype and rounded once to z's."""
    if z.dtype == gain.dtype or z.numel() == 0:  # a batch norm of nothing divides by zero
        return (z * gain if bias is None else torch.addcmul(bias.to(gain.dtype), z, gain)).to(z.dtype)
    mean, variance = torch.zeros_like(gain), torch.ones_like(gain)
    bias = mean if bias is None else bias.to(gain.dtype)
    return torch.batch_norm(z, gain, bias, mean, variance, False, 0.0, 0.0, False)


def _gain_backward(dy: Tensor, z: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor | None]:
    """`gain * dy`, rounded to dy's dtype, and the sums of dy * z over the rows, in gain's dtype; None without z."""
    if z is None:
        return _times_gain(dy, gain), None
    if dy.dtype == gain.dtype or dy.numel() == 0:
        return _times_gain(dy, gain), (dy * z).sum(0, dtype=gain.dtype)
    mean, variance = torch.zeros_like(gain), torch.ones_like(gain)
    of_running_statistics = (mean, variance, None, None, False, 0.0)
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(dy.contiguous(), z, gain, *of_running_statistics, (True, True, False))[:2]


class DoraLinearFn(torch.autograd.Function):
    """The autograd node of `dora_linear`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, x, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed):
        shape = x.shape
        x = _as_matrix(x)
        y, z, xa = _forward(x, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed)
        if any(ctx.needs_input_grad):
            _, need_weight, need_A, need_B, need_magnitude, _ = ctx.needs_input_grad[:6]
            # A 4-bit weight is frozen and never written in place: kept as it is, outside of autograd's bookkeeping.
            tensor = weight if isinstance(weight, Tensor) else None
            ctx.nf4 = weight if tensor is None else None
            kept = (x if need_A or need_weight else None, z if need_magnitude else None, xa if need_B else None)
            ctx.save_for_backward(*kept, tensor, A, B, magnitude, bias, norm, seed)
            ctx.arguments = (shape, scaling, dropout_p)
        # Not a view: autograd forbids in-place operations on a view that a Function returns.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, z, xa, weight, A, B, magnitude, bias, norm, seed = ctx.saved_tensors
        shape, scaling, dropout_p = ctx.arguments
        weight = ctx.nf4 if weight is None else weight
        dy = _as_matrix(dy)
        needs = ctx.needs_input_grad[:6]
        # All dtypes are settled: an autocast that is on in backward, but was off in forward, must not mix in.
        guard = torch.autocast(dy.device.type, enabled=False) if autocast_dtype(dy) is not None else nullcontext()
        with guard:
            grads = _backward(dy, x, z, xa, weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, needs)
        if grads[0] is not None:
            grads[0] = grads[0].view(shape)
        return *grads, None, None, None, None


# The same computation as a torch.library op: one opaque node in a compiled graph.


@torch.library.custom_op(
    "fastpeft::dora_linear",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHT}, Tensor A, Tensor B, Tensor magnitude, Tensor? bias, Tensor norm, float scaling,"
    " float dropout_p, Tensor? seed, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _op(x, *arguments):
    *weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, backend = arguments
    backends.choose("dora_linear in a compiled graph", _OPAQUE_RULES, x, backend=backend)
    y, z, xa = _forward(_as_matrix(x), _unflatten(*weight), A, B, magnitude, bias, norm, scaling, dropout_p, seed)
    return y.view(*x.shape[:-1], y.shape[-1]), z, xa


@_op.register_fake
def _(x, *arguments):
    A, B = arguments[7:9]
    rows, N = math.prod(x.shape[:-1]), B.shape[0]
    return x.new_empty(*x.shape[:-1], N), x.new_empty(rows, N), x.new_empty(rows, A.shape[0])


@torch.library.custom_op(
    "fastpeft::dora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor z, Tensor xa, {_WEIGHT}, Tensor A, Tensor B, Tensor magnitude,"
    " Tensor? bias, Tensor norm, float scaling, float dropout_p, Tensor? seed, bool[] needs) -> Tensor[]",
)
def _op_backward(dy, x, z, xa, *arguments):
    weight, arguments = _unflatten(*arguments[:7]), arguments[7:]
    grads = _backward(_as_matrix(dy), _as_matrix(x), z, xa, weight, *arguments)
    if grads[0] is not None:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None]


@_op_backward.register_fake
def _(dy, x, z, xa, *arguments):
    weight, A, B, magnitude, bias, needs = arguments[0], *arguments[7:11], arguments[-1]
    like = (x, weight, A, B, magnitude, bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(like, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, *weight, A, B, magnitude, bias, norm, scaling, dropout_p, seed, _ = inputs
    ctx.save_for_backward(x, *output[1:], *weight[:5], A, B, magnitude, bias, norm, seed)
    ctx.arguments = (weight[5:], scaling, dropout_p)


def _autograd(ctx, dy, _dz, _dxa):
    x, z, xa, *weight, A, B, magnitude, bias, norm, seed = ctx.saved_tensors
    sizes, scaling, dropout_p = ctx.arguments
    needed = ctx.needs_input_grad
    needs = [*needed[:2], *needed[8:12]]
    arguments = (*weight, *sizes, A, B, magnitude, bias, norm, scaling, dropout_p, seed, needs)
    grads = iter(_op_backward(dy, x, z, xa, *arguments))
    dx, dweight, *others = (next(grads) if need else None for need in needs)
    return dx, dweight, *[None] * 6, *others, None, None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
