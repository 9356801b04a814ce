"""PrefixEncoder: the trainable keys and values of prefix tuning and P-Tuning v2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.expected import cache_of
from fastpeft.nn.adapter_files import _CONFIG, _WEIGHTS, _read, _write

# Beside peft's files: the parameters of an MLP, which peft does not save.
_ENCODER = "prefix_encoder.safetensors"


class PrefixEncoder(nn.Module):
    """A prefix's keys and values for each layer: parameters themselves (flat), or made by an MLP (P-Tuning v2).

    layers, heads, head_dim: of the attention's keys. P: positions that the prefix takes. hidden: None for the flat
    form; else the width of the MLP `embedding [P, heads * head_dim] -> linear -> tanh -> linear`, which is evaluated
    once a call, not for every sample. dtype: of the parameters; float32 keeps small updates.

    Parameters have the names, shapes and initial distribution of peft's encoder. Raises ValueError for sizes below 1.
    Source: Li and Liang, "Prefix-Tuning", 2021; Liu et al., "P-Tuning v2", 2021 (https://arxiv.org/abs/2110.07602).
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        P: int,
        hidden: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, size in {"layers": layers, "heads": heads, "head_dim": head_dim, "P": P, "hidden": hidden}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        self.layers, self.heads, self.head_dim, self.P, self.hidden = layers, heads, head_dim, P, hidden
        width, out = heads * head_dim, 2 * layers * heads * head_dim
        options = {"dtype": dtype, "device": device}
        self.embedding = nn.Embedding(P, out if hidden is None else width, **options)
        if hidden is not None:
            first, last = nn.Linear(width, hidden, **options), nn.Linear(hidden, out, **options)
            self.transform = nn.Sequential(first, nn.Tanh(), last)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        P: int | None = None,
        hidden: int | None = None,
        *,
        init_text: Tensor | None = None,
        part: str = "decoder",
    ) -> PrefixEncoder:
        """An encoder of the shape that a transformers model needs, on its device.

        init_text: token ids, [P] int64. The flat prefix starts as the keys and values that the model itself has for
        that text, so that it behaves as if the text stood before every input; P is then their number. part: "decoder"
        (its self attention), "cross" (its attention to the encoder) or "encoder".

        Raises ValueError when neither or both of P and init_text are given, for init_text with an MLP or with a model
        that has an encoder (keys then depend on the input), and for an unknown part.
        """
        if (P is None) == (init_text is None):
            raise ValueError("give either P or init_text, whose tokens are the positions of the prefix")
        if part not in ("decoder", "cross", "encoder"):
            raise ValueError(f"part is {part!r}; it must be decoder, cross or encoder")
        if init_text is not None and (hidden is not None or model.config.is_encoder_decoder):
            raise ValueError("init_text needs a flat prefix and a model without an encoder")
        P = len(init_text) if P is None else P
        encoder = cls(*shape_of_keys(model, part), P, hidden, device=model.device)
        if init_text is not None:
            encoder._copy_from(_keys_values_of(model, init_text))
        return encoder

    @torch.no_grad()
    def _copy_from(self, keys_values: list[Tensor]) -> None:
        """keys_values: for each layer keys, then values, each [heads, P, head_dim]."""
        shape = (self.heads, self.P, self.head_dim)
        if len(keys_values) != 2 * self.layers or any(tuple(t.shape) != shape for t in keys_values):
            raise ValueError(f"the model keeps {len(keys_values)} tensors of {tuple(keys_values[0].shape)} for this "
                             f"text; the prefix needs {2 * self.layers} of {shape}")  # fmt: skip
        flat = torch.stack([t.to(self.embedding.weight.device) for t in keys_values]).permute(2, 0, 1, 3)
        self.embedding.weight.copy_(flat.flatten(1))

    def forward(self) -> Tensor:
        """The flat form, [P, 2 * layers * heads * head_dim]: of each layer first the keys, then the values."""
        flat = self.embedding.weight
        return flat if self.hidden is None else self.transform(flat)

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the keys and the values, each [heads, P, head_dim]."""
        return split_layers(self(), self.layers, self.heads)

    def flat(self) -> PrefixEncoder:
        """A flat encoder of the same keys and values: what the MLP is not needed for after training."""
        with torch.no_grad():
            weight = self()
            sizes = (self.layers, self.heads, self.head_dim, self.P)
            encoder = PrefixEncoder(*sizes, dtype=weight.dtype, device=weight.device)
            encoder.embedding.weight.copy_(weight)
        return encoder

    def save(self, path: str | os.PathLike, *, task_type: str = "CAUSAL_LM", base_model: str | None = None) -> None:
        """Writes the folder `path`: peft's two files with the flat form, and an MLP's own parameters beside them.

        peft loads the folder for inference; `load` gives back the encoder that was saved, MLP included, so that
        training can be resumed. Each file is written under a temporary name and renamed.
        """
        from safetensors.torch import save_file

        path = Path(path)
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": task_type,
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_virtual_tokens": self.P,
            "token_dim": self.heads * self.head_dim,
            "num_transformer_submodules": 1,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "prefix_projection": self.hidden is not None,
            "encoder_hidden_size": self.hidden,
        }
        flat = {"prompt_embeddings": self().detach().cpu().contiguous()}
        path.mkdir(parents=True, exist_ok=True)
        if self.hidden is not None:
            save_encoder(self, path)
        _write(path / _WEIGHTS, lambda file: save_file(flat, file, metadata={"format": "pt"}))
        _write(path / _CONFIG, lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str | None = None) -> PrefixEncoder:
        """The encoder of a folder that `save` wrote, or peft; flat where the MLP's parameters are not there.

        Raises ValueError for a file that is missing, damaged, of another method, or whose sizes disagree.
        """
        path = Path(path)
        config, tensors = _read(path)
        sizes = [config.get(key) for key in ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")]
        if config.get("peft_type") != "PREFIX_TUNING" or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(f"{path} is not a prefix: peft_type {config.get('peft_type')!r}, sizes {sizes}")
        layers, heads, width, P = sizes
        flat = tensors.get("prompt_embeddings")
        if width % heads or flat is None or tuple(flat.shape) != (P, 2 * layers * width):
            found = None if flat is None else tuple(flat.shape)
            raise ValueError(f"{path}: prompt_embeddings is {found}; it must be {(P, 2 * layers * width)}")
        hidden = config.get("encoder_hidden_size") if (path / _ENCODER).exists() else None
        encoder = cls(layers, heads, width // heads, P, hidden, dtype=flat.dtype, device=device)
        if hidden is not None:
            load_encoder(encoder, path)
        else:
            with torch.no_grad():
                encoder.embedding.weight.copy_(flat)
        return encoder

    def extra_repr(self) -> str:
        return f"layers={self.layers}, heads={self.heads}, head_dim={self.head_dim}, P={self.P}, hidden={self.hidden}"


def save_encoder(encoder: nn.Module, path: Path) -> None:
    """Writes the parameters of an encoder, ours or peft's, into the folder `path`."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    _write(path / _ENCODER, lambda file: save_file(state, file, metadata={"format": "pt"}))


