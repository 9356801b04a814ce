"""DoRALinear: a frozen linear layer with a trainable low-rank update and a trainable length of each row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.nn import frozen, norm_cache
from fastpeft.nn.lora import LoRALinear
from fastpeft.ops import dora_linear, dora_norm, lora_linear
from fastpeft.reference.dora import dora_gain

_DECODE_TOKENS = 64  # up to here a call is bound by reading the weight, and the gain is worth folding into it


def dora_forward(
    base: nn.Module,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float | Tensor,
    dropout_p: float,
    training: bool,
) -> Tensor:
    """`dora_linear` over `base`, with the norm of `norm_cache`; x: [..., K] -> [..., N] in the dtype of the base."""

    def call(x: Tensor, weight) -> Tensor:
        decoding = not (training or torch.is_grad_enabled()) and x.numel() <= _DECODE_TOKENS * x.shape[-1]
        if decoding and not torch.compiler.is_compiling() and norm_cache.can_fold(weight):
            weight, gained_B = norm_cache.folded(base, A, B, magnitude, scaling)
            return lora_linear(x, weight, A, gained_B, 1.0, base.bias)
        norm = norm_cache.norm(base, A, B, scaling)
        return dora_linear(x, weight, A, B, magnitude, scaling, base.bias, norm=norm, dropout_p=dropout_p)

    return frozen.in_type_of(base, x, call)


class DoRALinear(LoRALinear):
    """`y = magnitude * (W + scaling * B A) / ||W + scaling * B A|| x + bias`, the norms by row and without gradient.

    Arguments, and what `merge`, `unmerge` and `unload` do, as in LoRALinear. The trainable
    `lora_magnitude_vector.weight`, [N] float32, starts as the norms of the base's rows, so the layer starts as the
    base. With dropout a part of the base's product sees the dropped x, as in peft (`fastpeft.ops.dora_linear`). A row
    of zeros gives the bias, not NaN.

    Source: Liu et al., "DoRA", 2024 (https://arxiv.org/abs/2402.09353).
    """

    def __init__(self, base: nn.Module, r: int = 16, alpha: float | None = None, dropout: float = 0.0, **options):
        super().__init__(base, r, alpha, dropout, **options)
        norm = dora_norm(frozen.weight_of(base), self.lora_A.weight, self.lora_B.weight, self.scaling)
        self.lora_magnitude_vector = _Magnitude(norm)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N] in the dtype that the base alone would return."""
        if self.merged:
            return self.base(x)
        dropout_p = self.dropout if self.training else 0.0
        factors = (self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector.weight)
        return dora_forward(self.base, x, *factors, self.scaling, dropout_p, self.training)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """`gain * (W + scaling * B A) - W`, [N, K] float32."""
        weight = frozen.weight_of(self.base)
        norm = dora_norm(weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
        gain = dora_gain(self.lora_magnitude_vector.weight, norm).unsqueeze(1)
        dense = weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
        return gain * (dense + super().delta_weight()) - dense


class _Magnitude(nn.Module):
    """A module, as peft has it: FSDP and its like manage parameters by module."""

    def __init__(self, magnitude: Tensor):
        super().__init__()
        self.weight = nn.Parameter(magnitude)
