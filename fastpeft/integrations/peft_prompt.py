"""peft's prompt tuning, P-Tuning and multitask prompt tuning: what `accelerate` makes of them."""

from __future__ import annotations

import inspect
import warnings

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
    PromptEmbedding,
    PromptEncoder,
)
from torch import Tensor, nn
from torch.nn.functional import embedding, pad
from transformers import Cache, PreTrainedModel

from fastpeft.expected import attributes, cache_of, find, why_not
from fastpeft.integrations.peft_prompt_learning import PromptLearning, change_class, models_of

MultitaskPromptEmbedding = find("prompt", "peft.tuners.multitask_prompt_tuning:MultitaskPromptEmbedding")
# What the calls below read of a peft model.
_ATTRIBUTES = ("prompt_tokens", "prompt_encoder", "active_adapter", "word_embeddings", "_adapters_disabled")

_ENCODERS = {
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptEmbedding,
}
# Context-aware prompts (their loss) and cartridges (a cache) have forward passes of their own in peft.
_TYPES = (*_ENCODERS, *(PeftType[name] for name in ("CPT", "CARTRIDGE") if name in PeftType.__members__))


def prompt_reasons(model: nn.Module) -> dict[str, str | None]:
    """The name of each prompt of peft inside `model` -> None where `accelerate_prompt` serves it, else why not."""
    reasons = {}
    for name, module in models_of(model, _TYPES):
        reasons |= {f"{name}prompt_encoder.{adapter}": _why_not(module) for adapter in module.peft_config}
    return reasons


def accelerate_prompt(model: nn.Module) -> None:
    """Gives each peft model of these methods inside `model` the calls below, in place, where that is possible."""
    for _, module in models_of(model, _TYPES):
        if _why_not(module) is None and type(module) in _FUSED:
            change_class(module, _FUSED[type(module)])


def restore_prompt(model: nn.Module) -> None:
    """Undoes `accelerate_prompt`."""
    for _, module in models_of(model, _TYPES):
        if isinstance(module, _PromptTuned):
            change_class(module, _STOCK[type(module)])


def _why_not(model: PeftModel) -> str | None:
    peft_type = model.active_peft_config.peft_type
    if (reason := why_not("prompt") or attributes(model, *_ATTRIBUTES)) is not None:
        return reason
    if peft_type not in _ENCODERS:
        return f"{peft_type.value} is not supported"
    if type(model) not in _FUSED and not isinstance(model, _PromptTuned):
        return f"{type(model).__name__} is not supported"
    for encoder in model.prompt_encoder.values():
        if type(encoder) is not _ENCODERS[peft_type]:
            return f"a {type(encoder).__name__} as encoder is not supported"
    if not isinstance(model.base_model, PreTrainedModel):
        return f"a {type(model.base_model).__name__} is not a model of transformers"
    config = model.base_model.config
    if not config.is_encoder_decoder and config.get_text_config() is not config:
        return "the model has several parts with configurations of their own"
    return None


