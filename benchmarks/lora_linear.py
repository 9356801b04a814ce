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
from benchmarks.harness import Case, Outputs, Side, gradients
from benchmarks.shapes import DECODE_M, LINEARS, RANKS, TRAINING_M
from fastpeft import NF4Weight, ops
from fastpeft.reference.lora_linear import lora_linear as formula

SCALING = 2.0  # alpha = 2 R, as most people have it
_BF16, _FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Inputs:
    """x: [M, K] bf16; dy: [M, N] bf16, None where no gradients are asked for. A: [R, K], B: [N, R] float32.

    layer: the frozen nn.Linear or Linear4bit (None where bitsandbytes is absent); weight: its weight, [N, K].
    """

    x: Tensor
    dy: Tensor | None
    layer: nn.Module | None
    weight: Tensor | NF4Weight
    A: Tensor
    B: Tensor

    @property
    def dense(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize(self.x.dtype)

    def to(self, dtype: torch.dtype) -> Inputs:
        """x, dy, A and B in another dtype, as new leaves."""
        x, A, B = (layers.leaf(t, dtype) for t in (self.x, self.A, self.B))
        return Inputs(x, None if self.dy is None else self.dy.to(dtype), self.layer, self.weight, A, B)


def inputs(device: torch.device, M: int, N: int, K: int, R: int, weight: str, backward: bool) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    dense = random(N, K) / K**0.5
    layer = layers.frozen(dense, weight)
    x, A, B = random(M, K), (random(R, K) / K**0.5).float(), (random(N, R) / R**0.5).float()
    for leaf in (x, A, B):
        leaf.requires_grad_(backward)
    return Inputs(x, random(M, N) if backward else None, layer, layers.weight_of(dense, layer, weight), A, B)


def over_weight(i: Inputs, weight: Tensor | NF4Weight) -> Outputs:
    """The formula in i's dtypes."""
    return gradients(lambda: formula(i.x, weight, i.A, i.B, SCALING), i.dy, x=i.x, A=i.A, B=i.B)


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    if dtype is None:
        return over_weight(i, i.weight)
    return over_weight(i.to(dtype), i.weight.to(dtype) if isinstance(i.weight, Tensor) else i.weight)


def without_adapter(i: Inputs, dense: Tensor) -> Outputs:
    return gradients(lambda: linear(i.x, dense), i.dy, x=i.x)


# Sides: each prepares for a set of inputs and returns the call to time.


def fastpeft(i: Inputs, backend: str | None = None, dtype: torch.dtype = torch.float32, fold: bool = False):
    A, B = layers.leaf(i.A, dtype), layers.leaf(i.B, dtype)

    def y() -> Tensor:
        return ops.lora_linear(i.x, i.weight, A, B, SCALING, fold=fold, backend=backend)

    if backend is not None:
        micro.require_backend(y)
    return lambda: gradients(y, i.dy, x=i.x, A=A, B=B)


def frozen(i: Inputs):
    dense = i.dense
    return lambda: without_adapter(i, dense)


def compiled(i: Inputs):
    return lambda: gradients(lambda: _compiled_formula(i.x, i.weight, i.A, i.B, SCALING), i.dy, x=i.x, A=i.A, B=i.B)


_compiled_formula = torch.compile(formula, dynamic=False)


def peft(i: Inputs, dtype: torch.dtype):
    return _of_layer(i, dtype, lambda layer: layer)


def unsloth(i: Inputs):
    return _of_layer(i, torch.float32, peers.unsloth_decode if i.dy is None else peers.unsloth_layer)


def axolotl(i: Inputs):
    return _of_layer(i, torch.float32, peers.axolotl_layer)


def _of_layer(i: Inputs, dtype: torch.dtype, make):
    """make: a LoRA linear of peft -> a function of x."""
    layer = layers.peft_lora(i.layer, i.A, i.B, SCALING, dtype)
    function = make(layer)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lambda: gradients(lambda: function(i.x), i.dy, x=i.x, A=A, B=B)


def torchao(i: Inputs):
    weight, nf4_linear = peers.torchao_nf4(i.dense)

    def y() -> Tensor:
        return peers.plain_lora(nf4_linear(i.x, weight), i.x, i.A, i.B, SCALING)

    return lambda: gradients(y, i.dy, x=i.x, A=i.A, B=i.B)


def gemlite(i: Inputs):
    layer = peers.gemlite_int4(i.dense)
    return lambda: gradients(lambda: layer(i.x), None)


def _float64(i: Inputs) -> Inputs:
    return i.to(torch.float64)


def _torchao_exact(i: Inputs) -> Outputs:
    return over_weight(_float64(i), peers.torchao_dequantized(i.dense).double())


def _gemlite_exact(i: Inputs) -> Outputs:
    return without_adapter(_float64(i), peers.gemlite_dequantized(i.dense))


def sides(weight: str, backward: bool, compile_too: bool) -> list[Side]:
    found = [Side("fastpeft", fastpeft)]
    found += [Side(f"fastpeft, {name}", partial(fastpeft, backend=name)) for name in ("cuda", "triton", "eager")]
    found += [
        Side("fastpeft, folded", partial(fastpeft, fold=True)),
        Side("fastpeft, bf16 adapter", partial(fastpeft, dtype=torch.bfloat16)),
        Side("frozen layer, bf16, no adapter", frozen, lambda i: without_adapter(_float64(i), i.dense.double())),
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
        found.append(Side("torchao nf4", torchao, _torchao_exact, peer=True))
        if not backward:
            found.append(Side("gemlite int4, no adapter", gemlite, _gemlite_exact, peer=True))
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
