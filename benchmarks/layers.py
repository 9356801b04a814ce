"""Single layers for the benchmarks of ops: frozen linears, dense and 4-bit, and stock peft around them."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.harness import Absent
from fastpeft import NF4Weight


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in `dtype`, collecting gradients where `tensor` does."""
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def frozen(weight: Tensor, kind: str) -> nn.Module | None:
    """weight: [N, K]; kind: "dense" or "nf4" -> nn.Linear or bitsandbytes' Linear4bit; None where that is absent."""
    N, K = weight.shape
    if kind == "dense":
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    if find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=linear)
    # On a CPU it would rewrite its storage for inference, and share it no longer.
    linear.support_avx512bf16_for_cpu = False
    return linear.to(weight.device)


def weight_of(weight: Tensor, layer: nn.Module | None, kind: str) -> Tensor | NF4Weight:
    """The weight of the layer, without a copy; without bitsandbytes our own quantization of `weight`."""
    if kind == "dense":
        return layer.weight
    return NF4Weight.quantize(weight) if layer is None else NF4Weight.from_bnb(layer)


def peft_lora(base: nn.Module | None, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, **options) -> nn.Module:
    """peft's own LoRA layer around `base`, with these values of A [R, K] and B [N, R] in `dtype`."""
    if base is None:
        raise Absent("bitsandbytes is not installed")
    from peft import LoraConfig, inject_adapter_in_model

    R = A.shape[0]
    holder = nn.ModuleDict({"layer": base})
    holder.is_loaded_in_4bit = type(base) is not nn.Linear  # what from_pretrained leaves; peft looks for it
    config = LoraConfig(r=R, lora_alpha=scaling * R, target_modules=["layer"], **options)
    layer = inject_adapter_in_model(config, holder)["layer"]
    for module, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
        module.weight = nn.Parameter(value.detach().to(dtype, copy=True))
    return layer
