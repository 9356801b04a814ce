"""The formula of `lora_linear`. Source: Hu et al., "LoRA", 2021 (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from torch import Tensor

from fastpeft.reference.dropout import keep_mask
from fastpeft.reference.nf4 import nf4_dequantize


def lora_linear(x, weight, A, B, scaling, bias=None, *, dropout_p=0.0, seed=None) -> Tensor:
    """`y = x W^T + bias + scaling * (dropout(x) A^T) B^T`; arguments as in `fastpeft.ops.lora_linear`.

    Everything is computed in x's dtype. `seed` is required, as a 0-d int64 tensor, when dropout_p > 0.
    """
    if not isinstance(weight, Tensor):
        weight = nf4_dequantize(weight, x.dtype)
    dropped = x
    if dropout_p > 0:
        rows = x.numel() // x.shape[-1]
        keep = keep_mask(seed, rows, x.shape[-1], dropout_p).view(x.shape)
        dropped = x * keep / (1 - dropout_p)
    y = x @ weight.t() + scaling * (dropped @ A.to(x.dtype).t() @ B.to(x.dtype).t())
    return y if bias is None else y + bias
