"""accelerate / restore: peft's own modules with a fused forward, by a change of class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastpeft import expected
from fastpeft.cpu import advise_float32
from fastpeft.integrations import bypass
from fastpeft.integrations.bitsandbytes import close_cpu_trap, reopen_cpu_trap
from fastpeft.integrations.dora import MAGNITUDES, VARIANTS, make_finite, restore_stock
from fastpeft.integrations.ia3 import IA3Layer, accelerate_ia3, restore_ia3, why_not_ia3
from fastpeft.integrations.peft_prefix import accelerate_prefix, prefix_reasons, restore_prefix
from fastpeft.integrations.peft_prompt import accelerate_prompt, prompt_reasons, restore_prompt
from fastpeft.integrations.transformers import fuse_loss, restore_loss
from fastpeft.nn import frozen, norm_cache
from fastpeft.nn.dora import dora_forward


@dataclass(frozen=True)
class Row:
    """One adapter module: its name in the model, "fused" or "peft" (left as it was), and why it was left."""

    name: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `accelerate` did to each adapter module; prints as a table, iterates over its rows."""

    rows: list[Row] = field(default_factory=list)
    loss: bool = False  # the causal language model's loss runs without a float32 copy of the logits

    @property
    def fused(self) -> int:
        """Number of fused adapter modules."""
        return sum(row.status == "fused" for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [6])
        lines = [f"{row.name:<{width}}  {row.status:<6}  {row.reason}".rstrip() for row in self.rows]
        header = f"{'module':<{width}}  status  reason"
        return "\n".join([header, *lines, self.summary])

    @property
    def summary(self) -> str:
        """The last line of the table."""
        loss = ", and so is the loss" if self.loss else ""
        return f"{self.fused} of {len(self)} adapter modules are fused{loss}"


def accelerate(model: nn.Module, *, strict: bool = False, fold: bool = False) -> Report:
    """Gives each LoRA, DoRA and (IA)^3 linear of a peft model the fused forward, in place; undone by `restore`.

    model: any module that contains peft layers. Parameters, state-dict keys, trainable flags and peft's own methods
    stay as they are; layers that are not understood, and calls that are not plain (several active adapters, merged,
    disabled, mixed batches), run peft's forward. A model that is reloaded has peft's classes again. The stock loss of
    a causal language model gives way to one of the same value that makes no float32 copy of the logits. 4-bit layers
    of bitsandbytes are kept from repacking themselves on a CPU, which would spoil later gradients. Where peft's DoRA
    gives NaN, for a row of zeros and when a magnitude of zero is unmerged, the result is finite. Models with a prefix
    or a prompt (prefix tuning, prompt tuning, P-Tuning, multitask prompt tuning) get calls of their own.

    fold: of LoRA, where dropout is 0 or off, multiply with `W + scaling * B A`, rounded once, instead of adding the
    update to the output (`ops.lora_linear`'s `fold`; there is what it costs in accuracy).

    Returns a Report that names every adapter module, whether it is fused and if not why. Raises ValueError for a
    4-bit weight that is repacked already and, with strict=True, when no module can be fused; then nothing is changed.
    """
    expected.warn_of_uncovered()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    rows = []
    for name, layer in layers:
        reason = _why_not(layer)
        rows.append(Row(name, "fused") if reason is None else Row(name, "peft", reason))
    for name, reason in (prefix_reasons(model) | prompt_reasons(model)).items():
        rows.append(Row(name, "fused") if reason is None else Row(name, "peft", reason))
    if strict and not Report(rows).fused:
        raise ValueError(f"no adapter module of this model can be fused\n{Report(rows)}")
    advise_float32(model)
    close_cpu_trap(model)
    loss = fuse_loss(model)
    accelerate_prefix(model)
    accelerate_prompt(model)
    for (_, layer), row in zip(layers, rows, strict=False):  # rows of prefixes and prompts come after those of layers
        if row.status == "fused" and isinstance(layer, IA3Layer):
            accelerate_ia3(layer)
        elif row.status == "fused":
            layer.__class__ = _FUSED.get(type(layer), type(layer))
            layer._fold = fold
            make_finite(layer)
    norm_cache.forget()
    return Report(rows, loss=loss)


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every module has peft's class again, the model its loss."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = _STOCK[type(module)]
            del module._fold
            restore_stock(module)
    restore_ia3(model)
    restore_prefix(model)
    restore_prompt(model)
    restore_loss(model)
    reopen_cpu_trap(model)


