"""(IA)^3 in peft's on-disk format; `save_adapter` and `load_adapter` call these."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.nn.convert import convert
from fastpeft.nn.frozen import is_conv1d, is_supported, weight_of
from fastpeft.nn.ia3 import IA3Linear

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.ia3_l")
# Settings of peft's IA3Config that say nothing else than the tensors do; a file with any other one on is refused.
_KNOWN = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "feedforward_modules"),
    *("inference_mode", "init_ia3_weights", "peft_type", "peft_version", "revision", "target_modules", "task_type"),
}


def ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, IA3Linear)}


def ia3_state(model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and tensors that peft would write: l is [1, K] where it scales the input, else [N, 1]."""
    layers = ia3_layers(model)
    tensors = {
        f"base_model.model.{name}.ia3_l": layer.ia3_l.detach().view((1, -1) if layer.feedforward else (-1, 1)).clone()
        for name, layer in layers.items()
    }
    config = {
        "peft_type": "IA3",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "feedforward_modules": sorted(name for name, layer in layers.items() if layer.feedforward),
        "inference_mode": True,
        "init_ia3_weights": True,
        "target_modules": sorted(layers),
        "task_type": None,
    }
    return config, tensors


def load_ia3(model: nn.Module, config: dict, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """As `load_adapter`. Raises ValueError, before the model is touched, for what does not fit it."""
    odd = [key for key, value in config.items() if value and key not in _KNOWN]
    if odd:
        raise ValueError(f"{path} is not a plain (IA)^3 adapter ({', '.join(odd)})")
    matches = {key: _KEY.fullmatch(key) for key in tensors}
    if not matches or not all(matches.values()):
        odd = sorted(key for key, match in matches.items() if match is None)
        raise ValueError(f"{path} should hold vectors of (IA)^3; it holds {', '.join(odd[:3]) or 'nothing'}")
    vectors = {matches[key]["module"]: tensor for key, tensor in tensors.items()}
    layers = ia3_layers(model)
    if layers and set(layers) != set(vectors):
        odd = sorted(set(layers) ^ set(vectors))
        raise ValueError(f"{path} and the model adapt different modules; only one of them has {', '.join(odd[:3])}")
    modules, feedforward = dict(model.named_modules(remove_duplicate=False)), {}
    for name, vector in vectors.items():
        base = layers[name].base if layers else modules.get(name)
        if base is None or not is_supported(base):
            raise ValueError(f"{path} adapts {name}, which the model has not, or not as a supported linear")
        if layers and layers[name].merged:
            raise ValueError(f"{name} is merged; unmerge it before an adapter is loaded")
        N, K = weight_of(base).shape
        allowed = {(1, K): True, (N, 1): False}
        if layers:
            allowed = {shape: kind for shape, kind in allowed.items() if kind == layers[name].feedforward}
        if tuple(vector.shape) not in allowed or not vector.is_floating_point():
            raise ValueError(f"{path}: {name} has a vector {tuple(vector.shape)} {vector.dtype}; "
                             f"the model needs {' or '.join(map(str, allowed))}, floating point")  # fmt: skip
        feedforward[name] = allowed[tuple(vector.shape)]
    if not layers:
        names = {modules[name]: name for name in vectors}

        def make(linear: nn.Module) -> IA3Linear:
            name = names[linear]
            return IA3Linear(linear, feedforward[name], dtype=vectors[name].dtype)

        convert(model, make, "|".join(re.escape(name) for name in vectors))
        layers = ia3_layers(model)
    with torch.no_grad():
        for name, vector in vectors.items():
            layers[name].ia3_l.copy_(vector.flatten())
    return list(vectors)