def load_encoder(encoder: nn.Module, path: Path) -> bool:
    """Reads them back; False where the folder has none. Raises ValueError, before anything is changed, for a file that
    is damaged or of other sizes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (path / _ENCODER).is_file():
        return False
    try:
        state = load_file(path / _ENCODER)
    except SafetensorError as error:
        raise ValueError(f"{path / _ENCODER} is damaged: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        raise ValueError(f"{path / _ENCODER} holds {found}; the encoder is {wanted}")
    encoder.load_state_dict(state)
    return True


def shape_of_keys(model: nn.Module, part: str = "decoder") -> tuple[int, int, int]:
    """(layers, heads of keys, size of a head) of one part of a transformers model; `part` as in PrefixEncoder."""
    config = model.config.get_text_config(**{"encoder" if part == "encoder" else "decoder": True})
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)  # T5 says d_kv
    return config.num_hidden_layers, heads, size or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def _keys_values_of(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What the model's cache holds after the tokens: for each layer keys, then values, each [heads, P, head_dim]."""
    was_training = model.training
    model.eval()
    try:
        cache = cache_of(model(input_ids=tokens.to(model.device).unsqueeze(0), use_cache=True))
    finally:
        model.train(was_training)
    return [t[0] for layer in cache.layers for t in (layer.keys, layer.values)]


def split_layers(
    flat: Tensor, layers: int, heads: int, dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The flat form [P, 2 * layers * heads * D] as keys and values [heads, P, D] of each layer.

    One copy and one cast for all layers; its backward is one sum, where a slice a layer would fill the whole with
    zeros for each.
    """
    parts = flat.to(dtype or flat.dtype).view(len(flat), 2 * layers, heads, -1).permute(1, 2, 0, 3).contiguous()
    parts = parts.unbind(0)
    return list(zip(parts[::2], parts[1::2], strict=True))