class _PromptTuned(PromptLearning):
    """The calls with the prompt before the text; what else is said of the tokens moves with them."""

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """[batch_size, positions, features]. Rows are one row, expanded, so that autograd sums over the batch once;
        with several tasks they are its product with a matrix for each task."""
        positions = len(self.prompt_tokens[self.active_adapter])
        if self.active_peft_config.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
            return self._flat(positions).expand(batch_size, -1, -1)
        if task_ids is None:
            raise ValueError("multitask prompt tuning needs task_ids, the task of each row")
        encoder = self.prompt_encoder[self.active_adapter]
        # As embeddings: their backward is deterministic, that of index_select is not on a GPU.
        columns, rows = (
            embedding(task_ids, parts.flatten(1)).unflatten(1, parts.shape[1:])
            for parts in (encoder.prefix_task_cols, encoder.prefix_task_rows)
        )
        return encoder.embedding(torch.arange(positions, device=columns.device)) * (columns @ rows)

    def _forward(self, input_ids=None, inputs_embeds=None, task_ids=None, **kwargs):
        text = _text(self, input_ids, inputs_embeds)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        _check_mask(kwargs)
        prompt = self.get_prompt(len(text), task_ids)[:, : self._P]  # for an encoder-decoder peft makes twice as many
        inputs_embeds = torch.cat([prompt.to(text.dtype), text], 1)
        may_be_packed = "position_ids" in kwargs and "attention_mask" not in kwargs
        if self._is_decoder:
            _count(self.base_model, kwargs, text.shape[1])
        self._move(kwargs)
        if self._is_decoder and may_be_packed and _is_packed(kwargs["position_ids"]):
            kwargs["attention_mask"] = _document_mask(self.base_model, kwargs["position_ids"], self._P)
        return self._call(inputs_embeds=inputs_embeds, **kwargs)

    @property
    def _P(self) -> int:
        return self.active_peft_config.num_virtual_tokens

    @property
    def _is_decoder(self) -> bool:
        """Tokens see only what stands before them; classifiers of such models have a `score`, others a `classifier`."""
        return hasattr(self.base_model, "score")

    def _move(self, kwargs: dict) -> None:
        """Makes room for the prompt in the arguments that say something of each token, or point to one."""
        for name, value in {"attention_mask": 1, "token_type_ids": 0}.items():
            if name in kwargs:
                kwargs[name] = pad(kwargs[name], (self._P, 0), value=value)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = _with_prompt(kwargs["position_ids"], self._P)

    def _call(self, **kwargs):
        return self.base_model(**kwargs)

    def _call_and_cut(self, names: tuple[str, ...], **kwargs):
        """These outputs are of the text, as its labels are."""
        return_dict = kwargs.pop("return_dict", self.base_model.config.return_dict)
        output = self.base_model(**kwargs, return_dict=True)
        for name in names:
            output[name] = output[name][:, self._P :]
        return output if return_dict else output.to_tuple()


class PromptTunedCausalLM(_PromptTuned, PeftModelForCausalLM):
    """peft's `PeftModelForCausalLM`. The logits begin with those of the prompt, as peft's do."""

    _is_decoder = True

    def _forward(self, **kwargs):
        """With what a call before has left in the cache, the prompt is there."""
        if _is_empty(cache_of(kwargs)):
            return super()._forward(**kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "task_ids"}
        _check_mask(kwargs)
        text = _text(self, kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None))
        _count(self.base_model, kwargs, text.shape[1])
        if "position_ids" in kwargs:
            kwargs["position_ids"] = kwargs["position_ids"] + self._P
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = pad(kwargs["attention_mask"], (self._P, 0), value=1)
        return self.base_model(inputs_embeds=text, **kwargs)

    def _move(self, kwargs):
        if kwargs.pop("token_type_ids", None) is not None:
            warnings.warn("token_type_ids are ignored: a prompt of a causal model has none", stacklevel=4)
        super()._move(kwargs)
        if "labels" in kwargs:
            kwargs["labels"] = pad(kwargs["labels"], (self._P, 0), value=-100)

    def prepare_inputs_for_generation(self, *args, task_ids: Tensor | None = None, **kwargs):
        """What the model prepares for a step of its own text, with the prompt before it or in the cache already.

        peft's own version is not used: it knows neither positions nor the newer name of the cache.
        """
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        # What the model counts itself from the cache; and a prompt of a causal model has no token types.
        for name in ("cache_position", "token_type_ids"):
            inputs.pop(name, None)
        _check_mask(kwargs)
        if kwargs.get("attention_mask") is not None:
            # The mask of keys, not what a static cache has made of it: the model makes it anew, prompt included.
            inputs["attention_mask"] = pad(kwargs["attention_mask"], (self._P, 0), value=1)
        starts, positions = _is_empty(cache_of(inputs)), inputs.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = _with_prompt(positions, self._P) if starts else positions + self._P
        if starts:
            text = _text(self, inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None))
            inputs["inputs_embeds"] = torch.cat([self.get_prompt(len(text), task_ids).to(text.dtype), text], 1)
        return inputs


class PromptTunedSeq2SeqLM(_PromptTuned, PeftModelForSeq2SeqLM):
    """peft's `PeftModelForSeq2SeqLM`, whose encoder has the prompt; with several tasks the decoder, too."""

    _is_decoder = False

    def _forward(self, **kwargs):
        if self.active_peft_config.peft_type == PeftType.MULTITASK_PROMPT_TUNING:
            return PeftModelForSeq2SeqLM.forward(self, **kwargs)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)  # such models take no positions
        return super()._forward(**kwargs)


