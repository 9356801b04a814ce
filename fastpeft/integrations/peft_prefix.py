"""peft's prefix tuning with the prefix beside the keys instead of in a cache: what `accelerate` makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
)
from torch import nn

from fastpeft.expected import attributes, cache_name, cache_of
from fastpeft.integrations.peft_prompt_learning import PromptLearning, change_class, models_of
from fastpeft.integrations.prefix import StackHook, check, unhook
from fastpeft.integrations.transformers_attention import KeysValues
from fastpeft.nn.prefix import split_layers

_TYPES = (PeftType.PREFIX_TUNING,)


def prefix_reasons(model: nn.Module) -> dict[str, str | None]:
    """The name of each prefix of peft inside `model` -> None where `accelerate_prefix` serves it, else why not."""
    reasons = {}
    for name, module in models_of(model, _TYPES):
        reasons |= {f"{name}prompt_encoder.{adapter}": _why_not(module) for adapter in module.peft_config}
    return reasons


def accelerate_prefix(model: nn.Module) -> None:
    """Gives each peft model of PREFIX_TUNING inside `model` the calls below, in place, where that is possible."""
    for _, module in models_of(model, _TYPES):
        if _why_not(module) is not None:
            continue
        if type(module) in _FUSED:
            _Given().attach(module.base_model.get_decoder(), shift=True)
            change_class(module, _FUSED[type(module)])
        module._mend()
    for _, module in models_of(model, _TYPES):
        if type(module) in _RENAMED and _takes_new_name_only(module):
            change_class(module, _RENAMED[type(module)])


def restore_prefix(model: nn.Module) -> None:
    """Undoes `accelerate_prefix`."""
    for _, module in models_of(model, _TYPES):
        if isinstance(module, _PrefixTuned):
            module._unmend()
            unhook(module.base_model)
            change_class(module, _STOCK[type(module)])
        elif isinstance(module, _Renamed):
            change_class(module, _STOCK[type(module)])


def _why_not(model: PeftModel) -> str | None:
    if isinstance(model, _Renamed) or (type(model) in _RENAMED and _takes_new_name_only(model)):
        stock = _STOCK.get(type(model), type(model)).__name__
        return f"{stock} is not supported; its prefix is given as the argument `cache`, which peft does not know"
    if type(model) not in _FUSED and not isinstance(model, _PrefixTuned):
        return f"{type(model).__name__} is not supported"
    if (reason := attributes(model, "prompt_encoder", "active_adapter", "_adapters_disabled")) is not None:
        return reason
    for config in model.peft_config.values():
        heads = config.num_attention_heads
        try:
            check(model.base_model, "decoder", (config.num_layers, heads, config.token_dim // heads))
        except ValueError as error:
            return str(error)
    return None


class _Given(StackHook):
    """Hands over what the peft model around the stack has put here for the time of a call."""

    given: list[KeysValues] | None = None

    def current(self) -> tuple[list | None, None]:
        return self.given, None


class _PrefixTuned(PromptLearning):
    """The calls that take the prefix along."""

    def _forward(self, **kwargs):
        for name in ("task_ids", "token_type_ids"):  # peft does not pass them on either
            kwargs.pop(name, None)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if (self.training or "labels" in kwargs) and cache_of(kwargs) is None:
            kwargs.setdefault("use_cache", False)  # a loss needs no cache, and only without one are rows unpacked
        with self._prefix():
            return self.base_model(**kwargs)

    def generate(self, *args, **kwargs):
        if self._adapters_disabled:
            return super().generate(*args, **kwargs)
        with self._prefix():
            return self.base_model.generate(*args, **kwargs)

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
        """Keys and values of each decoder layer."""
        config = self.active_peft_config
        flat = self._flat(config.num_virtual_tokens)
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


class PrefixTunedCausalLM(_PrefixTuned, PeftModelForCausalLM):
    """peft's `PeftModelForCausalLM` with the prefix beside the keys."""


class PrefixTunedSeq2SeqLM(_PrefixTuned, PeftModelForSeq2SeqLM):
    """peft's `PeftModelForSeq2SeqLM` with the prefix beside the keys."""


def _stack_with_cache(model: PeftModel) -> nn.Module | None:
    """The model itself or its backbone, whichever takes a cache."""
    backbone = getattr(model, "transformer_backbone_name", None)
    stacks = [model.base_model] + ([model.base_model.get_submodule(backbone)] if backbone else [])
    return next((stack for stack in stacks if cache_name(stack.forward) is not None), None)


def _takes_new_name_only(model: PeftModel) -> bool:
    stack = _stack_with_cache(model)
    return stack is not None and "past_key_values" not in inspect.signature(stack.forward).parameters


class _Renamed:
    """A classifier with a prefix in a cache, as in peft, which up to 0.21 looks for the older name of the argument."""

    def _prefix_tuning_forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        stack, prefix = _stack_with_cache(self), self.get_prompt(len(tokens))
        named = {cache_name(stack.forward): prefix}
        hook = stack.register_forward_pre_hook(lambda _, args, given: (args, given | named), with_kwargs=True)
        try:
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            return self.base_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        finally:
            hook.remove()


class RenamedSequenceClassification(_Renamed, PeftModelForSequenceClassification):
    """peft's `PeftModelForSequenceClassification` with the cache under its newer name."""


class RenamedTokenClassification(_Renamed, PeftModelForTokenClassification):
    """peft's `PeftModelForTokenClassification` with the cache under its newer name."""


class RenamedQuestionAnswering(_Renamed, PeftModelForQuestionAnswering):
    """peft's `PeftModelForQuestionAnswering` with the cache under its newer name."""


_FUSED: dict[type, type] = {PeftModelForCausalLM: PrefixTunedCausalLM, PeftModelForSeq2SeqLM: PrefixTunedSeq2SeqLM}
_RENAMED: dict[type, type] = {
    renamed.__bases__[-1]: renamed
    for renamed in (RenamedSequenceClassification, RenamedTokenClassification, RenamedQuestionAnswering)
}
_STOCK = {changed: stock for stock, changed in (_FUSED | _RENAMED).items()}
