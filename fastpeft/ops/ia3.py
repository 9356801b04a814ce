"""ia3_linear: a frozen linear layer, dense or 4-bit, with a trained factor for each feature, forward and backward."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.backend import Row
from fastpeft.ops.columns import scale_columns, scale_columns_backward
from fastpeft.ops.lora_linear import _FLOATS, _WEIGHT, _as_matrix, _describe, _flatten, _unflatten, autocast_dtype
from fastpeft.ops.lora_linear_backends import dense
from fastpeft.ops.products import linear, mm
from fastpeft.quant import NF4Weight
from fastpeft.reference.ia3 import ia3_linear as _reference


def ia3_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    ia3_l: Tensor,
    bias: Tensor | None = None,
    *,
    feedforward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`y = l * (x W^T + bias)`, or with feedforward `y = (l * x) W^T + bias`.

    x: [..., K] bf16|fp16|fp32|fp64, any strides. weight: [N, K] in x's dtype, or an NF4Weight, dequantized to it.
    ia3_l: [N], with feedforward [K], any float dtype; values may be zero. bias: [N] or None. The method scales the
    outputs of keys and values, and the inputs of a feed-forward's last layer.

    Compute type: x's dtype, or autocast's where it is on; l multiplies in float32, without a float32 copy of x or y.
    Returns [..., N] in the compute type. Saved for backward: x W^T + bias, with feedforward x instead, and the
    parameters as they are. Differentiable once with respect to x, ia3_l, bias and a dense weight.

    Raises ValueError (shapes, devices, an unable backend) or TypeError (dtypes) before anything is computed.
    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning", 2022 (https://arxiv.org/abs/2205.05638).
    """
    autocast = autocast_dtype(x)
    if autocast is not None and x.dtype != torch.float64:
        x = x.to(autocast)
    _check(x, weight, ia3_l, bias, feedforward, autocast is not None)
    training = torch.is_grad_enabled() and (x.requires_grad or ia3_l.requires_grad)
    if torch.compiler.is_compiling() and backend != "reference":
        # The backend is chosen when the op runs: use_backend is invisible to the tracer.
        return torch.ops.fastpeft.ia3_linear(x, *_flatten(weight), ia3_l, bias, feedforward, backend)[0]
    name = _choose(x, weight, training, backend, _RULES)
    if name == "reference":
        return _reference(x, weight, ia3_l, bias, feedforward=feedforward)
    return Ia3LinearFn.apply(x, weight, ia3_l, bias, feedforward, _RUNNERS[name])


def _check(x, weight, ia3_l, bias, feedforward, autocast) -> None:
    if not isinstance(weight, Tensor | NF4Weight) or len(weight.shape) != 2:
        raise TypeError(f"weight must be a tensor [N, K] or an NF4Weight; got {_describe(weight)}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x is {tuple(x.shape)}, but weight is [{N}, {K}]: the last dimension of x must be {K}")
    features = K if feedforward else N
    if ia3_l.shape != (features,):
        raise ValueError(f"ia3_l is {_describe(ia3_l)}; for a weight of [{N}, {K}] and feedforward={feedforward} "
                         f"it must be ({features},)")  # fmt: skip
    if bias is not None and (bias.shape != (N,) or not bias.is_floating_point() or bias.device != x.device):
        raise ValueError(f"bias is {_describe(bias)}; it must be ({N},), floating point, on {x.device}")
    if x.dtype not in _FLOATS or not ia3_l.is_floating_point():
        raise TypeError(f"x is {x.dtype}, ia3_l is {ia3_l.dtype}; both must be floating point")
    if isinstance(weight, Tensor) and weight.dtype != x.dtype and not (autocast and weight.is_floating_point()):
        raise TypeError(f"x is {x.dtype}, but weight is {weight.dtype}: cast one of them, or use torch.autocast")
    if weight.device != x.device or ia3_l.device != x.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}, ia3_l on {ia3_l.device}")


# Backends: how columns are scaled. The product with the weight is PyTorch's in each of them, after a dequantization.


class _Eager:
    """PyTorch operations; any device and dtype."""

    scale = staticmethod(scale_columns)
    scale_backward = staticmethod(scale_columns_backward)


