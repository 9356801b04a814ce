"""attach_prefix / detach_prefix: trainable prefixes in a transformers model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod

import torch
from torch import nn
from transformers import PreTrainedModel

from fastpeft import expected
from fastpeft.expected import cache_name, cache_of
from fastpeft.integrations.transformers_attention import NAME, Prefix, is_cross
from fastpeft.nn.prefix import PrefixEncoder, shape_of_keys

# Attention implementations that the prefix's may stand in for; others have masks of their own.
_REPLACED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


def attach_prefix(
    model: PreTrainedModel,
    decoder: PrefixEncoder | None = None,
    *,
    cross: PrefixEncoder | None = None,
    encoder: PrefixEncoder | None = None,
) -> nn.ModuleDict:
    """Gives a model's attention a trainable prefix, in place, and freezes every other parameter.

    decoder: for the self attention of a decoder; the text then starts at position P. It is beside the caches of
    generation, not in them, so that they may be of any kind. cross, encoder: of a model with an encoder, for the
    decoder's attention to it and for its own. They become `model.prefix_encoders`, which is returned: trained and saved
    with the model. Gradient checkpointing, packed rows and `generate` work as without.

    Raises ValueError for a model that has a prefix already or cannot have one, and for a shape that does not fit; then
    nothing is changed.
    """
    parts = {"decoder": decoder, "cross": cross, "encoder": encoder}
    parts = {name: part for name, part in parts.items() if part is not None}
    if hasattr(model, "prefix_encoders") or not parts:
        raise ValueError("no prefix is given" if not parts else "the model has a prefix already: detach_prefix")
    for name, part in parts.items():
        check(model, name, (part.layers, part.heads, part.head_dim))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.prefix_encoders = nn.ModuleDict(parts)
    if decoder is not None or cross is not None:
        _Encoded(decoder, cross).attach(model.get_decoder(), shift=decoder is not None)
    if encoder is not None:
        _Encoded(encoder).attach(model.get_encoder(), shift=False)
    return model.prefix_encoders


def detach_prefix(model: PreTrainedModel) -> nn.ModuleDict:
    """Takes the prefix out again and returns its encoders; the model stays frozen. Raises ValueError without one."""
    if not hasattr(model, "prefix_encoders"):
        raise ValueError("the model has no prefix")
    encoders = model.prefix_encoders
    del model.prefix_encoders
    unhook(model)
    return encoders


def check(model: PreTrainedModel, part: str, shape: tuple[int, int, int]) -> None:
    """Raises ValueError where `part` of the model cannot have a prefix of `shape` (layers, heads, size of a head)."""
    if (reason := expected.why_not("prefix")) is not None:
        raise ValueError(reason)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a {type(model).__name__} is not a model of transformers")
    if part != "decoder" and not model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has no {part}")
    if not model.config.is_encoder_decoder and model.config.get_text_config() is not model.config:
        raise ValueError("the model has several parts with configurations of their own")
    stack = model.get_encoder() if part == "encoder" else model.get_decoder()
    implementation = stack.config._attn_implementation
    if implementation not in (*_REPLACED, NAME):
        raise ValueError(f"the attention implementation is {implementation!r}; it can be one of {', '.join(_REPLACED)}")
    attentions = [module for module in stack.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    if not stack._can_set_attn_implementation() or any(hasattr(attention, "sinks") for attention in attentions):
        raise ValueError(f"the attention of {type(stack).__name__} cannot be replaced")
    layers = getattr(stack.config, "per_layer_config", None) or ()
    shapes = {tuple(getattr(layer, name, None) for name in ("num_key_value_heads", "head_dim")) for layer in layers}
    if len(shapes) > 1 or getattr(stack.config, "num_kv_shared_layers", 0):
        raise ValueError("the layers differ in the shape of their keys, or share them")
    if tuple(shape) != shape_of_keys(model, part):
        raise ValueError(f"the prefix is of (layers, heads, size of a head) {tuple(shape)}, "
                         f"the model needs {shape_of_keys(model, part)}")  # fmt: skip
    indices = sorted(a.layer_idx for a in attentions if is_cross(a) == (part == "cross"))
    if indices != list(range(shape[0])):
        raise ValueError(f"{type(stack).__name__} has not one attention a layer")
    if part == "decoder":
        _shifting(stack)
        if model.main_input_name == "input_ids" and model.can_generate() and cache_name(stack.forward) is None:
            raise ValueError(f"{type(stack).__name__} takes no cache under a name that is known: "
                             "tokens already in it could not be counted")  # fmt: skip


def _accepts(module: nn.Module, *arguments: str) -> bool:
    return set(arguments) <= set(inspect.signature(module.forward).parameters)


def _shifting(stack: nn.Module) -> nn.Module | str:
    """How the positions of a stack are shifted: its embedding of positions, "position_ids" or "relative".

    Raises ValueError for a stack that takes its positions from anything else.
    """
    embedding = getattr(stack, "embed_positions", None)
    if embedding is not None and _accepts(embedding, "position_ids") and not _accepts(embedding, "attention_mask"):
        return embedding
    if embedding is None and _accepts(stack, "position_ids"):
        return "position_ids"
    if embedding is None and _relative_bias(stack) is not None:
        return "relative"
    raise ValueError(f"the positions of {type(stack).__name__} cannot be shifted")


def _relative_bias(stack: nn.Module) -> nn.Module | None:
    biased = (module for module in stack.modules() if getattr(module, "has_relative_attention_bias", False))
    return next(biased, None)


class StackHook(ABC):
    """Called before each call of a stack of layers: adds the prefix to its arguments and shifts its positions."""

    @abstractmethod
    def current(self) -> tuple[list | None, list | None]:
        """Keys and values of self and of cross attention for the call that comes."""

    def attach(self, stack: nn.Module, *, shift: bool) -> None:
        self.stock, self.shift = stack.config._attn_implementation, 0
        stack.config._attn_implementation = NAME
        stack.register_forward_pre_hook(self, with_kwargs=True)
        stack.register_forward_hook(_check_used, with_kwargs=True)
        self.shifting = _shifting(stack) if shift else None
        self.relative_bias = _relative_bias(stack)  # here: the search goes through all modules
        if isinstance(self.shifting, nn.Module):
            self.shifting.register_forward_pre_hook(self.shift_positions, with_kwargs=True)

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if len(args) > 1:  # by name, so that the cache is found among them
            args, kwargs = (), dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)) | kwargs
        layers, cross = self.current()
        self.shift = 0
        if layers is None and cross is None:
            return args, kwargs
        if stack.training and getattr(stack, "gradient_checkpointing", False) and _is_reentrant(stack):
            raise ValueError("a prefix needs gradient checkpointing with use_reentrant=False, transformers' default: "
                             "the layers share the graph of the prefix")  # fmt: skip
        past = cache_of(kwargs)
        seen = 0 if past is None else past.get_seq_length()
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # a static cache counts on in place
        prefix = Prefix(layers, cross, self.relative_bias, seen)
        kwargs["fastpeft_prefix"] = prefix
        self.shift = prefix.length
        if self.shift and self.shifting == "position_ids":
            kwargs["position_ids"] = self.shift + _positions(args, kwargs, seen)
        return args, kwargs

    def shift_positions(self, _embedding: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"position_ids": kwargs["position_ids"] + self.shift}


def _is_reentrant(stack: nn.Module) -> bool:
    return getattr(stack._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)


def _check_used(stack: nn.Module, _args: tuple, kwargs: dict, _output) -> None:
    prefix = kwargs.get("fastpeft_prefix")
    if prefix is not None and not prefix.used:
        raise RuntimeError(f"{type(stack).__name__} does not hand its keyword arguments to its attention: "
                           "the prefix had no effect")  # fmt: skip


def _positions(args: tuple, kwargs: dict, seen) -> torch.Tensor:
    """The position ids of a call of a stack: those given, or counted on from the cache."""
    if kwargs.get("position_ids") is not None:
        return kwargs["position_ids"]
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    return (torch.arange(tokens.shape[1], device=tokens.device) + seen).unsqueeze(0)


class _Encoded(StackHook):
    """Evaluates PrefixEncoders."""

    def __init__(self, layers: PrefixEncoder | None, cross: PrefixEncoder | None = None):
        self.layers, self.cross = layers, cross

    def current(self) -> tuple[list | None, list | None]:
        return tuple(None if encoder is None else encoder.keys_values() for encoder in (self.layers, self.cross))


def unhook(model: nn.Module) -> None:
    """Removes every hook, and gives the stacks their attention implementation back."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, StackHook):
                module.config._attn_implementation = hook.stock
            if isinstance(hook, StackHook) or isinstance(getattr(hook, "__self__", None), StackHook):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key, hook in list(module._forward_hooks.items()):
            if hook is _check_used:
                del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]
