"""Bottleneck adapters in a model: where they go, several by name, and their files.

An adapter is hung into the module whose output it works on, by a forward hook: the model's own modules, parameters and
state-dict keys stay as they are, whatever they are (4-bit, with LoRA, compiled).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.nn import frozen
from fastpeft.nn.adapter_files import _read, _save
from fastpeft.nn.bottleneck import NORMS, BottleneckAdapter
from fastpeft.reference.bottleneck import ACTIVATIONS

METHOD = "bottleneck"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@dataclass(frozen=True)
class BottleneckConfig:
    """placement: "houlsby", after attention and after the feed-forward; "pfeiffer", after the feed-forward; "parallel",
    beside the feed-forward, from its input to its output. The rest as in BottleneckAdapter."""

    placement: str = "pfeiffer"
    r: int = 64
    activation: str = "relu"
    scaling: float = 1.0
    norm: str = "none"

    def __post_init__(self) -> None:
        allowed = {"placement": PLACEMENTS, "activation": tuple(ACTIVATIONS), "norm": NORMS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(values)}")
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; it must be an integer, at least 1")
        if not isinstance(self.scaling, int | float):
            raise ValueError(f"scaling is {self.scaling!r}; it must be a number")


@dataclass(frozen=True)
class Places:
    """Of a layer's class, the modules whose outputs are what attention and feed-forward add to the residual stream,
    dropout included; and whose input the feed-forward begins with. None: it has no such part."""

    attention: str | None = None
    feed_forward: str | None = None
    feed_forward_input: str | None = None


_DECODER = Places("self_attn", "mlp", "mlp")
# By the name of the class: transformers need not be imported. Other models: add a line.
PLACES = {
    "LlamaDecoderLayer": _DECODER,
    "MistralDecoderLayer": _DECODER,
    "Qwen2DecoderLayer": _DECODER,
    "Qwen3DecoderLayer": _DECODER,
    "GPT2Block": Places("attn.resid_dropout", "mlp", "mlp"),
    "BertLayer": Places("attention.output.dropout", "output.dropout", "intermediate"),
    "T5LayerSelfAttention": Places(attention="dropout"),
    "T5LayerFF": Places(feed_forward="dropout", feed_forward_input="DenseReluDense"),
}


class Bottlenecks(nn.ModuleDict):
    """The adapters of one place by name, of which the active one works; a submodule of the module that it follows."""

    def __init__(self):
        super().__init__()
        self.active: str | None = None
        self.configs: dict[str, BottleneckConfig] = {}
        self._input: Tensor | None = None

    @property
    def _is_parallel(self) -> bool:
        return self.active in self and self.configs[self.active].placement == "parallel"

    def keep_input(self, module: nn.Module, args: tuple) -> None:
        """A hook before the feed-forward."""
        if self._is_parallel:
            self._input = args[0]

    def adapt(self, module: nn.Module, args: tuple, output):
        """A hook after the module. Attention returns a tuple, whose first element is what is adapted."""
        if self.active not in self:
            return output
        first = output[0] if isinstance(output, tuple) else output
        if self._is_parallel:
            x, self._input = self._input, None
            first = self[self.active](x, first)
        else:
            first = self[self.active](first)
        return (first, *output[1:]) if isinstance(output, tuple) else first


def add_bottleneck(model: nn.Module, config: BottleneckConfig | None = None, name: str = "default") -> list[str]:
    """Adds an adapter by `name` to every layer that PLACES knows, and makes it the active one; returns its places.

    model: a Llama, Mistral, Qwen2, Qwen3, GPT-2, BERT or T5 of transformers, with any head. With its first adapter
    every other parameter is frozen; a new head is to be unfrozen again. The adapter's parameters are float32, on the
    device of the layer. Only the active adapter is trainable.

    Raises ValueError, before anything is changed, for a model without such layers and for a name that is taken or holds
    a dot.
    """
    config = config or BottleneckConfig()
    places = list(_places(model, config))
    if not places:
        raise ValueError(f"{type(model).__name__} has no layer of {', '.join(PLACES)}; add its places to PLACES")
    if not name or "." in name or name in adapter_names(model):
        raise ValueError(f"an adapter cannot be named {name!r}; there are {adapter_names(model)}, and no dots")
    if not adapter_names(model):
        model.requires_grad_(False)
        for module in model.modules():
            if frozen.is_linear4bit(module):
                frozen.freeze(module)
    features = model.config.get_text_config().hidden_size
    options = (features, config.r, config.activation, config.scaling, config.norm)
    for _, layer, output, start in places:
        adapters = getattr(output, "bottleneck", None) or _hang(output, start)
        device = next(layer.parameters()).device
        adapters[name] = BottleneckAdapter(*options, device=device).train(output.training)
        adapters.configs[name] = config
    set_bottleneck(model, name)
    return [place for place, *_ in places]


def _places(model: nn.Module, config: BottleneckConfig) -> Iterator[tuple[str, nn.Module, nn.Module, nn.Module | None]]:
    """Name of the place, its layer, the module whose output is adapted, and that with the input of a parallel one."""
    for name, layer in model.named_modules():
        known = PLACES.get(type(layer).__name__)
        if known is None:
            continue
        if known.attention is not None and config.placement == "houlsby":
            yield f"{name}.{known.attention}", layer, layer.get_submodule(known.attention), None
        if known.feed_forward is not None:
            output, start = (layer.get_submodule(part) for part in (known.feed_forward, known.feed_forward_input))
            yield f"{name}.{known.feed_forward}", layer, output, start


def _hang(output: nn.Module, start: nn.Module | None) -> Bottlenecks:
    adapters = Bottlenecks()
    output.add_module("bottleneck", adapters)
    output.register_forward_hook(adapters.adapt)
    if start is not None:
        start.register_forward_pre_hook(adapters.keep_input)
    return adapters


def _all(model: nn.Module) -> dict[str, Bottlenecks]:
    """By place."""
    return {
        name.removesuffix(".bottleneck"): module
        for name, module in model.named_modules()
        if isinstance(module, Bottlenecks)
    }


def adapter_names(model: nn.Module) -> list[str]:
    """Of the bottleneck adapters in `model`."""
    return list(dict.fromkeys(name for adapters in _all(model).values() for name in adapters))


def active_bottleneck(model: nn.Module) -> str | None:
    """The name of the active adapter; None where all are off."""
    return next((adapters.active for adapters in _all(model).values() if adapters.active is not None), None)


def set_bottleneck(model: nn.Module, name: str | None) -> None:
    """Makes the adapter `name` the active one, and the only one that is trainable; None switches all off.

    Raises ValueError for a name that there is not.
    """
    if name is not None:
        _check_names(model, [name])
    for adapters in _all(model).values():
        adapters.active = name
        for other, adapter in adapters.items():
            if name is not None:
                adapter.requires_grad_(other == name)


def delete_bottleneck(model: nn.Module, name: str) -> None:
    """Removes the adapter `name`; where it was the active one, all are off. Raises ValueError where there is none."""
    _check_names(model, [name])
    if active_bottleneck(model) == name:
        set_bottleneck(model, None)
    for adapters in _all(model).values():
        if name in adapters:
            del adapters[name]
            del adapters.configs[name]


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if name not in adapter_names(model):
            raise ValueError(f"there is no adapter {name!r}; there are {adapter_names(model)}")


def bottleneck_config(model: nn.Module, name: str) -> BottleneckConfig:
    """As `add_bottleneck` was given it. Raises ValueError where there is no such adapter."""
    _check_names(model, [name])
    return next(adapters.configs[name] for adapters in _all(model).values() if name in adapters)


@torch.no_grad()
def merge_bottlenecks(model: nn.Module, names: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Adds an adapter `name` that does what the adapters `names` would do together: the sum of their updates, each
    times its weight. It is exact: their bottlenecks stand beside each other, so its rank is the sum of theirs.

    An adapter is not linear: it cannot be merged into the model's weights, and an average of several adapters'
    parameters computes something else than any of them; neither is offered.

    Raises ValueError for unknown names, other numbers of weights, and adapters that differ in placement or activation,
    or have a layer norm.
    """
    _check_names(model, names)
    if not names or len(names) != len(weights):
        raise ValueError(f"{len(names)} adapters and {len(weights)} weights; as many are needed, and at least one")
    configs = [bottleneck_config(model, other) for other in names]
    first = configs[0]
    for config in configs:
        if (config.placement, config.activation, config.norm) != (first.placement, first.activation, "none"):
            raise ValueError(f"to be merged, adapters need one placement, one activation and no norm; got {configs}")
    add_bottleneck(model, replace(first, r=sum(config.r for config in configs), scaling=1.0), name)
    factors = [weight * config.scaling for weight, config in zip(weights, configs, strict=True)]
    for adapters in _all(model).values():
        if name in adapters:
            merged, parts = adapters[name], [adapters[other] for other in names]
            merged.down.weight.copy_(torch.cat([part.down.weight for part in parts]))
            merged.down.bias.copy_(torch.cat([part.down.bias for part in parts]))
            pairs = list(zip(factors, parts, strict=True))
            merged.up.weight.copy_(torch.cat([factor * part.up.weight for factor, part in pairs], 1))
            merged.up.bias.copy_(sum(factor * part.up.bias for factor, part in pairs))


