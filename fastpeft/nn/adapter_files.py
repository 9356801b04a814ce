"""save_adapter, load_adapter: peft's on-disk format, a safetensors file and a JSON file."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.nn.convert import convert
from fastpeft.nn.dora import DoRALinear
from fastpeft.nn.frozen import is_conv1d, is_supported, weight_of
from fastpeft.nn.ia3_files import ia3_layers, ia3_state, load_ia3
from fastpeft.nn.lora import LoRALinear

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Of A and B the parameter is named, of DoRA's magnitude its module.
_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
_KEY = re.compile(rf"base_model\.model\.(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS.values()))})")

# Settings of peft's LoraConfig that LoRALinear understands, or that do not change what a saved adapter means. A file
# with any other setting switched on is refused, as one with settings of a later peft must be.
_KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules"),
    *("task_type", "use_dora", "use_rslora"),
}
# Initializations that leave the base weight alone; the others (pissa, olora, loftq...) belong to a changed base.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into the folder `path`, as peft would.

    model: with LoRALinear, DoRALinear or IA3Linear modules (see `convert`), or a PeftModel, whose active adapter peft
    writes. Each file is written under a temporary name and renamed.

    Raises ValueError when there is no adapter, or when the layers differ in dropout, rslora or DoRA, which the format
    cannot hold.
    """
    path = Path(path)
    if _is_peft_model(model):
        _save_peft(model, path)
        return
    if ia3_layers(model):
        if _lora_layers(model):
            raise ValueError("the model has LoRALinear and IA3Linear modules; an adapter file holds one method")
        _save(path, *ia3_state(model))
        return
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRALinear and no IA3Linear; make them with fastpeft.convert")
    config = _config(model, layers)
    tensors = {}
    for name, layer in layers.items():
        for part, key in _PARTS.items():
            if hasattr(layer, part):
                weight = getattr(layer, part).weight
                tensors[f"base_model.model.{name}.{key}"] = weight.detach().cpu().contiguous()
    _save(path, config, tensors)


