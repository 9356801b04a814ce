"""peft's (IA)^3 layers with a fused forward, by a change of class; and a merge into 4 bits, which peft has not."""

from __future__ import annotations

from peft.import_utils import is_bnb_4bit_available
from peft.tuners import ia3
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn

from fastpeft.expected import attributes, find
from fastpeft.expected import why_not as why_not_feature
from fastpeft.integrations import bypass
from fastpeft.nn.ia3 import ia3_forward, restore_scaled, scale_weight

__all__ = ["IA3Layer", "accelerate_ia3", "restore_ia3", "why_not_ia3"]


check_adapters_to_merge = find("ia3", "peft.tuners.tuners_utils:check_adapters_to_merge")


def why_not_ia3(layer: IA3Layer) -> str | None:
    """Why `layer` keeps peft's forward; None where it can be fused."""
    if type(layer) not in _FUSED and not isinstance(layer, _FusedIA3):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not supported"
    reason = why_not_feature("ia3") or attributes(
        layer, "ia3_l", "is_feedforward", "_disable_adapters", "merged_adapters", "active_adapters"
    )
    if reason is not None:
        return reason
    return bypass.why_not(layer.base_layer)


def accelerate_ia3(layer: IA3Layer) -> None:
    layer.__class__ = _FUSED.get(type(layer), type(layer))


def restore_ia3(model: nn.Module) -> None:
    """Undoes `accelerate_ia3` in all of `model`; what was merged into 4 bits is unmerged, since peft would not know."""
    for module in model.modules():
        if isinstance(module, _FusedIA3):
            if module.merged and hasattr(module, "_before_merge"):
                module.unmerge()
            module.__class__ = _STOCK[type(module)]


class _FusedIA3:
    """The fused forward; peft's class follows it in the order of inheritance and serves every other call."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self._modules["base_layer"]
        ia3_l = None if args or kwargs else self._active_l()
        if ia3_l is None or not bypass.can_bypass(base, x):
            return super().forward(x, *args, **kwargs)
        return ia3_forward(base, x, ia3_l, self.is_feedforward)

    def _active_l(self) -> Tensor | None:
        """The product of the active adapters' vectors; None where only peft's forward will do."""
        if self._disable_adapters or self.merged_adapters:
            return None
        vectors, product = self._modules["ia3_l"]._parameters, None
        for name in self.active_adapters:
            vector = vectors.get(name)
            if vector is not None:
                if not bypass.is_plain(vector):
                    return None
                product = vector.flatten() if product is None else product * vector.flatten()
        return product


class FusedIA3Linear(_FusedIA3, ia3.Linear):
    """peft's `ia3.Linear` with the fused forward."""


_FUSED: dict[type, type] = {ia3.Linear: FusedIA3Linear}

if is_bnb_4bit_available():

    class FusedIA3Linear4bit(_FusedIA3, ia3.Linear4bit):
        """peft's `ia3.Linear4bit` with the fused forward, `merge` and `unmerge`; peft's own cannot be merged."""

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            if self.merged_adapters:
                if not self._disable_adapters:
                    return self.base_layer(x, *args, **kwargs)
                self.unmerge()
            return super().forward(x, *args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Dequantized, scaled and quantized again; ValueError, always, when the result is not finite."""
            base = self.base_layer
            for name in check_adapters_to_merge(self, adapter_names):
                if name in self.ia3_l:
                    before = (base.weight, base.bias)
                    scale_weight(base, self.ia3_l[name].flatten(), self.is_feedforward)
                    if not self.merged_adapters:
                        self._before_merge = [before]  # in a list, else they would count as parameters
                    self.merged_adapters.append(name)

        def unmerge(self) -> None:
            """Bit for bit what was there before `merge`."""
            if self.merged_adapters:
                restore_scaled(self.base_layer, *self._before_merge.pop())
                del self._before_merge
                self.merged_adapters.clear()

    _FUSED[ia3.Linear4bit] = FusedIA3Linear4bit

_STOCK = {fused: stock for stock, fused in _FUSED.items()}