def save_bottleneck(model: nn.Module, path: str | os.PathLike, name: str | None = None) -> None:
    """Writes the adapter `name` (None: the active one) into the folder `path`: safetensors and JSON.

    Keys are `<place>.<parameter>`, without the name: it may be loaded under another. Each file is written under a
    temporary name and renamed. Raises ValueError where there is no such adapter.
    """
    name = active_bottleneck(model) if name is None else name
    config = bottleneck_config(model, name)
    tensors = {
        f"{place}.{key}": tensor.detach().contiguous()
        for place, adapters in _all(model).items()
        if name in adapters
        for key, tensor in adapters[name].state_dict().items()
    }
    described = {"method": METHOD, "base_model_name_or_path": getattr(model, "name_or_path", None) or None}
    _save(Path(path), described | asdict(config), tensors)


def load_bottleneck(model: nn.Module, path: str | os.PathLike, name: str = "default") -> list[str]:
    """Adds the adapter that `save_bottleneck` wrote into the folder `path`, as the active one; returns its places.

    Raises ValueError, before the model is touched, for files that are missing, malformed or of another method, that do
    not fit the model, and for a name that is taken. Nothing is unpickled.
    """
    path = Path(path)
    described, tensors = _read(path)
    if described.pop("method", None) != METHOD:
        raise ValueError(f"{path} is not a bottleneck adapter")
    described.pop("base_model_name_or_path", None)
    known = {field.name for field in fields(BottleneckConfig)}
    if set(described) != known:
        raise ValueError(f"{path} should have {sorted(known)}; it has {sorted(described)}")
    config = BottleneckConfig(**described)
    # What the model should bring: on "meta" an adapter costs nothing.
    places = [place for place, *_ in _places(model, config)]
    features = model.config.get_text_config().hidden_size
    options = (features, config.r, config.activation, config.scaling, config.norm)
    shapes = {key: t.shape for key, t in BottleneckAdapter(*options, device=torch.device("meta")).state_dict().items()}
    wanted = {f"{place}.{key}": shape for place in places for key, shape in shapes.items()}
    odd = sorted(set(wanted) ^ set(tensors)) or [key for key in wanted if tensors[key].shape != wanted[key]]
    if odd:
        raise ValueError(f"{path} does not fit the model: {', '.join(odd[:3])}")
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError(f"{path} holds tensors that are not floating point")
    add_bottleneck(model, config, name)
    for place in places:
        adapter = model.get_submodule(place).bottleneck[name]
        adapter.load_state_dict({key: tensors[f"{place}.{key}"] for key in shapes})
    return places
