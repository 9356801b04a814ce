"""The formula of `ia3_linear`. Source: Liu et al., "(IA)3", 2022 (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.reference.nf4 import nf4_dequantize


def ia3_linear(x, weight, ia3_l, bias=None, *, feedforward=False) -> Tensor:
    """`y = l * (x W^T + bias)`, with feedforward `(l * x) W^T + bias`; arguments as in `fastpeft.ops.ia3_linear`.

    The product is computed in x's dtype; l multiplies in at least float32, and the result is rounded to x's dtype.
    """
    gain = ia3_l.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(weight, Tensor):
        weight = nf4_dequantize(weight, x.dtype)
    if feedforward:
        x = (x * gain).to(x.dtype)
    y = x @ weight.t()
    if bias is not None:
        y = y + bias
    return y if feedforward else (y * gain).to(x.dtype)
