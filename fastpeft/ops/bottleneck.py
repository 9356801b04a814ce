"""bottleneck: down to few features, an activation, up again, scaled and added, forward and backward."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import backend as backends
from fastpeft.ops.bottleneck_backends import OPAQUE_RULES, RUNNERS, choose
from fastpeft.ops.lora_linear import _FLOATS, _as_matrix, _describe, autocast_dtype
from fastpeft.reference.bottleneck import ACTIVATIONS
from fastpeft.reference.bottleneck import bottleneck as _reference

_RULES = OPAQUE_RULES | {"reference": backends.always}


def bottleneck(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    scaling: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`y = residual + scaling * (act(x D^T + b_d) U^T + b_u)`.

    x: [..., K] bf16|fp16|fp32|fp64, any strides. down: [R, K], up: [N, R], down_bias: [R], up_bias: [N] or None, each
    of any float dtype (the master copy may be float32); cast to the compute type, gradients return in their own.
    residual: [..., N] of x's dtype, x itself, or None. activation: relu, gelu (exact), gelu_tanh or silu. scaling: a
    number.

    Compute type: x's dtype, or autocast's where it is on; products accumulate in float32. Returns [..., N] in the
    compute type. Saved for backward: x, the pre-activation x D^T + b_d [..., R] and the parameters as they are. Where
    the residual is x itself its gradient is added in the product that makes the other one. Differentiable once with
    respect to all tensors.

    Raises ValueError (shapes, devices, names, an unable backend) or TypeError (dtypes) before anything is computed.
    Source: Houlsby et al., 2019 (https://arxiv.org/abs/1902.00751); scaled and parallel: He et al., 2022
    (https://arxiv.org/abs/2110.04366).
    """
    adds_x = residual is x
    autocast = autocast_dtype(x)
    if autocast is not None and x.dtype != torch.float64:
        x = x.to(autocast)
        residual = None if adds_x or residual is None else residual.to(autocast)
    if adds_x:
        residual = None
    _check(x, down, up, down_bias, up_bias, residual, adds_x, activation, scaling)
    arguments = (x, down, up, down_bias, up_bias, residual, adds_x, activation, float(scaling))
    if torch.compiler.is_compiling() and backend != "reference":
        # The backend is chosen when the op runs: use_backend is invisible to the tracer.
        return torch.ops.fastpeft.bottleneck(*arguments, backend)[0]
    name = choose(x, down, backend, _RULES)
    if name == "reference":
        options = dict(residual=x if adds_x else residual, activation=activation, scaling=scaling)
        return _reference(x, down, up, down_bias, up_bias, **options)
    return BottleneckFn.apply(*arguments, RUNNERS[name])


def _check(x, down, up, down_bias, up_bias, residual, adds_x, activation, scaling) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}")
    if not isinstance(scaling, int | float):
        raise TypeError(f"scaling is {scaling!r}; it must be a number")
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"down is {tuple(down.shape)} and up is {tuple(up.shape)}; they must be [R, K] and [N, R]")
    (R, K), N = down.shape, up.shape[0]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x is {tuple(x.shape)}, but down is [{R}, {K}]: the last dimension of x must be {K}")
    for name, bias, size in (("down_bias", down_bias, R), ("up_bias", up_bias, N)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} is {_describe(bias)}; it must be ({size},)")
    shape = (*x.shape[:-1], N)
    if adds_x and N != K:
        raise ValueError(f"the residual is x {tuple(x.shape)}; up makes {N} features of it")
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {_describe(residual)}; it must be {shape} {x.dtype}")
    tensors = {"x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}; allowed are {', '.join(map(str, _FLOATS))}")


class BottleneckFn(torch.autograd.Function):
    """The autograd node of `bottleneck`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, x, down, up, down_bias, up_bias, residual, adds_x, activation, scaling, runner):
        shape = x.shape
        x = _as_matrix(x)
        added = x if adds_x else None if residual is None else _as_matrix(residual)
        y, pre = runner.forward(x, down, up, down_bias, up_bias, added, activation, scaling)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, pre, down, up, down_bias, up_bias)
            ctx.arguments = (shape, adds_x, activation, scaling, runner)
        # Not a view: autograd forbids in-place operations on a view that a Function returns.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, pre, *parameters = ctx.saved_tensors
        shape, adds_x, activation, scaling, runner = ctx.arguments
        needs = ctx.needs_input_grad[:5]
        # All dtypes are settled: an autocast that is on in backward, but was off in forward, must not mix in.
        guard = torch.autocast(dy.device.type, enabled=False) if autocast_dtype(dy) is not None else nullcontext()
        with guard:
            grads = runner.backward(_as_matrix(dy), x, pre, *parameters, adds_x, activation, scaling, needs)
        if grads[0] is not None:
            grads[0] = grads[0].view(shape)
        return *grads, dy if ctx.needs_input_grad[5] else None, None, None, None, None


# The same computation as a torch.library op: one opaque node in a compiled graph.

_PARAMETERS = "Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias"


@torch.library.custom_op(
    "fastpeft::bottleneck",
    mutates_args=(),
    schema=f"(Tensor x, {_PARAMETERS}, Tensor? residual, bool adds_x, str activation, float scaling, str? backend)"
    " -> (Tensor, Tensor)",
)
def _op(x, down, up, down_bias, up_bias, residual, adds_x, activation, scaling, backend):
    runner = RUNNERS[choose(x, down, backend)]
    flat = _as_matrix(x)
    added = flat if adds_x else None if residual is None else _as_matrix(residual)
    y, pre = runner.forward(flat, down, up, down_bias, up_bias, added, activation, scaling)
    return y.view(*x.shape[:-1], up.shape[0]), pre


@_op.register_fake
def _(x, down, up, down_bias, up_bias, residual, adds_x, activation, scaling, backend):
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(rows, down.shape[0])


@torch.library.custom_op(
    "fastpeft::bottleneck_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor pre, {_PARAMETERS}, bool adds_x, str activation, float scaling,"
    " str? backend, bool[] needs) -> Tensor[]",
)
def _op_backward(dy, x, pre, down, up, down_bias, up_bias, adds_x, activation, scaling, backend, needs):
    runner = RUNNERS[choose(x, down, backend)]
    parameters = (down, up, down_bias, up_bias)
    grads = runner.backward(_as_matrix(dy), _as_matrix(x), pre, *parameters, adds_x, activation, scaling, needs)
    if grads[0] is not None:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None]


@_op_backward.register_fake
def _(dy, x, pre, down, up, down_bias, up_bias, adds_x, activation, scaling, backend, needs):
    like = (x, down, up, down_bias, up_bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(like, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, *parameters, _, adds_x, activation, scaling, backend = inputs
    ctx.save_for_backward(x, output[1], *parameters)
    ctx.arguments = (adds_x, activation, scaling, backend)


def _autograd(ctx, dy, _dpre):
    needs = list(ctx.needs_input_grad[:5])
    grads = iter(_op_backward(dy, *ctx.saved_tensors, *ctx.arguments, needs) if any(needs) else ())
    dresidual = dy if ctx.needs_input_grad[5] else None
    return *(next(grads) if need else None for need in needs), dresidual, None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
