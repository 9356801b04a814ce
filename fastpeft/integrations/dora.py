"""peft's own DoRA code, made finite: rows of zeros, and merging where the gain is zero."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import Tensor

from fastpeft.expected import Absent, find, parameters
from fastpeft.nn import norm_cache
from fastpeft.reference.dora import dora_divisor

DoraLinearLayer = find("dora", "peft.tuners.lora.dora:DoraLinearLayer")
DoraLinearVariant = find("dora", "peft.tuners.lora.variants:DoraLinearVariant")
dequantize_module_weight = find("dora", "peft.utils.integrations:dequantize_module_weight")
if DoraLinearVariant is not Absent:
    parameters("dora", DoraLinearVariant.merge_safe, "module", "active_adapter", "orig_weight")
    parameters("dora", DoraLinearVariant.unmerge, "module", "active_adapter", "orig_weight")


class FiniteMagnitude(DoraLinearLayer):
    """peft divides the magnitude by what `get_weight_norm` returns: here never by zero."""

    def get_weight_norm(self, *args, **kwargs) -> Tensor:
        return dora_divisor(super().get_weight_norm(*args, **kwargs))


class FiniteDora(DoraLinearVariant):
    """peft unmerges by a division by the gain: the rows where that is zero are kept aside while merged."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        norm_cache.forget()
        merged = DoraLinearVariant.merge_safe(module, active_adapter, orig_weight)
        gain = module.lora_magnitude_vector[active_adapter].weight / module._caches[f"{active_adapter}-weight_norm"]
        lost = (gain == 0).nonzero().view(-1)
        weight = dequantize_module_weight(module.get_base_layer()).detach()
        module._cache_store(f"{active_adapter}-lost", (lost, weight.index_select(_rows_of(module), lost)))
        return merged

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = FiniteDora.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        norm_cache.forget()
        # peft's formula; its own forgets up to 0.20 that a Conv1D holds its weight transposed.
        norm = module._cache_pop(f"{active_adapter}-weight_norm")
        gain = module.lora_magnitude_vector[active_adapter].weight / norm
        gain = gain.view(1, -1) if _rows_of(module) else gain.view(-1, 1)
        weight = (orig_weight.data / gain - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)
        kept = module._caches.pop(f"{active_adapter}-lost", None)  # None: peft merged it, before `accelerate`
        return weight if kept is None else weight.index_copy(_rows_of(module), kept[0], kept[1].to(weight.dtype))


def _rows_of(module: LoraLayer) -> int:
    """The dimension of the out features, in the storage of the weight."""
    return 1 if getattr(module, "fan_in_fan_out", False) else 0


_FINITE = {DoraLinearLayer: FiniteMagnitude, DoraLinearVariant: FiniteDora}
_STOCK = {finite: stock for stock, finite in _FINITE.items()}

VARIANTS = (DoraLinearVariant, FiniteDora)
MAGNITUDES = (DoraLinearLayer, FiniteMagnitude)


def make_finite(layer: LoraLayer) -> None:
    """By a change of class, as `accelerate` does it."""
    _change_classes(layer, _FINITE)


def restore_stock(layer: LoraLayer) -> None:
    """Undoes `make_finite`."""
    _change_classes(layer, _STOCK)


def _change_classes(layer: LoraLayer, classes: dict[type, type]) -> None:
    for part in (*layer.lora_variant.values(), *layer.lora_magnitude_vector.values()):
        part.__class__ = classes.get(type(part), type(part))