class _Triton:
    """One kernel reads dy once for the scaled dy and for the sums."""

    @staticmethod
    def scale(x: Tensor, gain: Tensor) -> Tensor:
        return _Triton.scale_backward(x, None, gain)[0]

    @staticmethod
    def scale_backward(dy, x, gain, need_dx=True) -> tuple[Tensor | None, Tensor | None]:
        from fastpeft.triton_kernels import ia3 as kernels

        dy, x = dy.contiguous(), None if x is None else x.contiguous()
        dx = torch.empty_like(dy) if need_dx else None
        sums = None if x is None else torch.zeros_like(gain)
        if dy.numel() and (need_dx or x is not None):
            with _native.stream_on(dy.device):
                kernels.scale_columns(dy, x, gain, dx, sums)
        return dx, sums


_RUNNERS = {"triton": _Triton, "eager": _Eager}

TABLE = (
    Row("triton", reason="dy is read once for dx and for the gradient of l; forward is one pass in mixed types"),
    Row("eager", dtypes=None, capability=(0, 0), reason="float32, float64, older GPUs, CPUs"),
)


def _needs_16_bits(x: Tensor) -> str | None:
    return None if x.dtype in backends.HALF_TYPES else f"x is {x.dtype}; the kernel takes bf16 and fp16"


_OPAQUE_RULES = {"triton": lambda x: _needs_16_bits(x) or backends.needs_triton(x), "eager": backends.always}
_RULES = _OPAQUE_RULES | {"reference": backends.always}


def _choose(x: Tensor, weight: Tensor | NF4Weight, training: bool, backend: str | None, rules=_OPAQUE_RULES) -> str:
    order = None
    if x.is_cuda:
        storage = "nf4" if type(weight) is NF4Weight else "dense"
        order = backends.preferred(TABLE, x, math.prod(x.shape[:-1]), storage, training)
    return backends.choose("ia3_linear", rules, x, backend=backend, order=order)


def _gain(ia3_l: Tensor, dtype: torch.dtype) -> Tensor:
    return ia3_l.detach().to(torch.promote_types(dtype, torch.float32)).contiguous()


def _forward(x, weight, ia3_l, bias, feedforward, runner) -> tuple[Tensor, Tensor | None]:
    """x: [M, K]. Returns y [M, N] and x W^T + bias, None with feedforward."""
    gain, bias = _gain(ia3_l, x.dtype), None if bias is None else bias.to(x.dtype)
    if feedforward:
        return linear(runner.scale(x, gain), dense(weight, x.dtype), bias), None
    product = linear(x, dense(weight, x.dtype), bias)
    return runner.scale(product, gain), product


def _backward(dy, x, product, weight, ia3_l, bias, feedforward, runner, needs) -> list[Tensor | None]:
    """dy: [M, N]. Gradients of (x, weight, ia3_l, bias), None where `needs` is False.

    The gradient of l is the sum of what l multiplied with what comes back: l is never divided by, and may be zero.
    """
    need_x, need_weight, need_l, need_bias = needs
    gain = _gain(ia3_l, dy.dtype)
    dx = dweight = dl = dbias = None
    if feedforward:
        if need_x or need_l:
            dscaled = mm(dy, dense(weight, dy.dtype))
            dx, dl = runner.scale_backward(dscaled, x if need_l else None, gain, need_x)
        if need_weight:
            dweight = mm(dy.t(), runner.scale(x, gain))
    else:
        need_product = need_x or need_weight
        dproduct, dl = runner.scale_backward(dy, product if need_l else None, gain, need_product)
        if need_x:
            dx = mm(dproduct, dense(weight, dy.dtype))
        if need_weight:
            dweight = mm(dproduct.t(), x)
    if need_weight:
        dweight = dweight.to(weight.dtype)
    if need_l:
        dl = dl.to(ia3_l.dtype)
    if need_bias:
        dbias = dy.sum(0, dtype=gain.dtype)
        dbias = (dbias if feedforward else dbias * gain).to(bias.dtype)
    return [dx, dweight, dl, dbias]


