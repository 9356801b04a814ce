"""ia3_linear against the frozen layer alone, peft and torch.compile: python -m benchmarks.ia3"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks import layers, micro
from benchmarks.costs import Cost, nf4_storage_bytes
from benchmarks.harness import Absent, Case, Outputs, Side, gradients
from benchmarks.shapes import LINEARS
from fastpeft import NF4Weight, ops
from fastpeft.reference.ia3 import ia3_linear as formula


@dataclass(frozen=True)
class Inputs:
    """x: [M, K] bf16; dy: [M, N] bf16. layer: the frozen nn.Linear or Linear4bit (None where bitsandbytes is absent);
    weight: its weight, [N, K]. ia3_l: float32, [K] where it scales the input, else [N]."""

    x: Tensor
    dy: Tensor
    layer: nn.Module | None
    weight: Tensor | NF4Weight
    ia3_l: Tensor
    feedforward: bool


def inputs(device: torch.device, M: int, N: int, K: int, weight: str, feedforward: bool) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    dense = random(N, K) / K**0.5
    layer = layers.frozen(dense, weight)
    ia3_l = (1 + 0.1 * torch.randn(K if feedforward else N, device=device)).requires_grad_(True)
    x = random(M, K).requires_grad_(True)
    return Inputs(x, random(M, N), layer, layers.weight_of(dense, layer, weight), ia3_l, feedforward)


def over(i: Inputs, function) -> Outputs:
    return gradients(function, i.dy, x=i.x, l=i.ia3_l)


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    if dtype is not None:
        weight = i.weight.to(dtype) if isinstance(i.weight, Tensor) else i.weight
        x, ia3_l = layers.leaf(i.x, dtype), layers.leaf(i.ia3_l, dtype)
        i = replace(i, x=x, dy=i.dy.to(dtype), weight=weight, ia3_l=ia3_l)
    return over(i, lambda: formula(i.x, i.weight, i.ia3_l, feedforward=i.feedforward))


def fastpeft(i: Inputs, backend: str | None = None):
    def y() -> Tensor:
        return ops.ia3_linear(i.x, i.weight, i.ia3_l, feedforward=i.feedforward, backend=backend)

    if backend is not None:
        micro.require_backend(y)
    return lambda: over(i, y)


def _without_adapter(x: Tensor, dense: Tensor, dy: Tensor) -> Outputs:
    return gradients(lambda: linear(x, dense), dy, x=x)


def frozen(i: Inputs):
    dense = i.weight if isinstance(i.weight, Tensor) else i.weight.dequantize(i.x.dtype)
    return lambda: _without_adapter(i.x, dense, i.dy)


def _frozen_exact(i: Inputs) -> Outputs:
    dense = i.weight if isinstance(i.weight, Tensor) else i.weight.dequantize(i.x.dtype)
    return _without_adapter(layers.leaf(i.x, torch.float64), dense.double(), i.dy.double())


def peft(i: Inputs):
    """Its 4-bit layer returns float32 under bfloat16 activations: rounded here, as the next layer would have to."""
    if i.layer is None:
        raise Absent("bitsandbytes is not installed")
    from peft import IA3Config, inject_adapter_in_model

    holder = nn.ModuleDict({"layer": i.layer})
    holder.is_loaded_in_4bit = type(i.layer) is not nn.Linear  # what from_pretrained leaves; peft looks for it
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if i.feedforward else [])
    layer = inject_adapter_in_model(config, holder)["layer"]
    shape = layer.ia3_l["default"].shape
    layer.ia3_l["default"] = nn.Parameter(i.ia3_l.detach().view(shape))

    def run() -> Outputs:
        parameter = layer.ia3_l["default"]
        found = gradients(lambda: layer(i.x).to(i.x.dtype), i.dy, x=i.x, l=parameter)
        return found | {"dl": found["dl"].flatten()}

    return run


_compiled_formula = torch.compile(formula, dynamic=False)


def compiled(i: Inputs):
    return lambda: over(i, lambda: _compiled_formula(i.x, i.weight, i.ia3_l, feedforward=i.feedforward))


def cost(M: int, N: int, K: int, weight: str, feedforward: bool) -> Cost:
    """Each byte once: the weight, x, dy, and y, dx; the product both ways. What is scaled is in a cache."""
    frozen_bytes = nf4_storage_bytes(N * K) if weight == "nf4" else 2 * N * K
    activations, vector = 2 * M * (N + K), 4 * (K if feedforward else N)
    scaled = M * (K if feedforward else N)
    return Cost(frozen_bytes + activations + vector, activations + vector, 4 * scaled, 4 * M * N * K)


# (model, layer), tokens; (IA)^3 adapts keys and values, and the last layer of a feed-forward at its input.
_LAYERS = {
    "smoke": ([("smoke", "odd")], (5,)),
    "quick": {"cuda": ([("Llama-3-8B", "k, v"), ("Llama-3-8B", "down")], (8192,)),
              "cpu": ([("SmolLM2-135M", "down")], (512,))},
    "full": ([("Llama-3-8B", "k, v"), ("Llama-3-8B", "down"), ("Qwen2.5-7B", "k, v"), ("Qwen2.5-7B", "down"),
              ("SmolLM2-135M", "down")], (512, 8192)),
}  # fmt: skip


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    sizes = _LAYERS[suite]
    chosen, tokens = sizes[device.type] if isinstance(sizes, dict) else sizes
    for (model, layer), M, weight in product(chosen, tokens, ("dense", "nf4")):
        N, K = LINEARS[model][layer]
        shape = {"M": M, "N": N, "K": K}
        feedforward = layer != "k, v"
        sides = [Side("fastpeft", fastpeft)]
        sides += [Side(f"fastpeft, {name}", partial(fastpeft, backend=name)) for name in ("triton", "eager")]
        sides.append(Side("frozen layer, bf16, no adapter", frozen, _frozen_exact))
        sides.append(Side("peft" if weight == "dense" else "peft + bitsandbytes, rounded to bf16", peft))
        if suite == "full":
            sides.append(Side("torch.compile of the formula", compiled))
        yield Case(
            labels={"model": model, "layer": layer, "pass": "forward+backward", "weight": weight} | shape,
            inputs=partial(inputs, device, weight=weight, feedforward=feedforward, **shape),
            sides=sides,
            formula=run_formula,
            cost=cost(weight=weight, feedforward=feedforward, **shape),
        )


if __name__ == "__main__":
    micro.main("ia3", cases)
