"""Models for the end-to-end benchmarks: Llama shapes, random weights, built on the device, with stock peft around.

Of bottleneck adapters, which peft does not have, the other side is the same module in plain PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; transformers need not ask

import torch
from torch import Tensor, nn

from fastpeft import use_backend
from fastpeft.nn import BottleneckAdapter, BottleneckConfig, add_bottleneck

ADAPTERS = ("adapter-houlsby", "adapter-pfeiffer", "adapter-parallel")
METHODS = ("lora", "qlora", "dora", "qdora", "ia3", "prefix", "prompt", "p-tuning", *ADAPTERS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VIRTUAL_TOKENS = 32


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128256, tied=False),
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "smoke": Shape(2, 192, 512, 3, 1, 97, tied=True),
}


def build(
    shape: Shape, method: str, rank: int = 16, dropout: float = 0.0, dtype: str = "bf16", device: str = "cpu"
) -> nn.Module:
    """A stock peft model in training mode; the base weights are random, the adapters too, so that nothing is zero.

    rank: of bottleneck adapters the features inside.
    """
    if method.startswith("q") and find_spec("bitsandbytes") is None:
        raise SystemExit(f"{method} needs bitsandbytes, which is not installed")
    torch.manual_seed(0)
    model = _with_adapter(_base(shape, method, DTYPES[dtype], device), method, rank, dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("up.weight"):
                parameter.normal_(std=0.02)
            elif "ia3_l" in name:
                parameter.normal_(mean=1.0, std=0.1)
    return model.train()


def frozen(shape: Shape, dtype: str, device: str, checkpointing: bool) -> nn.Module:
    """The dense model without an adapter, its embeddings asking for a gradient; a model of its own."""
    model = _base(shape, "", DTYPES[dtype], device).requires_grad_(False).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def _base(shape: Shape, method: str, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if method.startswith("q"):
        _quantize_linears(model, dtype)
    return model


def _quantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Every linear of the decoder in NF4 with double quantization, as `load_in_4bit` makes them."""
    from benchmarks import layers

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.set_submodule(name, layers.frozen(linear.weight.data.to(dtype), "nf4"))
    model.is_loaded_in_4bit = True


def _with_adapter(model: nn.Module, method: str, rank: int, dropout: float) -> nn.Module:
    from peft import (
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        TaskType,
        get_peft_model,
    )

    if method in ADAPTERS:
        add_bottleneck(model, BottleneckConfig(placement=method.removeprefix("adapter-"), r=rank))
        return model
    before_text = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig, "p-tuning": PromptEncoderConfig}
    if method in before_text:
        config = before_text[method](task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS)
    elif method == "ia3":
        config = IA3Config(
            task_type=TaskType.CAUSAL_LM,
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    else:
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules="all-linear",
            use_dora=method.endswith("dora"),
        )
    return get_peft_model(model, config)


# The two sides of every end-to-end benchmark: states of the same model.


def stock(model: nn.Module) -> None:
    import fastpeft

    fastpeft.restore(model)
    _change(model, BottleneckAdapter, _PlainAdapter)


def accelerated(model: nn.Module) -> None:
    import fastpeft

    fastpeft.accelerate(model)
    _change(model, _PlainAdapter, BottleneckAdapter)


class _PlainAdapter(BottleneckAdapter):
    """The formula in plain PyTorch, of which autograd keeps what it asks for."""

    def forward(self, *args: Tensor) -> Tensor:
        with use_backend("reference"):
            return super().forward(*args)


def _change(model: nn.Module, old: type, new: type) -> None:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new


def other(method: str) -> str:
    """Whose the stock side is."""
    return "plain PyTorch" if method in ADAPTERS else "peft"


def fused(model: nn.Module) -> str:
    """What the accelerated side has."""
    import fastpeft

    adapters = sum(isinstance(module, BottleneckAdapter) for module in model.modules())
    summary = fastpeft.accelerate(model).summary
    return f"{adapters} of {adapters} adapters on ops.bottleneck, with the fused loss" if adapters else summary


SIDES: dict[str, Callable[[nn.Module], None]] = {"peft": stock, "fastpeft": accelerated}


def check_gradients(model: nn.Module, tokens: Tensor) -> None:
    """Stops the benchmark where the two sides do not compute the same loss and gradients.

    Gradients through all layers in 16 bits differ by some percent between any two orders of rounding; a wrong formula
    turns their direction. Without dropout: the two sides draw different masks.
    """
    results = {}
    for side, prepare in SIDES.items():
        prepare(model)
        results[side] = _loss_and_gradients(model, tokens)
    (loss, stock_gradients), (fused_loss, fused) = results["peft"], results["fastpeft"]
    cosine = nn.functional.cosine_similarity(stock_gradients, fused, dim=0).item()
    scale = (fused.norm() / stock_gradients.norm()).item()
    print(f"parity: loss {loss:.5f} and {fused_loss:.5f}, gradients: cosine {cosine:.5f}, norms {scale:.4f}")
    # Written so that a NaN fails.
    if not (abs(loss - fused_loss) <= 0.01 * abs(loss) and cosine >= 0.99 and abs(scale - 1) <= 0.03):
        raise SystemExit("the two sides do not compute the same: not timed")


def _loss_and_gradients(model: nn.Module, tokens: Tensor) -> tuple[float, Tensor]:
    dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for dropout in dropouts:
        dropout.p = 0.0
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    flat = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    for dropout, p in dropouts.items():
        dropout.p = p
    return loss.item(), flat