def _why_not(layer: BaseTunerLayer) -> str | None:
    if isinstance(layer, IA3Layer):
        return why_not_ia3(layer)
    if type(layer) not in _FUSED and not isinstance(layer, _Fused):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not supported"
    reason = expected.why_not("lora") or expected.attributes(layer, *_ATTRIBUTES) or bypass.why_not(layer.base_layer)
    if reason is not None:
        return reason
    if any(type(variant) in VARIANTS for variant in layer.lora_variant.values()):
        reason = expected.why_not("dora")
        if reason is not None:
            return reason
    if layer.lora_A and not any(_is_understood(layer, name) for name in layer.lora_A):
        variants = {type(variant).__name__.removesuffix("LinearVariant") for variant in layer.lora_variant.values()}
        return f"the adapter is a variant: {', '.join(sorted(variants)) or 'lora_bias'}"
    return None


def _is_understood(layer: BaseTunerLayer, adapter: str) -> bool:
    """Plain LoRA or DoRA."""
    variant = layer.lora_variant.get(adapter)
    return (variant is None or type(variant) in VARIANTS) and not layer.lora_bias.get(adapter)


class _Fused:
    """The fused forward; peft's class follows it in the order of inheritance and serves every other call."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        parts = None if args or kwargs else self._parts_to_fuse(x)
        if parts is None:
            return super().forward(x, *args, **kwargs)
        base, lora_A, lora_B, magnitude, dropout, scaling = parts
        dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        if magnitude is None:
            return frozen.lora_forward(base, x, lora_A.weight, lora_B.weight, scaling, dropout_p, self._fold)
        factors = (lora_A.weight, lora_B.weight, magnitude.weight)
        return dora_forward(base, x, *factors, scaling, dropout_p, self.training)

    def update_layer(self, *args, **kwargs) -> None:
        """peft adds an adapter."""
        super().update_layer(*args, **kwargs)
        make_finite(self)

    def _parts_to_fuse(self, x: Tensor) -> tuple | None:
        """(base, lora_A, lora_B, magnitude, dropout, scaling) of the one adapter that this call uses, the magnitude
        None for LoRA; None where only peft's forward will do. It runs at every call, so it reads the dicts of the
        modules directly."""
        if self._disable_adapters or self.merged_adapters:
            return None
        children = self._modules
        adapters = children["lora_A"]._modules
        active = self._active_adapter
        if not isinstance(active, str):
            active = [name for name in active if name in adapters]
            if len(active) != 1:
                return None
            active = active[0]
        if active not in adapters or not _is_understood(self, active):
            return None
        base, lora_A = children["base_layer"], adapters[active]
        lora_B, dropout = children["lora_B"]._modules[active], children["lora_dropout"]._modules[active]
        # A wrapped child (FSDP gives it a class of its own) must be called, not read.
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or type(dropout) not in _DROPOUTS:
            return None
        if not (bypass.is_plain(lora_A.weight) and bypass.is_plain(lora_B.weight)) or getattr(dropout, "p", 0.0) >= 1:
            return None
        if bypass.is_hooked(lora_A) or bypass.is_hooked(lora_B) or bypass.is_hooked(dropout):
            return None
        magnitude = None
        if active in self.lora_variant:
            magnitude = children["lora_magnitude_vector"]._modules[active]
            if type(magnitude) not in MAGNITUDES or not bypass.is_plain(magnitude.weight):
                return None
            if bypass.is_hooked(magnitude):
                return None
        if not bypass.can_bypass(base, x):
            return None
        return base, lora_A, lora_B, magnitude, dropout, self.scaling[active]


# What the fused forward reads of a LoRA layer of peft.
_ATTRIBUTES = (
    "lora_A", "lora_B", "lora_dropout", "lora_variant", "lora_bias", "lora_magnitude_vector", "scaling", "base_layer",
    "_disable_adapters", "_active_adapter", "merged_adapters",
)  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Identity)


class FusedLinear(_Fused, lora.Linear):
    """peft's `lora.Linear` with the fused forward."""


_FUSED: dict[type, type] = {lora.Linear: FusedLinear}

if is_bnb_4bit_available():

    class FusedLinear4bit(_Fused, lora.Linear4bit):
        """peft's `lora.Linear4bit` with the fused forward."""

    _FUSED[lora.Linear4bit] = FusedLinear4bit

_STOCK = {fused: stock for stock, fused in _FUSED.items()}
