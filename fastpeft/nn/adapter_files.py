"""save_adapter, load_adapter: peft's on-disk format, a safetensors file and a JSON file."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.nn.convert import convert
from fastpeft.nn.frozen import is_conv1d, is_supported, weight_of
from fastpeft.nn.lora import LoRALinear

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# Settings of peft's LoraConfig that change what a LoRA file means and that LoRALinear does not have.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into the folder `path`, as peft would.

    model: with LoRALinear modules (see `convert`), or a PeftModel, whose own save runs. Each file is written under a
    temporary name and renamed. Raises ValueError when there is no adapter, or when the layers differ in dropout or
    rslora, which the format cannot hold.
    """
    path = Path(path)
    if _is_peft_model(model):
        model.save_pretrained(path, safe_serialization=True)
        return
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRALinear; make them with fastpeft.convert")
    config = _config(model, layers)
    tensors = {}
    for name, layer in layers.items():
        for part in "AB":
            weight = getattr(layer, f"lora_{part}").weight
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = weight.detach().cpu().contiguous()

    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    _write(path / _WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _write(path / _CONFIG, lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Loads a LoRA adapter from the folder `path`, whether peft or fastpeft wrote it; returns the adapted modules.

    model: without adapters, then the modules that the file names are wrapped as by `convert`; or with LoRALinear
    modules, then the file must name the same ones with the same ranks and its alpha takes the place of theirs; or a
    PeftModel, whose active adapter is overwritten.

    Raises ValueError, before the model is touched, for a file that is missing, not safetensors, malformed, of another
    method, or that does not fit the model. Nothing is unpickled.
    """
    path = Path(path)
    config, tensors = _read(path)
    if _is_peft_model(model):
        return _load_into_peft(model, tensors, path)
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        method = ", ".join(unsupported) or f"peft_type {config.get('peft_type')!r}, bias {config.get('bias')!r}"
        raise ValueError(f"{path} is not a plain LoRA adapter ({method})")
    factors = _factors(tensors, path)
    layers = _lora_layers(model)
    _check_fit(model, layers, factors, path)
    settings = {name: _settings(config, name, A.shape[0]) for name, (A, _) in factors.items()}
    if not layers:
        names = {model.get_submodule(name): name for name in factors}

        def make(linear: nn.Module) -> LoRALinear:
            rank, alpha, rslora = settings[names[linear]]
            A = factors[names[linear]][0]
            return LoRALinear(linear, rank, alpha, config.get("lora_dropout", 0.0), rslora=rslora, dtype=A.dtype)

        convert(model, make, "|".join(re.escape(name) for name in factors))
        layers = _lora_layers(model)
    with torch.no_grad():
        for name, (A, B) in factors.items():
            layers[name].lora_A.weight.copy_(A)
            layers[name].lora_B.weight.copy_(B)
            _, layers[name].alpha, layers[name].rslora = settings[name]
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
    if len(dropout) > 1 or len(rslora) > 1:
        raise ValueError(f"the layers differ in dropout {sorted(dropout)} or rslora {sorted(rslora)}; "
                         "an adapter file holds one of each")  # fmt: skip
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
        "use_rslora": rslora.pop(),
        "target_modules": sorted(layers),
        "task_type": None,
    }


def _settings(config: dict, name: str, rank: int) -> tuple[int, float, bool]:
    """(rank, alpha, rslora) of the module `name`; patterns match the end of a name, as in peft."""
    patterns = config.get("alpha_pattern") or {}
    matching = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
    return rank, (matching or [config["lora_alpha"]])[0], bool(config.get("use_rslora"))


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


def _factors(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: {key} is not the name of a LoRA matrix")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{path}: {name} has only lora_{'/'.join(pair)}")
    if not parts:
        raise ValueError(f"{path} holds no LoRA matrix")
    return {name: (pair["A"], pair["B"]) for name, pair in parts.items()}


def _check_fit(model: nn.Module, layers: dict[str, LoRALinear], factors: dict, path: Path) -> None:
    if layers and set(layers) != set(factors):
        odd = sorted(set(layers) ^ set(factors))
        raise ValueError(f"{path} and the model adapt different modules; only one of them has {', '.join(odd[:3])}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (A, B) in factors.items():
        base = layers[name].base if layers else modules.get(name)
        if base is None or not is_supported(base):
            raise ValueError(f"{path} adapts {name}, which the model has not, or not as a supported linear")
        N, K = weight_of(base).shape
        rank = layers[name].r if layers else A.shape[0]
        if tuple(A.shape) != (rank, K) or tuple(B.shape) != (N, rank):
            raise ValueError(f"{path}: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}; "
                             f"the model needs [{rank}, {K}] and [{N}, {rank}]")  # fmt: skip
        if not A.is_floating_point() or not B.is_floating_point():
            raise ValueError(f"{path}: {name} is {A.dtype} and {B.dtype}, not floating point")


def _load_into_peft(model, tensors: dict[str, Tensor], path: Path) -> list[str]:
    import peft

    own = peft.get_peft_model_state_dict(model)
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in tensors.items()}:
        odd = sorted(key for key in own.keys() | tensors.keys()
                     if key not in own or key not in tensors or own[key].shape != tensors[key].shape)  # fmt: skip
        raise ValueError(f"{path} does not fit the active adapter: {', '.join(odd[:3])}")
    peft.set_peft_model_state_dict(model, tensors)
    return sorted({key.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for key in tensors})
