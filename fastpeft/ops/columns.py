"""The columns of a 16-bit matrix times a float32 vector, forward and backward, in one pass each and mixed types.

Written with torch's arithmetic, such a product makes float32 copies of the matrix. A batch norm of mean 0 and variance
1 is the same product, bit for bit, and so is its backward; PyTorch has both in mixed types.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_columns(x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gain[c] * x[m, c] + bias[c]`, in gain's dtype and rounded once to x's.

    x: [M, C]. gain: [C], x's dtype or float32. bias: [C], any float dtype, or None.
    """
    if x.dtype == gain.dtype or x.numel() == 0:  # a batch norm of nothing divides by zero
        return (x * gain if bias is None else torch.addcmul(bias.to(gain.dtype), x, gain)).to(x.dtype)
    zeros, ones = torch.zeros_like(gain), torch.ones_like(gain)
    bias = zeros if bias is None else bias.to(gain.dtype)
    return torch.batch_norm(x, gain, bias, zeros, ones, False, 0.0, 0.0, False)


def scale_columns_backward(
    dy: Tensor, x: Tensor | None, gain: Tensor, need_dx: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """`gain * dy` in dy's dtype, None without need_dx; and `sum over m of dy * x`, [C] in gain's dtype, None without x.

    dy, x: [M, C] of one dtype.
    """
    if x is None:
        return scale_columns(dy, gain) if need_dx else None, None
    if dy.dtype == gain.dtype or dy.numel() == 0:
        return scale_columns(dy, gain) if need_dx else None, (dy * x).sum(0, dtype=gain.dtype)
    zeros, ones = torch.zeros_like(gain), torch.ones_like(gain)
    backward = torch.ops.aten.native_batch_norm_backward
    dx, sums, _ = backward(dy.contiguous(), x, gain, zeros, ones, None, None, False, 0.0, (need_dx, True, False))
    return (dx if need_dx else None), sums
