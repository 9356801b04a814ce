"""LoRALinear: a frozen linear layer with a trainable low-rank update."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastpeft.nn import frozen


class LoRALinear(nn.Module):
    """`y = base(x) + scaling * dropout(x) A^T B^T`, scaling = alpha / r, or alpha / sqrt(r) with rslora.

    base: `nn.Linear`, transformers' `Conv1D` or bitsandbytes' `Linear4bit` (nf4); frozen here, and kept as the
    submodule `base`. r: rank, at least 1. alpha: default 2 * r. dropout: in [0, 1), on the low-rank path, in training.
    dtype: of the trainable matrices, whatever the base has; products run in the base's type (autocast's where it is
    on). `lora_A.weight` [r, K] starts as `nn.Linear` does, `lora_B.weight` [N, r] at zero, so the layer starts as base.

    Raises ValueError for an unsupported base, rank or dropout. Source: Hu et al., "LoRA", 2021
    (https://arxiv.org/abs/2106.09685); rslora: Kalajdzievski, 2023 (https://arxiv.org/abs/2312.03732).
    """

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not frozen.is_supported(base):
            raise ValueError(f"base is a {type(base).__name__}; supported are nn.Linear, Conv1D and 4-bit linears")
        if r < 1:
            raise ValueError(f"r is {r}; it must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")
        N, K = frozen.weight_of(base).shape
        self.r, self.rslora, self.dropout = r, rslora, dropout
        self.alpha = 2 * r if alpha is None else alpha
        self.base = base
        frozen.freeze(base)
        device = base.weight.device
        self.lora_A = nn.Linear(K, r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, N, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.lora_B.weight)
        self._unmerged: list[nn.Parameter] = []  # in a list, else it would count as a parameter of this module

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N] in the dtype that the base alone would return."""
        if self.merged:
            return self.base(x)
        dropout_p = self.dropout if self.training else 0.0
        return frozen.lora_forward(self.base, x, self.lora_A.weight, self.lora_B.weight, self.scaling, dropout_p)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """`scaling * B A`, [N, K] float32."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def merge(self) -> float:
        """Adds the update to the base's weight, so that forward is the base alone; for inference.

        A 4-bit base stays 4-bit: dequantized, added, quantized again. The weight that it replaces is kept, so that
        `unmerge` gives it back bit for bit; `unload` drops it. Returns what rounding lost: the error of the new
        weight relative to the update's norm (for 4 bits it can exceed the update itself).

        Raises RuntimeError when merged already, ValueError when the sum is not finite.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already")
        before = self.base.weight
        lost = frozen.add_to_weight(self.base, self.delta_weight())
        self._unmerged = [before]
        return lost

    def unmerge(self) -> None:
        """Gives the base the weight back that it had before `merge`. Raises RuntimeError when it is not merged."""
        if not self.merged:
            raise RuntimeError("the adapter is not merged")
        frozen.restore_weight(self.base, self._unmerged.pop())

    def unload(self) -> nn.Module:
        """Merges where that is not done yet, and returns the base: the layer without its adapter."""
        if not self.merged:
            self.merge()
        self._unmerged.clear()
        return self.base

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}"
