"""Tiny models with random weights, quantized linears, peft models: what the integration tests run on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 97


def llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        attention_bias=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config).to(dtype)


def quantize(model: LlamaForCausalLM, compute_dtype: torch.dtype, nested: bool = True) -> LlamaForCausalLM:
    """Every linear of the decoder becomes a bitsandbytes Linear4bit, as load_in_4bit makes them."""
    import bitsandbytes as bnb

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            has_bias = linear.bias is not None
            new = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, has_bias, compute_dtype, nested, quant_type="nf4"
            )
            new.load_state_dict(linear.state_dict())
            model.model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def with_lora(model: nn.Module, **options) -> nn.Module:
    """A stock peft model whose adapters are random, so that no gradient is zero by construction."""
    options = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"} | options
    model = get_peft_model(model, LoraConfig(**options))
    fill_adapters(model)
    return model.train()


def fill_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length))


def text(batch: int = 3, length: int = 14) -> torch.Tensor:
    """Tokens, none of which is special."""
    return torch.randint(3, VOCAB, (batch, length))


def side_mask(ids: torch.Tensor, side: str) -> torch.Tensor:
    """The attention mask of a batch whose first row is padded at this side, "left", "right" or "none"."""
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :5] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return mask


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Tensors by name; the tolerance, relative to the norm of each, covers another order of float operations only."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        found = actual[name]
        assert found is not None and found.dtype == wanted.dtype and found.shape == wanted.shape, name
        difference = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert difference <= tolerance, (name, difference.item())


def loss_and_gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of every trainable parameter, by name; gradients are cleared again."""
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    results = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            results[name] = parameter.grad
    model.zero_grad(set_to_none=True)
    return results


@torch.no_grad()
def recomputed(model: nn.Module, ids: torch.Tensor, steps: int, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding without a cache: (tokens with those given, scores [steps, B, V]). Every step is a forward pass
    over all tokens, so it is what `generate` must give, whatever name or form a cache has.

    For an encoder-decoder `ids` are the decoder's, and `arguments` hold what the encoder reads. The end of the text is
    ruled out, as by `generate(min_new_tokens=steps)`.
    """
    was_training, scores, eos = model.training, [], model.generation_config.eos_token_id
    model.eval()
    name = "decoder_input_ids" if "input_ids" in arguments else "input_ids"
    for _ in range(steps):
        logits = model(**arguments, **{name: ids}).logits[:, -1].float()
        if eos is not None and eos < logits.shape[1]:
            logits[:, eos] = -torch.inf
        scores.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    model.train(was_training)
    return ids, torch.stack(scores)


def loss_curve(base: nn.Module, ids: torch.Tensor, prepare: Callable[[nn.Module], object], **options) -> torch.Tensor:
    """The losses of 30 steps from one seed. The optimizer is fused: it leaves the versions of parameters as they are.

    prepare: what is done to the stock peft model before. options: of LoraConfig.
    """
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
    model = get_peft_model(copy.deepcopy(base), config)
    prepare(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=True)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)
