"""IA3Linear: a frozen linear layer with a trainable factor for each feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.nn import frozen
from fastpeft.ops import ia3_linear
from fastpeft.quant import NF4Weight


def ia3_forward(base: nn.Module, x: Tensor, ia3_l: Tensor, feedforward: bool) -> Tensor:
    """`l * base(x)`, or with feedforward `base(l * x)`, fused; x: [..., K] -> [..., N] in the dtype of the base."""
    return frozen.in_type_of(
        base, x, lambda x, weight: ia3_linear(x, weight, ia3_l, base.bias, feedforward=feedforward)
    )


@torch.no_grad()
def scale_weight(base: nn.Module, ia3_l: Tensor, feedforward: bool) -> float:
    """Multiplies the rows of weight and bias by l, with feedforward the columns; parameters are replaced, not written.

    Returns what rounding lost, as `frozen.add_to_weight` does. Raises ValueError when the product is not finite.
    """
    weight = frozen.weight_of(base)
    dense = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()
    gain = ia3_l.float()
    bias = None if base.bias is None or feedforward else base.bias * gain
    if bias is not None and not torch.isfinite(bias).all():
        raise ValueError("the merged bias is not finite; the adapter seems to be broken")
    lost = frozen.add_to_weight(base, dense * ((gain - 1) if feedforward else (gain - 1).unsqueeze(1)))
    if bias is not None:
        base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
    return lost


def restore_scaled(base: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Undoes `scale_weight`: `weight` and `bias` are the parameters that it replaced."""
    frozen.restore_weight(base, weight)
    if bias is not None:
        bias.data = bias.data.to(base.bias)
        base.bias = bias


class IA3Linear(nn.Module):
    """`y = l * base(x)`, or with feedforward `y = base(l * x)`: (IA)^3.

    base: `nn.Linear`, transformers' `Conv1D` or bitsandbytes' `Linear4bit` (nf4); frozen here, and kept as the
    submodule `base`. feedforward: scale the input, as the method does before a feed-forward's last layer; else the
    output, as for keys and values. dtype: of the trainable vector `ia3_l`, [K] with feedforward, else [N]; it starts
    with ones, so the layer starts as base.

    Raises ValueError for an unsupported base. Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning", 2022
    (https://arxiv.org/abs/2205.05638).
    """

    def __init__(self, base: nn.Module, feedforward: bool = False, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not frozen.is_supported(base):
            raise ValueError(f"base is a {type(base).__name__}; supported are nn.Linear, Conv1D and 4-bit linears")
        N, K = frozen.weight_of(base).shape
        self.feedforward = feedforward
        self.base = base
        frozen.freeze(base)
        self.ia3_l = nn.Parameter(torch.ones(K if feedforward else N, device=base.weight.device, dtype=dtype))
        self._unmerged: list[tuple] = []

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N] in the dtype that the base alone would return."""
        return self.base(x) if self.merged else ia3_forward(self.base, x, self.ia3_l, self.feedforward)

    def merge(self) -> float:
        """Multiplies the base's weight, and bias, by l, so that forward is the base alone; for inference.

        A 4-bit base stays 4-bit: dequantized, scaled, quantized again. `unmerge` gives back what was there, bit for
        bit; `unload` drops it. Returns what rounding lost: the error of the new weight relative to the change.

        Raises RuntimeError when merged already, ValueError when the product is not finite.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already")
        before = (self.base.weight, self.base.bias)
        lost = scale_weight(self.base, self.ia3_l, self.feedforward)
        self._unmerged = [before]
        return lost

    def unmerge(self) -> None:
        """Gives the base back what it had before `merge`. Raises RuntimeError when it is not merged."""
        if not self.merged:
            raise RuntimeError("the adapter is not merged")
        restore_scaled(self.base, *self._unmerged.pop())

    def unload(self) -> nn.Module:
        """Merges where that is not done yet, and returns the base: the layer without its adapter."""
        if not self.merged:
            self.merge()
        self._unmerged.clear()
        return self.base

    def extra_repr(self) -> str:
        return f"feedforward={self.feedforward}, merged={self.merged}"
