"""The products of the ops: torch's, and where a CPU has no instructions for a half type the same in float32.

There torch multiplies half types in a scalar loop. Instead tiles of both factors are converted, multiplied and summed
in float32, and a tile of the result is rounded once. Nothing of float32 outlives the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastpeft.backend import HALF_TYPES
from fastpeft.cpu import multiplies_natively

# Of each factor and of the result: 12 MB of float32 in all. A converted element then serves 1024 multiplications.
_TILE = 1024


def _widens(t: Tensor) -> bool:
    return t.dtype in HALF_TYPES and t.device.type == "cpu" and not multiplies_natively(t.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`: [M, K] and [N, K] of one dtype, bias [N] of that too -> [M, N]."""
    if not _widens(x):
        return functional.linear(x, weight, bias)
    return _in_float32(x.new_empty(len(x), len(weight)), x, weight.t(), added=bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`a b`: [M, K] and [K, N] of one dtype -> [M, N]."""
    return _in_float32(a.new_empty(len(a), b.shape[1]), a, b) if _widens(a) else torch.mm(a, b)


def addmm(added: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """`added + alpha * a b`: [M, N], [M, K] and [K, N] of one dtype -> [M, N]."""
    if not _widens(a):
        return torch.addmm(added, a, b, alpha=alpha)
    return _in_float32(a.new_empty(len(a), b.shape[1]), a, b, alpha, added)


def addmm_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """`addmm` into y itself, [M, N]."""
    return _in_float32(y, a, b, alpha, y) if _widens(a) else y.addmm_(a, b, alpha=alpha)


def _in_float32(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, added: Tensor | None = None) -> Tensor:
    """Writes `added + alpha * a b` into `out` and returns it. added: [N], [M, N], `out` itself or None."""
    (M, K), N = a.shape, b.shape[1]
    for m in range(0, M, _TILE):
        for n in range(0, N, _TILE):
            into = out[m : m + _TILE, n : n + _TILE]
            if added is None:
                tile = torch.zeros(into.shape)
            else:
                part = added[n : n + _TILE] if added.dim() == 1 else added[m : m + _TILE, n : n + _TILE]
                tile = torch.empty(into.shape).copy_(part)
            for k in range(0, K, _TILE):
                # In place: autocast would make 16 bits of the factors of `addmm`.
                tile.addmm_(_float32(a[m : m + _TILE, k : k + _TILE]), _float32(b[k : k + _TILE, n : n + _TILE]),
                            alpha=alpha)  # fmt: skip
            into.copy_(tile)
    return out


def _float32(t: Tensor) -> Tensor:
    return t.to(torch.float32)
