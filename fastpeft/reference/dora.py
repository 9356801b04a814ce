"""The formulas of `dora_norm` and `dora_linear`. Source: Liu et al., "DoRA", 2024 (https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.reference.dropout import keep_mask
from fastpeft.reference.nf4 import nf4_dequantize


def dora_norm(weight, A, B, scaling) -> Tensor:
    """`||W[n] + scaling * B[n] A||` -> [N]; arguments as in `fastpeft.ops.dora_norm`.

    Everything is computed in float32, or in the widest dtype of the arguments where that is wider; detached.
    """
    wide = norm_dtype(weight, A, B)
    weight = weight.detach().to(wide) if isinstance(weight, Tensor) else nf4_dequantize(weight, wide)
    return torch.linalg.vector_norm(weight + scaling * (B.detach().to(wide) @ A.detach().to(wide)), dim=1)


def norm_dtype(weight, A: Tensor, B: Tensor) -> torch.dtype:
    """float32, or float64 where one of the tensors is; a 4-bit weight is float32."""
    dense = weight.dtype if isinstance(weight, Tensor) else torch.float32
    for dtype in (A.dtype, B.dtype, torch.float32):
        dense = torch.promote_types(dense, dtype)
    return dense


def dora_divisor(norm: Tensor) -> Tensor:
    """What the magnitude is divided by: the norm, or infinity where it is zero, so that gain and gradient are 0 there.

    Zero means below the square root of the smallest normal number: there a sum of squares has lost its digits.
    """
    return norm.masked_fill(norm < torch.finfo(norm.dtype).tiny ** 0.5, torch.inf)


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """`magnitude / norm`, 0 where the norm is zero; [N] in the wider dtype of the two, at least float32."""
    return magnitude.to(torch.promote_types(magnitude.dtype, norm.dtype)) / dora_divisor(norm)


def dora_linear(x, weight, A, B, magnitude, scaling, bias=None, *, norm=None, dropout_p=0.0, seed=None) -> Tensor:
    """`y = x W^T + bias + (g - 1) * xd W^T + g * scaling * (xd A^T) B^T`, g = magnitude / norm, xd = dropout(x).

    Without dropout this is `g * x (W + scaling B A)^T + bias`. Arguments as in `fastpeft.ops.dora_linear`. Products are
    computed in x's dtype, the gain and what it multiplies in at least float32. `seed` is required, as a 0-d int64
    tensor, when dropout_p > 0.
    """
    gain = dora_gain(magnitude, dora_norm(weight, A, B, scaling) if norm is None else norm)
    if not isinstance(weight, Tensor):
        weight = nf4_dequantize(weight, x.dtype)
    base = dropped_base = x @ weight.t()
    dropped = x
    if dropout_p > 0:
        rows = x.numel() // x.shape[-1]
        keep = keep_mask(seed, rows, x.shape[-1], dropout_p).view(x.shape)
        dropped = x * keep / (1 - dropout_p)
        dropped_base = dropped @ weight.t()
    low_rank = scaling * (dropped @ A.to(x.dtype).t() @ B.to(x.dtype).t())
    y = base + ((gain - 1) * dropped_base + gain * low_rank)
    return (y if bias is None else y + bias).to(x.dtype)
