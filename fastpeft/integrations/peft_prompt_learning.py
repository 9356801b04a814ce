"""What peft's prompt learning methods share here: the change of class, and encoders that are saved whole."""

from __future__ import annotations

import inspect
from collections.abc import Container
from functools import wraps
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from fastpeft.nn.prefix import load_encoder, save_encoder


def models_of(model: nn.Module, types: Container[PeftType]) -> list[tuple[str, PeftModel]]:
    """The peft models inside `model` whose active adapter is of one of these types, each with the prefix of its
    names."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PeftModel) and module.active_peft_config.peft_type in types
    ]


def change_class(model: PeftModel, cls: type) -> None:
    """peft's disable_adapter leaves methods of the class that the model had then on the model itself: they go too."""
    for name in ("forward", "prepare_inputs_for_generation"):
        if getattr(vars(model).get(name), "__self__", None) is model:
            delattr(model, name)
    model.__class__ = cls


class PromptLearning:
    """A mixin; peft's class follows it in the order of inheritance, and its forward gives way to `_forward`."""

    def __init_subclass__(cls):
        stock = cls.__bases__[-1]
        if not issubclass(stock, PeftModel):
            return
        names = tuple(inspect.signature(stock.forward).parameters)[1:]

        @wraps(stock.forward)
        def forward(self, *args, **kwargs):
            if self._adapters_disabled:
                return stock.forward(self, *args, **kwargs)
            return self._forward(**kwargs, **dict(zip(names, args, strict=False)))

        del forward.__wrapped__  # who unwraps a forward, as accelerate's unwrap_model may, would end in peft's
        forward.__signature__ = inspect.signature(stock.forward)
        cls.forward = forward

    def _flat(self, positions: int) -> Tensor:
        """[positions, features] of the active encoder, evaluated once, not for every sample."""
        config, encoder = self.active_peft_config, self.prompt_encoder[self.active_adapter]
        has_more = getattr(config, "prefix_projection", config.peft_type == PeftType.P_TUNING)
        # By calls, not from its weight, which may be sharded. What is loaded for inference has lost all but that.
        lost = has_more and not self._is_reparameterized(self.active_adapter)
        indices = torch.arange(positions, device=encoder.embedding.weight.device)
        return (encoder.embedding if lost else encoder)(indices)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As peft's, and the parameters of an MLP or LSTM beside its file, which holds what they make."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for adapter in kwargs.get("selected_adapters") or self.peft_config:
                if self._is_reparameterized(adapter):
                    folder = Path(save_directory, "" if adapter == "default" else adapter)  # so does peft
                    save_encoder(self.prompt_encoder[adapter], folder)
        return result

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """As peft's, without the dropout of an LSTM, which peft would save with the rest in training."""
        encoder = self.prompt_encoder[adapter_name]
        was_training = encoder.training
        encoder.eval()
        try:
            return super().get_prompt_embedding_to_save(adapter_name)
        finally:
            encoder.train(was_training)

    def load_adapter(self, model_id, adapter_name, is_trainable=False, *args, **kwargs):
        """As peft's; an MLP or LSTM that is here already gets its own parameters back, so that training can be resumed.

        Raises ValueError where only what they made was saved: nothing can be trained on from that.
        """
        if adapter_name not in self.peft_config or not self._is_reparameterized(adapter_name):
            return super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        if not load_encoder(self.prompt_encoder[adapter_name], Path(model_id)):
            raise ValueError(f"{model_id} holds the prompt, but not the encoder that makes it: it was saved without "
                             "fastpeft.accelerate, and serves inference only")  # fmt: skip
        if not is_trainable:
            self.eval()  # so does peft
        return _IncompatibleKeys([], [])

    def _is_reparameterized(self, adapter: str) -> bool:
        """Whether the encoder has more than the embedding; what is loaded for inference has lost the rest."""
        return any(hasattr(self.prompt_encoder[adapter], name) for name in ("transform", "mlp_head"))
