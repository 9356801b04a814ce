"""How each backend computes bottleneck, arguments checked already, and which one is chosen.

x: [M, K] and dy: [M, N], one dtype, the compute type. `added`: the residual [M, N], or None. `pre`: the pre-activation
x D^T + b_d [M, R], rounded to the compute type; forward goes on with the rounded one, so that backward, which makes the
activation anew, finds what forward used. `needs`: which gradients of (x, down, up, down_bias, up_bias) are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.backend import Row
from fastpeft.ops.products import addmm, linear, mm
from fastpeft.reference.bottleneck import ACTIVATIONS

MOST_RANKS = 256  # the Triton kernel keeps all of a token's in registers

TABLE = (
    Row(
        "eager",
        tokens=2048,
        reason="a program of the kernel takes 64 tokens and all features: too few for the SMs of an H100",
    ),
    Row("triton", reason="x and dy are read once for both products, and nothing is written between them"),
    Row("eager", dtypes=None, capability=(0, 0), reason="float32, float64, wide bottlenecks, older GPUs, CPUs"),
)


def _triton_can(x: Tensor, down: Tensor) -> str | None:
    if x.dtype not in backends.HALF_TYPES:
        return f"x is {x.dtype}; the kernels take bf16 and fp16"
    if not 0 < down.shape[0] <= MOST_RANKS:
        return f"down has {down.shape[0]} rows; the kernels take up to {MOST_RANKS}"
    return backends.needs_triton(x)


OPAQUE_RULES = {"triton": _triton_can, "eager": backends.always}


def choose(x: Tensor, down: Tensor, backend: str | None, rules=OPAQUE_RULES) -> str:
    """The backend's name; x: [..., K]."""
    order = None
    if x.is_cuda:
        order = backends.preferred(TABLE, x, x.numel() // max(1, x.shape[-1]), "dense", True)
    return backends.choose("bottleneck", rules, x, down, backend=backend, order=order)


def _wide(bias: Tensor) -> torch.dtype:
    return torch.promote_types(bias.dtype, torch.float32)


class Eager:
    """PyTorch operations; any device and dtype."""

    @staticmethod
    def forward(x, down, up, down_bias, up_bias, added, activation, scaling) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        down_bias, up_bias = (None if bias is None else bias.to(dtype) for bias in (down_bias, up_bias))
        pre = linear(x, down.to(dtype), down_bias)
        y = linear(ACTIVATIONS[activation](pre), up.to(dtype), up_bias)
        return (y.mul_(scaling) if added is None else torch.add(added, y, alpha=scaling)), pre

    @staticmethod
    def backward(dy, x, pre, down, up, down_bias, up_bias, adds_x, activation, scaling, needs) -> list[Tensor | None]:
        need_x, need_down, need_up, need_down_bias, need_up_bias = needs
        dtype = dy.dtype
        dx = ddown = dup = ddown_bias = dup_bias = None
        if need_x or need_down or need_down_bias:
            dpre = _activation_backward(mm(dy, up.to(dtype)).mul_(scaling), pre, activation)
        if need_x:
            dx = addmm(dy, dpre, down.to(dtype)) if adds_x else mm(dpre, down.to(dtype))
        if need_down:
            ddown = mm(dpre.t(), x).to(down.dtype)
        if need_up:
            # a^T dy is the faster order on a CPU; the small result is transposed while it is cast.
            dup = torch.empty_like(up, memory_format=torch.contiguous_format)
            dup.copy_(mm(ACTIVATIONS[activation](pre).t(), dy).t()).mul_(scaling)
        if need_down_bias:
            ddown_bias = dpre.sum(0, dtype=_wide(down_bias)).to(down_bias.dtype)
        if need_up_bias:
            dup_bias = dy.sum(0, dtype=_wide(up_bias)).mul_(scaling).to(up_bias.dtype)
        return [dx, ddown, dup, ddown_bias, dup_bias]


def _activation_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, pre, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, pre)
    return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh" if activation == "gelu_tanh" else "none")


class Triton:
    """One kernel for the two products of a direction, and one for the gradients of a factor."""

    @staticmethod
    def forward(x, down, up, down_bias, up_bias, added, activation, scaling) -> tuple[Tensor, Tensor]:
        x, added = x.contiguous(), None if added is None else added.contiguous()
        (M, _), N, R = x.shape, up.shape[0], down.shape[0]
        y, pre = x.new_empty(M, N), x.new_empty(M, R)
        if y.numel() or pre.numel():
            factors = down.to(x.dtype).contiguous(), up.to(x.dtype).contiguous()
            with _native.stream_on(x.device):
                _triton().bottleneck_fwd(x, *factors, down_bias, up_bias, added, activation, scaling, y, pre)
        return y, pre

    @staticmethod
    def backward(dy, x, pre, down, up, down_bias, up_bias, adds_x, activation, scaling, needs) -> list[Tensor | None]:
        need_x, need_down, need_up, need_down_bias, need_up_bias = needs
        dy = dy.contiguous()
        (M, N), (R, K) = dy.shape, down.shape
        dx = ddown = dup = ddown_bias = dup_bias = None
        with _native.stream_on(dy.device):
            if any(needs):
                dpre, hidden, dx = dy.new_empty(M, R), dy.new_empty(M, R), dy.new_empty(M, K) if need_x else None
                if M:
                    factors = up.to(dy.dtype).contiguous(), down.to(dy.dtype).contiguous()
                    added = dy if adds_x else None
                    _triton().bottleneck_bwd(dy, pre, *factors, added, activation, scaling, dpre, hidden, dx)
            if need_down:
                ddown = dy.new_zeros(R, K, dtype=torch.float32)
                if M and ddown.numel():
                    _triton().bottleneck_grad(dpre, x.contiguous(), 1.0, ddown)
                ddown = ddown.to(down.dtype)
            if need_down_bias:
                ddown_bias = dpre.sum(0, dtype=_wide(down_bias)).to(down_bias.dtype)
            if need_up or need_up_bias:
                # The last row: the sums of dy.
                rows = dy.new_zeros(R + 1, N, dtype=torch.float32)
                if M and N:
                    _triton().bottleneck_grad(hidden, dy, scaling, rows)
                dup = rows[:R].t().to(up.dtype).contiguous() if need_up else None
                dup_bias = rows[R].to(up_bias.dtype) if need_up_bias else None
        return [dx, ddown, dup, ddown_bias, dup_bias]


def _triton():
    from fastpeft.triton_kernels import bottleneck

    return bottleneck


RUNNERS = {"triton": Triton, "eager": Eager}
