"""dora_norm and dora_linear against lora_linear, peft and axolotl: python -m benchmarks.dora

fastpeft's side of dora_linear computes the norm in every call, as peft does; "norm kept" is what a module does from the
second forward of an optimizer step on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks import layers, lora_linear, micro, peers
from benchmarks.costs import Cost, nf4_storage_bytes
from benchmarks.harness import Case, Outputs, Side, gradients
from benchmarks.lora_linear import SCALING
from benchmarks.shapes import LINEARS
from fastpeft import ops
from fastpeft.reference import dora as formula

_BF16, _FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Inputs:
    """lora: what lora_linear takes; magnitude: [N] float32, near the norms."""

    lora: lora_linear.Inputs
    magnitude: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.lora.to(dtype), layers.leaf(self.magnitude, dtype))


def inputs(device: torch.device, **sizes) -> Inputs:
    lora = lora_linear.inputs(device, **sizes)
    norm = formula.dora_norm(lora.weight, lora.A, lora.B, SCALING)
    magnitude = norm * (1 + 0.1 * torch.randn_like(norm))
    return Inputs(lora, magnitude.requires_grad_(sizes["backward"]))


def _gradients(i: Inputs, y, A: Tensor | None = None, B: Tensor | None = None, m: Tensor | None = None) -> Outputs:
    A, B, m = (own if given is None else given for own, given in ((i.lora.A, A), (i.lora.B, B), (i.magnitude, m)))
    return gradients(y, i.lora.dy, x=i.lora.x, A=A, B=B, magnitude=m)


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    weight = i.lora.weight
    if dtype is not None:
        i, weight = i.to(dtype), weight.to(dtype) if isinstance(weight, Tensor) else weight
    lora = i.lora
    return _gradients(i, lambda: formula.dora_linear(lora.x, weight, lora.A, lora.B, i.magnitude, SCALING))


def fastpeft(i: Inputs, backend: str | None = None, keep_norm: bool = False):
    lora = i.lora
    norm = ops.dora_norm(lora.weight, lora.A, lora.B, SCALING) if keep_norm else None

    def y() -> Tensor:
        options = {"norm": norm, "backend": backend}
        return ops.dora_linear(lora.x, lora.weight, lora.A, lora.B, i.magnitude, SCALING, **options)

    if backend is not None:
        micro.require_backend(y)
    return lambda: _gradients(i, y)


def peft(i: Inputs, make=lambda layer: layer):
    """peft's layer; make: another function of x over its parameters."""
    lora = i.lora
    layer = layers.peft_lora(lora.layer, lora.A, lora.B, SCALING, torch.float32, use_dora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data.copy_(i.magnitude.detach())
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    function = make(layer)
    return lambda: _gradients(i, lambda: function(lora.x), A, B, magnitude)


def without_magnitude(i: Inputs):
    return lora_linear.fastpeft(i.lora)


# dora_norm


def norm_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    if dtype is not None:
        i = i.to(dtype)
    return {"norm": formula.dora_norm(i.lora.weight, i.lora.A, i.lora.B, SCALING)}


def norm(i: Inputs, backend: str | None = None):
    def call() -> Outputs:
        return {"norm": ops.dora_norm(i.lora.weight, i.lora.A, i.lora.B, SCALING, backend=backend)}

    if backend is not None:
        micro.require_backend(call)
    return call


def norm_of_weights(i: Inputs):
    """What peft does, without its detour over an identity matrix: B A and W in full, in float32."""
    lora = i.lora

    @torch.no_grad()
    def call() -> Outputs:
        weight = lora.weight.float() if isinstance(lora.weight, Tensor) else lora.weight.dequantize(torch.float32)
        return {"norm": torch.linalg.vector_norm(weight + SCALING * (lora.B @ lora.A), dim=1)}

    return call


def _forced(function) -> list[Side]:
    return [Side(f"fastpeft, {name}", partial(function, backend=name)) for name in ("cuda", "triton", "eager")]


def _sides(backward: bool) -> list[Side]:
    found = [
        Side("fastpeft", fastpeft),
        *_forced(fastpeft),
        Side("fastpeft, norm kept", partial(fastpeft, keep_norm=True)),
        Side("lora_linear, no magnitude", without_magnitude, lambda i: lora_linear.run_formula(i.lora, torch.float64)),
        Side("peft", peft),
    ]
    if backward:
        found.append(Side("axolotl", partial(peft, make=peers.axolotl_layer), peer=True))
    return found


def linear_cost(M: int, N: int, K: int, R: int, weight: str, backward: bool) -> Cost:
    """That of lora_linear, the magnitude, and B A for the norm; W is read once for both."""
    base = lora_linear.cost(M, N, K, R, weight, backward)
    written = base.written_bytes + (N * _FP32 if backward else 0)
    return Cost(base.read_bytes + N * _FP32, written, 0, base.tensor_core_ops + 2 * N * K * R)


def norm_cost(N: int, K: int, R: int, weight: str) -> Cost:
    frozen_bytes = nf4_storage_bytes(N * K) if weight == "nf4" else N * K * _BF16
    return Cost(frozen_bytes + R * (N + K) * _FP32, N * _FP32, 4 * N * K, 2 * N * K * R)


_QUICK = {"cuda": [("Llama-3-8B", "q, o"), ("Llama-3-8B", "down")], "cpu": [("SmolLM2-135M", "down")]}
_M = {"smoke": (5,), "quick": {"cuda": (8192,), "cpu": (512,)}, "full": (2048, 8192)}


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    if suite == "full":
        chosen = [(model, layer) for model in LINEARS if model != "smoke" for layer in LINEARS[model]]
    else:
        chosen = [("smoke", "odd")] if suite == "smoke" else _QUICK[device.type]
    R = 16
    tokens = _M[suite][device.type] if isinstance(_M[suite], dict) else _M[suite]
    for (model, layer), weight in product(chosen, ("nf4", "dense")):
        N, K = LINEARS[model][layer]
        labels = {"function": "dora_norm", "model": model, "layer": layer, "pass": "forward", "weight": weight}
        sizes = {"N": N, "K": K, "R": R, "weight": weight}
        yield Case(
            labels=labels | {"M": "", "N": N, "K": K, "R": R},
            inputs=partial(inputs, device, M=1, backward=False, **sizes),
            sides=[Side("fastpeft", norm), *_forced(norm), Side("torch, B A and W in full", norm_of_weights)],
            formula=norm_formula,
            cost=norm_cost(**sizes),
        )
        for M, backward in [(1, False)] + [(M, True) for M in tokens]:
            labels = labels | {"function": "dora_linear", "pass": "forward+backward" if backward else "forward"}
            yield Case(
                labels=labels | {"M": M, "N": N, "K": K, "R": R},
                inputs=partial(inputs, device, M=M, backward=backward, **sizes),
                sides=_sides(backward),
                formula=run_formula,
                cost=linear_cost(M=M, backward=backward, **sizes),
            )


if __name__ == "__main__":
    micro.main("dora", cases)