class PromptTunedSequenceClassification(_PromptTuned, PeftModelForSequenceClassification):
    """peft's `PeftModelForSequenceClassification`."""

    def _call(self, **kwargs):
        """A decoder's classifier reads the last position of a row if it is given no ids: the padding goes before."""
        mask = kwargs.get("attention_mask")
        if self._is_decoder and mask is not None:
            order = mask.argsort(dim=1, stable=True)
            for name in {"inputs_embeds", "attention_mask", "token_type_ids", "position_ids"} & kwargs.keys():
                values = kwargs[name].expand(len(order), *kwargs[name].shape[1:])
                kwargs[name] = values.gather(1, order if values.dim() == 2 else order.unsqueeze(2).expand_as(values))
        return super()._call(**kwargs)


class PromptTunedTokenClassification(_PromptTuned, PeftModelForTokenClassification):
    """peft's `PeftModelForTokenClassification`, with logits of the text, which answer to the labels."""

    def _move(self, kwargs):
        super()._move(kwargs)
        if "labels" in kwargs:
            kwargs["labels"] = pad(kwargs["labels"], (self._P, 0), value=-100)

    def _call(self, **kwargs):
        return self._call_and_cut(("logits",), **kwargs)


class PromptTunedQuestionAnswering(_PromptTuned, PeftModelForQuestionAnswering):
    """peft's `PeftModelForQuestionAnswering`, with logits of the text, which answer to the positions of answers."""

    def _move(self, kwargs):
        super()._move(kwargs)
        for name in {"start_positions", "end_positions"} & kwargs.keys():
            kwargs[name] = kwargs[name] + self._P

    def _call(self, **kwargs):
        return self._call_and_cut(("start_logits", "end_logits"), **kwargs)


class PromptTunedFeatureExtraction(_PromptTuned, PeftModelForFeatureExtraction):
    """peft's `PeftModelForFeatureExtraction`. The features begin with those of the prompt, as peft's do."""


_FUSED: dict[type, type] = {
    fused.__bases__[-1]: fused
    for fused in (
        PromptTunedCausalLM,
        PromptTunedSeq2SeqLM,
        PromptTunedSequenceClassification,
        PromptTunedTokenClassification,
        PromptTunedQuestionAnswering,
        PromptTunedFeatureExtraction,
    )
}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


def _is_empty(cache: Cache | None) -> bool:
    return cache is None or cache.get_seq_length() == 0


def _text(model: PeftModel, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    return model.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds


def _check_mask(kwargs: dict) -> None:
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"with a prompt attention_mask must be [batch, tokens]; it has {mask.dim()} dimensions")


def _count(model: nn.Module, kwargs: dict, tokens: int) -> None:
    """Positions that are not given are counted from the mask, as `generate` counts them: the prompt stands right
    before the text, and a row gives the same with padding and without."""
    mask = kwargs.get("attention_mask")
    if mask is None or "position_ids" in kwargs:
        return
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _with_prompt(position_ids: Tensor, P: int) -> Tensor:
    """The prompt takes the first positions of a row, the text comes P later."""
    first = position_ids.amin(-1, keepdim=True)
    return torch.cat([first + torch.arange(P, device=first.device), position_ids + P], -1)


def _is_packed(position_ids: Tensor) -> bool:
    """Several documents in a row are told apart by positions that do not go on, as in transformers."""
    return torch.compiler.is_compiling() or bool((position_ids.diff(dim=-1) != 1).any())


def _document_mask(model: PreTrainedModel, position_ids: Tensor, P: int) -> Tensor:
    """[B, 1, P + S, P + S]: each document sees the prompt and itself, so that a row is a loop over its documents.

    Raises ValueError where the attention takes no such mask, or a window of its own would be lost beside it.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or getattr(config, "sliding_window", None) is not None:
        raise ValueError("packed rows with a prompt need attn_implementation='sdpa' and a model without a sliding "
                         "window: give each document a row, or train a prefix instead")  # fmt: skip
    document = pad((position_ids.diff(dim=-1) != 1).cumsum(-1), (1, 0))
    column = torch.arange(document.shape[-1], device=document.device)
    visible = (document.unsqueeze(2) == document.unsqueeze(1)) | (column < P)
    return (visible & (column <= column.unsqueeze(1))).unsqueeze(1)
