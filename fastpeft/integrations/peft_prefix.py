"""peft's prefix tuning with the prefix beside the keys instead of in a cache: what `accelerate` makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PeftType
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from fastpeft.integrations.prefix import StackHook, check, unhook
from fastpeft.integrations.transformers_attention import KeysValues
from fastpeft.nn.prefix import load_encoder, save_encoder, split_layers


def prefix_reasons(model: nn.Module) -> dict[str, str | None]:
    """The name of each prefix of peft inside `model` -> None where `accelerate_prefix` serves it, else why not."""
    reasons = {}
    for name, module in _prefix_models(model):
        reasons |= {f"{name}prompt_encoder.{adapter}": _why_not(module) for adapter in module.peft_config}
    return reasons


def accelerate_prefix(model: nn.Module) -> None:
    """Gives each peft model of PREFIX_TUNING inside `model` the calls below, in place, where that is possible."""
    for _, module in _prefix_models(model):
        if _why_not(module) is not None:
            continue
        if type(module) in _FUSED:
            _forget_bound(module)
            _Given().attach(module.base_model.get_decoder(), shift=True)
            module.__class__ = _FUSED[type(module)]
        module._mend()


def restore_prefix(model: nn.Module) -> None:
    """Undoes `accelerate_prefix`."""
    for _, module in _prefix_models(model):
        if isinstance(module, _PrefixTuned):
            _forget_bound(module)
            module._unmend()
            unhook(module.base_model)
            module.__class__ = _STOCK[type(module)]


def _prefix_models(model: nn.Module) -> list[tuple[str, PeftModel]]:
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PeftModel) and module.active_peft_config.peft_type == PeftType.PREFIX_TUNING
    ]


def _why_not(model: PeftModel) -> str | None:
    if type(model) not in _FUSED and not isinstance(model, _PrefixTuned):
        return f"{type(model).__name__} is not supported"
    for config in model.peft_config.values():
        heads = config.num_attention_heads
        try:
            check(model.base_model, "decoder", (config.num_layers, heads, config.token_dim // heads))
        except ValueError as error:
            return str(error)
    return None


def _forget_bound(model: PeftModel) -> None:
    """peft's disable_adapter leaves methods of the class that the model had then on the model itself."""
    for name in ("forward", "prepare_inputs_for_generation"):
        if getattr(vars(model).get(name), "__self__", None) is model:
            delattr(model, name)


class _Given(StackHook):
    """Hands over what the peft model around the stack has put here for the time of a call."""

    given: list[KeysValues] | None = None

    def current(self) -> tuple[list | None, None]:
        return self.given, None


class _PrefixTuned:
    """The calls that take the prefix along; peft's class follows it in the order of inheritance."""

    _arguments: tuple[str, ...]  # of peft's forward, in order

    def _forward(self, *args, **kwargs):
        if self._left_to_peft:
            return super().forward(*args, **kwargs)
        kwargs |= zip(self._arguments, args, strict=False)
        for name in ("task_ids", "token_type_ids"):  # peft does not pass them on either
            kwargs.pop(name, None)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if (self.training or "labels" in kwargs) and "past_key_values" not in kwargs:
            kwargs.setdefault("use_cache", False)  # a loss needs no cache, and only without one are rows unpacked
        with self._prefix():
            return self.base_model(**kwargs)

    def generate(self, *args, **kwargs):
        if self._left_to_peft:
            return super().generate(*args, **kwargs)
        with self._prefix():
            return self.base_model.generate(*args, **kwargs)

    @property
    def _left_to_peft(self) -> bool:
        return self._adapters_disabled or self.active_peft_config.peft_type != PeftType.PREFIX_TUNING

    @contextmanager
    def _prefix(self) -> Iterator[None]:
        """For the calls inside, each decoder layer has its prefix."""
        hook = next(h for h in self.base_model.get_decoder()._forward_pre_hooks.values() if isinstance(h, _Given))
        before, hook.given = hook.given, self._layers()
        try:
            yield
        finally:
            hook.given = before

    def _layers(self) -> list[KeysValues]:
        """Keys and values of each decoder layer; the encoder is evaluated once, not for every sample."""
        config, encoder = self.active_peft_config, self.prompt_encoder[self.active_adapter]
        # By calls, not from its weight, which may be sharded. What is loaded for inference has lost its MLP.
        lookup = encoder.embedding if config.prefix_projection and not self._has_mlp(self.active_adapter) else encoder
        flat = lookup(torch.arange(config.num_virtual_tokens, device=encoder.embedding.weight.device))
        layers = split_layers(flat, config.num_layers, config.num_attention_heads, self.base_model_torch_dtype)
        if config.num_transformer_submodules == 2:  # as peft reads it, see `_mend`
            layers = [layers[2 * index % len(layers)] for index in range(len(layers))]
        return layers

    def _mend(self) -> None:
        """One prefix a decoder layer for what is going to be trained.

        For an encoder-decoder peft lets decoder layer i read the prefix of layer 2i modulo their number: of an even
        number half is never read. num_transformer_submodules, which peft writes into the adapter's file, tells the two
        readings apart: 2 is peft's, which a prefix that was trained so keeps in inference.
        """
        self._mended = getattr(self, "_mended", [])
        for config in self.peft_config.values():
            if config.num_transformer_submodules == 2 and not config.inference_mode:
                config.num_transformer_submodules = 1
                self._mended.append(config)

    def _unmend(self) -> None:
        for config in vars(self).pop("_mended"):
            config.num_transformer_submodules = 2

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As peft's, and the parameters of an MLP beside its file, which holds what the MLP makes of them."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for adapter in kwargs.get("selected_adapters") or self.peft_config:
                if self._has_mlp(adapter):
                    folder = Path(save_directory, "" if adapter == "default" else adapter)  # so does peft
                    save_encoder(self.prompt_encoder[adapter], folder)
        return result

    def load_adapter(self, model_id, adapter_name, *args, **kwargs):
        """As peft's; an MLP that is here already gets its own parameters back, so that training can be resumed."""
        here = adapter_name in self.peft_config and self._has_mlp(adapter_name)
        if here and load_encoder(self.prompt_encoder[adapter_name], Path(model_id)):
            return _IncompatibleKeys([], [])
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def _has_mlp(self, adapter: str) -> bool:
        return hasattr(self.prompt_encoder[adapter], "transform")


class PrefixTunedCausalLM(_PrefixTuned, PeftModelForCausalLM):
    """peft's `PeftModelForCausalLM` with the prefix beside the keys."""

    _arguments = tuple(inspect.signature(PeftModelForCausalLM.forward).parameters)[1:]

    @wraps(PeftModelForCausalLM.forward)
    def forward(self, *args, **kwargs):
        return self._forward(*args, **kwargs)


class PrefixTunedSeq2SeqLM(_PrefixTuned, PeftModelForSeq2SeqLM):
    """peft's `PeftModelForSeq2SeqLM` with the prefix beside the keys."""

    _arguments = tuple(inspect.signature(PeftModelForSeq2SeqLM.forward).parameters)[1:]

    @wraps(PeftModelForSeq2SeqLM.forward)
    def forward(self, *args, **kwargs):
        return self._forward(*args, **kwargs)


_FUSED: dict[type, type] = {PeftModelForCausalLM: PrefixTunedCausalLM, PeftModelForSeq2SeqLM: PrefixTunedSeq2SeqLM}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}
