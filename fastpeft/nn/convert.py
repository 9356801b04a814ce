"""convert: puts an adapter module around each matching linear of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from fastpeft.nn.frozen import is_supported
from fastpeft.nn.ia3 import IA3Linear
from fastpeft.nn.lora import LoRALinear

_ADAPTERS = (LoRALinear, IA3Linear)


def convert(
    model: nn.Module, make: Callable[[nn.Module], nn.Module], target_modules: str | Sequence[str] = "all-linear"
) -> list[str]:
    """Replaces each matching linear by `make(linear)`, in place, and freezes every parameter outside of an adapter.

        convert(model, lambda linear: LoRALinear(linear, r=16), ["q_proj", "v_proj"])

    target_modules: as in peft: a list of names or of their last parts, a regular expression for the whole name, or
    "all-linear", which is every supported linear but the output embedding. Returns the names of the replaced modules.

    Raises ValueError when nothing matches, a match is not a supported linear or peft has been here, and whatever
    `make` raises; then the model is as it was.
    """
    if any(type(module).__module__.startswith("peft.tuners") for module in model.modules()):
        raise ValueError("the model has adapters of peft already; fastpeft.accelerate makes them fast")
    names = _matching(model, target_modules)
    adapters = [module for module in model.modules() if isinstance(module, _ADAPTERS)]
    adapting = {parameter for adapter in adapters for parameter in adapter.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad and p not in adapting]
    made: dict[nn.Module, nn.Module] = {}  # a module with two names (tied) keeps one adapter
    try:
        for name in names:
            linear = model.get_submodule(name)
            if linear not in made:
                made[linear] = make(linear).train(linear.training)
        replacements = {name: made[model.get_submodule(name)] for name in names}
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for parameter in trainable:
        parameter.requires_grad_(False)
    for name, module in replacements.items():
        model.set_submodule(name, module)
    return names


def _matching(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    adapters = [adapter for adapter in modules.values() if isinstance(adapter, _ADAPTERS)]
    inside = {child for adapter in adapters for child in adapter.modules()}
    candidates = {name: module for name, module in modules.items() if name and module not in inside}
    if target_modules == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name, module in candidates.items() if is_supported(module) and module is not output]
    elif isinstance(target_modules, str):
        names = [name for name in candidates if re.fullmatch(target_modules, name)]
    else:
        names = [name for name in candidates if any(f".{name}".endswith(f".{target}") for target in target_modules)]
    if not names:
        raise ValueError(f"target_modules {target_modules!r} matches no module of the model")
    for name in names:
        if not is_supported(candidates[name]):
            raise ValueError(f"target_modules matches {name}, a {type(candidates[name]).__name__}; "
                             "supported are nn.Linear, Conv1D and 4-bit linears")  # fmt: skip
    return names
