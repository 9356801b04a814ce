"""lora_linear against the frozen layer alone, peft, torch.compile and other packages: python -m benchmarks.lora_linear

The adapter's values are representable in bfloat16: sides with float32 and with bfloat16 adapters compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks import layers, micro, peers
from benchmarks.costs import Cost, nf4_storage_bytes
from benchmarks.harness import Absent, Case, Outputs, Side
from benchmarks.shapes import DECODE_M, LINEARS, RANKS, TRAINING_M
from fastpeft import NF4Weight, ops
from fastpeft.reference.lora_linear import lora_linear as formula

SCALING = 2.0  # alpha = 2 R, as most people have it
_BF16, _FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Inputs:
    """x: [M, K] and dy: [M, N] bf16; layer: the frozen nn.Linear or Linear4bit (None where bitsandbytes is absent).

    weight: the layer's, [N, K]. A: [R, K] and B: [N, R] float32. backward: whether gradients are asked for.
    """

    x: Tensor
    dy: Tensor
    layer: nn.Module | None
    weight: Tensor | NF4Weight
    A: Tensor
    B: Tensor
    backward: bool

    @property
    def dense(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize(self.x.dtype)


def inputs(device: torch.device, M: int, N: int, K: int, R: int, weight: str, backward: bool) -> Inputs:
    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    dense = random(N, K) / K**0.5
    layer = layers.frozen(dense, weight)
    A, B = random(R, K) / K**0.5, random(N, R) / R**0.5
    return Inputs(
        x=random(M, K).requires_grad_(backward),
        dy=random(M, N),
        layer=layer,
        weight=layers.weight_of(dense, layer, weight),
        A=A.float().requires_grad_(backward),
        B=B.float().requires_grad_(backward),
        backward=backward,
    )


def gradients(function, x: Tensor, dy: Tensor, A: Tensor | None, B: Tensor | None, backward: bool) -> Outputs:
    """y of `function(x, A, B)`, and with `backward` dx, dA, dB; A and B are None for a layer without an adapter."""
    if not backward:
        with torch.no_grad():
            return {"y": function(x, A, B)}
    leaves = {name: leaf for name, leaf in (("dx", x), ("dA", A), ("dB", B)) if leaf is not None}
    y = function(x, A, B)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True))


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    def to(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    weight = to(i.weight) if isinstance(i.weight, Tensor) else i.weight
    return gradients(lambda x, A, B: formula(x, weight, A, B, SCALING), to(i.x), to(i.dy), to(i.A), to(i.B), i.backward)


def without_adapter(dense: Tensor, i: Inputs) -> Outputs:
    """What the frozen layer alone gives, in float64."""
    x = i.x.detach().double().requires_grad_(i.backward)
    return gradients(lambda x, A, B: linear(x, dense.double()), x, i.dy.double(), None, None, i.backward)


def with_adapter(dense: Tensor, i: Inputs) -> Outputs:
    """The formula over another weight, in float64."""
    x, A, B = (t.detach().double().requires_grad_(i.backward) for t in (i.x, i.A, i.B))
    return gradients(lambda x, A, B: formula(x, dense.double(), A, B, SCALING), x, i.dy.double(), A, B, i.backward)


# Sides: each prepares for a set of inputs and returns the call to time.


def fastpeft(i: Inputs, backend: str | None = None, dtype: torch.dtype = torch.float32):
    A, B = (t.detach().to(dtype).requires_grad_(i.backward) for t in (i.A, i.B))

    def function(x, A, B):
        return ops.lora_linear(x, i.weight, A, B, SCALING, backend=backend)

    if backend is not None:
        micro.require_backend(lambda: function(i.x, A, B))
    return lambda: gradients(function, i.x, i.dy, A, B, i.backward)


def frozen(i: Inputs):
    dense = i.dense
    return lambda: gradients(lambda x, A, B: linear(x, dense), i.x, i.dy, None, None, i.backward)


def compiled(i: Inputs):
    return lambda: gradients(
        lambda x, A, B: _compiled_formula(x, i.weight, A, B, SCALING), i.x, i.dy, i.A, i.B, i.backward
    )


_compiled_formula = torch.compile(formula, dynamic=False)


def peft(i: Inputs, dtype: torch.dtype):
    return _of_layer(i, dtype, lambda layer: layer)


def unsloth(i: Inputs):
    return _of_layer(i, torch.float32, peers.unsloth_layer if i.backward else peers.unsloth_decode)


def axolotl(i: Inputs):
    return _of_layer(i, torch.float32, peers.axolotl_layer)


def _of_layer(i: Inputs, dtype: torch.dtype, make):
    """make: a LoRA linear of peft -> a function of x."""
    if i.layer is None:
        raise Absent("bitsandbytes is not installed")
    layer = layers.peft_lora(i.layer, i.A, i.B, SCALING, dtype)
    function = make(layer)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lambda: gradients(lambda x, A, B: function(x), i.x, i.dy, A, B, i.backward)


def torchao(i: Inputs):
    weight, nf4_linear = peers.torchao_nf4(i.dense)
    return lambda: gradients(
        lambda x, A, B: peers.plain_lora(nf4_linear(x, weight), x, A, B, SCALING), i.x, i.dy, i.A, i.B, i.backward
    )


def gemlite(i: Inputs):
    layer = peers.gemlite_int4(i.dense)
    return lambda: gradients(lambda x, A, B: layer(x), i.x, i.dy, None, None, False)


def sides(weight: str, backward: bool, compile_too: bool) -> list[Side]:
    found = [Side("fastpeft", fastpeft)]
    found += [Side(f"fastpeft, {name}", partial(fastpeft, backend=name)) for name in ("cuda", "triton", "eager")]
    found += [
        Side("fastpeft, bf16 adapter", partial(fastpeft, dtype=torch.bfloat16)),
        Side("frozen layer, bf16, no adapter", frozen, exact=lambda i: without_adapter(i.dense, i)),
    ]
    stock = "peft" if weight == "dense" else "peft + bitsandbytes"
    found += [
        Side(f"{stock}, fp32 adapter", partial(peft, dtype=torch.float32)),
        Side(f"{stock}, bf16 adapter", partial(peft, dtype=torch.bfloat16)),
    ]
    if compile_too:
        found.append(Side("torch.compile of the formula", compiled))
    found.append(Side("unsloth", unsloth, peer=True))
    found.append(Side("axolotl", axolotl, peer=True))
    if weight == "nf4":
        exact = lambda i: with_adapter(peers.torchao_dequantized(i.dense), i)  # noqa: E731
        found.append(Side("torchao nf4", torchao, exact=exact, peer=True))
        if not backward:
            exact = lambda i: without_adapter(peers.gemlite_dequantized(i.dense), i)  # noqa: E731
            found.append(Side("gemlite int4, no adapter", gemlite, exact=exact, peer=True))
            found.append(Side("flute", peers.flute, peer=True))
    return found


def cost(M: int, N: int, K: int, R: int, weight: str, backward: bool) -> Cost:
    """Each byte once, a float32 adapter; the products of the formula and of its gradients."""
    frozen_bytes = nf4_storage_bytes(N * K) if weight == "nf4" else N * K * _BF16
    x, y, adapter = M * K * _BF16, M * N * _BF16, R * (N + K) * _FP32
    base, low_rank = 2 * M * N * K, 2 * M * R * (N + K)
    if not backward:
        return Cost(frozen_bytes + x + adapter, y, 0, base + low_rank)
    # dX repeats the base product; dY B and the rest of dX, dA and dB repeat the low-rank ones twice.
    return Cost(frozen_bytes + x + y + adapter, y + x + adapter, 0, 2 * base + 3 * low_rank)


# (model, layer) of the quick suite: square, and long either way.
_QUICK = {
    "cuda": [("Llama-3-8B", "q, o"), ("Llama-3-8B", "down"), ("Llama-3-8B", "gate, up")],
    "cpu": [("SmolLM2-135M", "down")],
}
_QUICK_M = {"cuda": ((1, 8, 32, 64), (8192,)), "cpu": ((1, 16), (512,))}
_COMPILED_M = (1, 512, 8192)  # compiling takes longer than measuring


def _sizes(suite: str, device: str) -> Iterator[tuple[str, str, str, bool, int, int]]:
    """model, layer, weight, backward, M, R."""
    if suite == "smoke":
        yield from (("smoke", "odd", *rest) for rest in product(("nf4", "dense"), (False, True), (5,), (4,)))
        return
    decode, training = _QUICK_M[device] if suite == "quick" else (DECODE_M, TRAINING_M)
    if suite == "quick":
        chosen = _QUICK[device]
    else:
        chosen = [(model, layer) for model in LINEARS if model != "smoke" for layer in LINEARS[model]]
    for (model, layer), (M, backward) in product(chosen, [(M, False) for M in decode] + [(M, True) for M in training]):
        yield model, layer, "nf4", backward, M, 16
    model, layer = chosen[0]
    yield model, layer, "dense", True, training[-1], 16
    if suite == "full":
        for R, (M, backward) in product(RANKS, ((1, False), (32, False), (8192, True))):
            if R != 16:
                yield model, layer, "nf4", backward, M, R


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    for model, layer, weight, backward, M, R in _sizes(suite, device.type):
        N, K = LINEARS[model][layer]
        sizes = {"M": M, "N": N, "K": K, "R": R}
        labels = {"model": model, "layer": layer, "pass": "forward+backward" if backward else "forward"}
        compile_too = suite != "smoke" and M in _COMPILED_M and R == 16 and (model, layer) == _QUICK[device.type][0]
        yield Case(
            labels=labels | {"weight": weight} | sizes,
            inputs=partial(inputs, device, weight=weight, backward=backward, **sizes),
            sides=sides(weight, backward, compile_too),
            formula=run_formula,
            cost=cost(weight=weight, backward=backward, **sizes),
        )


if __name__ == "__main__":
    micro.main("lora_linear", cases)