class Ia3LinearFn(torch.autograd.Function):
    """The autograd node of `ia3_linear`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, x, weight, ia3_l, bias, feedforward, runner):
        shape = x.shape
        x = _as_matrix(x)
        y, product = _forward(x, weight, ia3_l, bias, feedforward, runner)
        if any(ctx.needs_input_grad):
            _, need_weight, need_l, _ = ctx.needs_input_grad[:4]
            # A 4-bit weight is frozen and never written in place: kept as it is, outside of autograd's bookkeeping.
            tensor = weight if isinstance(weight, Tensor) else None
            ctx.nf4 = weight if tensor is None else None
            kept_x = x if need_weight or (feedforward and need_l) else None
            ctx.save_for_backward(kept_x, product if need_l else None, tensor, ia3_l, bias)
            ctx.arguments = (shape, feedforward, runner)
        # Not a view: autograd forbids in-place operations on a view that a Function returns.
        return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, product, weight, ia3_l, bias = ctx.saved_tensors
        shape, feedforward, runner = ctx.arguments
        weight = ctx.nf4 if weight is None else weight
        dy = _as_matrix(dy)
        # All dtypes are settled: an autocast that is on in backward, but was off in forward, must not mix in.
        guard = torch.autocast(dy.device.type, enabled=False) if autocast_dtype(dy) is not None else nullcontext()
        with guard:
            needs = ctx.needs_input_grad[:4]
            grads = _backward(dy, x, product, weight, ia3_l, bias, feedforward, runner, needs)
        if grads[0] is not None:
            grads[0] = grads[0].view(shape)
        return *grads, None, None


# The same computation as a torch.library op: one opaque node in a compiled graph.


@torch.library.custom_op(
    "fastpeft::ia3_linear",
    mutates_args=(),
    schema=f"(Tensor x, {_WEIGHT}, Tensor ia3_l, Tensor? bias, bool feedforward, str? backend) -> (Tensor, Tensor)",
)
def _op(x, *arguments):
    *storage, ia3_l, bias, feedforward, backend = arguments
    weight = _unflatten(*storage)
    runner = _RUNNERS[_choose(x, weight, True, backend)]
    y, product = _forward(_as_matrix(x), weight, ia3_l, bias, feedforward, runner)
    return y.view(*x.shape[:-1], y.shape[-1]), y.new_empty(0, 0) if product is None else product


@_op.register_fake
def _(x, *arguments):
    *storage, ia3_l, bias, feedforward, backend = arguments
    N = storage[5][0]
    product = (0, 0) if feedforward else (math.prod(x.shape[:-1]), N)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(product)


@torch.library.custom_op(
    "fastpeft::ia3_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor product, {_WEIGHT}, Tensor ia3_l, Tensor? bias, bool feedforward,"
    " str? backend, bool[] needs) -> Tensor[]",
)
def _op_backward(dy, x, product, *arguments):
    *storage, ia3_l, bias, feedforward, backend, needs = arguments
    weight = _unflatten(*storage)
    runner = _RUNNERS[_choose(x, weight, True, backend)]
    grads = _backward(_as_matrix(dy), _as_matrix(x), product, weight, ia3_l, bias, feedforward, runner, needs)
    if grads[0] is not None:
        grads[0] = grads[0].view(x.shape)
    return [grad for grad in grads if grad is not None]


@_op_backward.register_fake
def _(dy, x, product, *arguments):
    *storage, ia3_l, bias, feedforward, backend, needs = arguments
    like = (x, storage[0], ia3_l, bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(like, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, *storage, ia3_l, bias, feedforward, backend = inputs
    ctx.save_for_backward(x, output[1], *storage[:5], ia3_l, bias)
    ctx.arguments = (*storage[5:], feedforward, backend)


def _autograd(ctx, dy, _dproduct):
    x, product, *storage, ia3_l, bias = ctx.saved_tensors
    shape, blocksize, feedforward, backend = ctx.arguments
    needed = ctx.needs_input_grad
    needs = [*needed[:2], *needed[8:10]]
    arguments = (*storage, shape, blocksize, ia3_l, bias, feedforward, backend, needs)
    grads = iter(_op_backward(dy, x, product, *arguments))
    dx, dweight, dl, dbias = (next(grads) if need else None for need in needs)
    return dx, dweight, *[None] * 6, dl, dbias, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