def _save(path: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    _write(path / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _write(path / _CONFIG, lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Loads a LoRA, DoRA or (IA)^3 adapter from the folder `path`, written by peft or fastpeft; returns the adapted
    modules.

    model: without adapters, then the modules that the file names are wrapped as by `convert`; or with LoRALinear,
    DoRALinear or IA3Linear modules, then the file must name the same ones, for LoRA and DoRA with the same ranks, and
    its alpha takes the place of theirs.

    Raises ValueError, before the model is touched, for a file that is missing, not safetensors, malformed, of another
    method or for a changed base, or that does not fit the model; TypeError for a PeftModel, which loads adapters
    itself. Nothing is unpickled.
    """
    path = Path(path)
    if _is_peft_model(model):
        raise TypeError("this is a PeftModel: use model.load_adapter(path, adapter_name) of peft")
    config, tensors = _read(path)
    if config.get("peft_type") == "IA3":
        return load_ia3(model, config, tensors, path)
    _check_meaning(config, path)
    factors = _factors(tensors, bool(config.get("use_dora")), path)
    layers = _lora_layers(model)
    _check_fit(model, layers, factors, path)
    settings = {name: _settings(config, name, parts["lora_A"].shape[0], path) for name, parts in factors.items()}
    if not layers:
        names = {model.get_submodule(name): name for name in factors}

        def make(linear: nn.Module) -> LoRALinear:
            alpha, rslora = settings[names[linear]]
            A = factors[names[linear]]["lora_A"]
            dropout = config.get("lora_dropout", 0.0)
            kind = DoRALinear if config.get("use_dora") else LoRALinear
            return kind(linear, A.shape[0], alpha, dropout, rslora=rslora, dtype=A.dtype)

        convert(model, make, "|".join(re.escape(name) for name in factors))
        layers = _lora_layers(model)
    with torch.no_grad():
        for name, parts in factors.items():
            for part, tensor in parts.items():
                getattr(layers[name], part).weight.copy_(tensor)
            layers[name].alpha, layers[name].rslora = settings[name]
    return list(factors)


def _is_peft_model(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict:
    dropout = {layer.dropout for layer in layers.values()}
    rslora = {layer.rslora for layer in layers.values()}
    dora = {isinstance(layer, DoRALinear) for layer in layers.values()}
    if len(dropout) > 1 or len(rslora) > 1 or len(dora) > 1:
        raise ValueError(f"the layers differ in dropout {sorted(dropout)}, rslora {sorted(rslora)} or DoRA "
                         f"{sorted(dora)}; an adapter file holds one of each")  # fmt: skip
    ranks = [layer.r for layer in layers.values()]
    alphas = [layer.alpha for layer in layers.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {re.escape(name): layer.r for name, layer in layers.items() if layer.r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {re.escape(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "lora_dropout": dropout.pop(),
        "use_dora": dora.pop(),
        "use_rslora": rslora.pop(),
        "target_modules": sorted(layers),
        "task_type": None,
    }


def _check_meaning(config: dict, path: Path) -> None:
    """The file is a plain LoRA or DoRA adapter, and its settings are of the right kinds."""
    odd = [key for key, value in config.items() if value and key not in _KNOWN]
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        odd.append(f"bias {config['bias']!r}")
    if odd:
        raise ValueError(f"{path} is not a plain LoRA or DoRA adapter ({', '.join(odd)})")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"{path} was trained with init_lora_weights={config['init_lora_weights']!r}, which changes the base weight "
            "too: load it with peft, or let peft save it with path_initial_model_for_weight_conversion"
        )
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout is {dropout!r}; it must be in [0, 1)")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise ValueError(f"{path}: {key} is {pattern!r}; it must map patterns to numbers")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _settings(config: dict, name: str, rank: int, path: Path) -> tuple[float, bool]:
    """(alpha, rslora) of the module `name`, whose matrices have rank `rank`."""

    def of_module(setting: str, pattern: str):
        for key, value in (config.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", name):  # the end of a name, as in peft
                    return value
            except re.error as error:
                raise ValueError(f"{path}: {pattern} has the key {key!r}: {error}") from error
        return config.get(setting)

    alpha = of_module("lora_alpha", "alpha_pattern")
    if not _is_number(alpha):
        raise ValueError(f"{path}: lora_alpha is {alpha!r}; it must be a number")
    if of_module("r", "rank_pattern") != rank:
        raise ValueError(f"{path}: {name} has rank {rank}, its configuration says {of_module('r', 'rank_pattern')!r}")
    return alpha, bool(config.get("use_rslora"))


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (path / _WEIGHTS).is_file() or not (path / _CONFIG).is_file():
        pickled = (path / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle and is not loaded, save it again as safetensors" if pickled else ""
        raise ValueError(f"{path} holds no {_WEIGHTS} and {_CONFIG}{hint}")
    try:
        config = json.loads((path / _CONFIG).read_text())
        tensors = load_file(path / _WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / _CONFIG} is not a JSON object")
    return config, tensors


def _factors(tensors: dict[str, Tensor], dora: bool, path: Path) -> dict[str, dict[str, Tensor]]:
    """Module -> part -> tensor, as in `_PARTS`."""
    names = {key: part for part, key in _PARTS.items()}
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: {key} is not the name of a LoRA matrix")
        factors.setdefault(match["module"], {})[names[match["part"]]] = tensor
    wanted = set(_PARTS) if dora else {"lora_A", "lora_B"}
    for name, parts in factors.items():
        if set(parts) != wanted:
            raise ValueError(f"{path}: {name} has only {', '.join(sorted(parts))}" if wanted - set(parts) else
                             f"{path}: {name} has a lora_magnitude_vector, but use_dora is off")  # fmt: skip
    if not factors:
        raise ValueError(f"{path} holds no LoRA matrix")
    return factors


def _check_fit(model: nn.Module, layers: dict[str, LoRALinear], factors: dict, path: Path) -> None:
    if layers and set(layers) != set(factors):
        odd = sorted(set(layers) ^ set(factors))
        raise ValueError(f"{path} and the model adapt different modules; only one of them has {', '.join(odd[:3])}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parts in factors.items():
        if layers and layers[name].merged:
            raise ValueError(f"{name} is merged; unmerge it before an adapter is loaded")
        if layers and isinstance(layers[name], DoRALinear) != ("lora_magnitude_vector" in parts):
            raise ValueError(f"{name} is a {type(layers[name]).__name__}, but {path} has {', '.join(sorted(parts))}")
        base = layers[name].base if layers else modules.get(name)
        if base is None or not is_supported(base):
            raise ValueError(f"{path} adapts {name}, which the model has not, or not as a supported linear")
        N, K = weight_of(base).shape
        A, B = parts["lora_A"], parts["lora_B"]
        rank = layers[name].r if layers else A.shape[0]
        if tuple(A.shape) != (rank, K) or tuple(B.shape) != (N, rank):
            raise ValueError(f"{path}: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}; "
                             f"the model needs [{rank}, {K}] and [{N}, {rank}]")  # fmt: skip
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None and tuple(magnitude.shape) != (N,):
            raise ValueError(f"{path}: {name} has a magnitude of {tuple(magnitude.shape)}; the model needs [{N}]")
        if not all(tensor.is_floating_point() for tensor in parts.values()):
            raise ValueError(f"{path}: {name} is {', '.join(str(t.dtype) for t in parts.values())}, not floating point")


def _save_peft(model, path: Path) -> None:
    active = model.active_adapter
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=path) as temporary:
        model.save_pretrained(temporary, selected_adapters=[active])
        written = Path(temporary) if active == "default" else Path(temporary, active)  # so does peft
        for name in (_WEIGHTS, _CONFIG):
            os.replace(written / name, path / name)
