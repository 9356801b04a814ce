"""BottleneckAdapter: down to few features, an activation, up again, added to what goes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.ops import bottleneck
from fastpeft.reference.bottleneck import ACTIVATIONS

NORMS = ("none", "before", "after")


class BottleneckAdapter(nn.Module):
    """`y = residual + scaling * (act(x D^T + b_d) U^T + b_u)`, the residual x itself or what forward is given.

    features: of x and y. r: of the bottleneck, at least 1. activation: relu, gelu, gelu_tanh or silu. norm: a layer
    norm "before" the first product, "after" the scaling, or "none". dtype: of the trainable parameters; products run in
    x's type (autocast's where it is on). `down` starts as `nn.Linear` does, `up` at zero, so the adapter starts as the
    residual; with a norm after it, the norm's weight starts at zero instead.

    Raises ValueError for another rank, activation or norm. Source: Houlsby et al., 2019
    (https://arxiv.org/abs/1902.00751); He et al., 2022 (https://arxiv.org/abs/2110.04366).
    """

    def __init__(
        self,
        features: int,
        r: int = 64,
        activation: str = "relu",
        scaling: float = 1.0,
        norm: str = "none",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if r < 1:
            raise ValueError(f"r is {r}; it must be at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {', '.join(ACTIVATIONS)}")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; allowed are {', '.join(NORMS)}")
        self.activation, self.scaling, self.place_of_norm = activation, scaling, norm
        self.down = nn.Linear(features, r, device=device, dtype=dtype)
        self.up = nn.Linear(r, features, device=device, dtype=dtype)
        self.norm = None if norm == "none" else nn.LayerNorm(features, device=device, dtype=dtype)
        if norm == "after":
            nn.init.zeros_(self.norm.weight)
        else:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [..., features] -> the same shape. residual: x where it is None."""
        residual = x if residual is None else residual
        if self.place_of_norm == "before":
            x = self._normalized(x)
        after = self.place_of_norm == "after"
        y = bottleneck(
            x,
            self.down.weight,
            self.up.weight,
            self.down.bias,
            self.up.bias,
            residual=None if after else residual,
            activation=self.activation,
            scaling=self.scaling,
        )
        return residual + self._normalized(y).to(residual.dtype) if after else y

    def _normalized(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        return nn.functional.layer_norm(x, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, scaling={self.scaling}, norm={self.place_of_norm}"
