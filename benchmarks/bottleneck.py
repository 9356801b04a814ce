"""bottleneck against PyTorch's operations and torch.compile: python -m benchmarks.bottleneck

Parameters are float32 and representable in bfloat16; all sides compute in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from benchmarks import layers, micro
from benchmarks.costs import Cost
from benchmarks.harness import Case, Outputs, Side, gradients
from fastpeft import ops
from fastpeft.reference.bottleneck import bottleneck as formula

SCALING, ACTIVATION = 1.0, "gelu"


@dataclass(frozen=True)
class Inputs:
    """x, dy: [M, K] bf16. down: [R, K], up: [K, R], down_bias: [R], up_bias: [K] float32. The residual is x."""

    x: Tensor
    down: Tensor
    up: Tensor
    down_bias: Tensor
    up_bias: Tensor
    dy: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dy"}


def inputs(device: torch.device, M: int, K: int, R: int) -> Inputs:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(torch.bfloat16)

    parameters = random(R, K, scale=K**-0.5), random(K, R, scale=R**-0.5), random(R), random(K)
    x = random(M, K).requires_grad_(True)
    return Inputs(x, *(t.float().requires_grad_(True) for t in parameters), random(M, K))


def of(i: Inputs, function, **options) -> Outputs:
    options |= dict(residual=i.x, activation=ACTIVATION, scaling=SCALING)
    return gradients(lambda: function(*i.leaves.values(), **options), i.dy, **i.leaves)


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    if dtype is not None:
        i = Inputs(*(layers.leaf(t, dtype) for t in i.leaves.values()), i.dy.to(dtype))
    return of(i, formula)


def fastpeft(i: Inputs, backend: str | None = None):
    if backend is not None:
        micro.require_backend(lambda: ops.bottleneck(*i.leaves.values(), backend=backend))
    return lambda: of(i, ops.bottleneck, backend=backend)


def pytorch(i: Inputs):
    """The formula, as modules of PyTorch compute it and keep what autograd asks for."""
    return lambda: of(i, formula)


_compiled_formula = torch.compile(formula, dynamic=False)


def compiled(i: Inputs):
    return lambda: of(i, _compiled_formula)


def cost(M: int, K: int, R: int) -> Cost:
    """x, dy, y and dx once, parameters and their gradients; two products forward, four backward."""
    parameters = 4 * (2 * R * K + R + K)
    return Cost(4 * M * K + parameters, 4 * M * K + parameters, 20 * M * R, 6 * 2 * M * K * R)


# tokens, features, ranks: a reduction of 64 or 16 of Llama-3-8B, of 9 of SmolLM2-135M
_SIZES = {
    "smoke": [(5, 72, 4)],
    "quick": {"cuda": [(8192, 4096, 64), (8192, 4096, 256)], "cpu": [(512, 576, 64)]},
    "full": [(M, K, R) for K in (4096, 576) for R in (16, 64, 256) for M in (1, 512, 2048, 8192, 32768)],
}


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    sizes = _SIZES[suite]
    sides = [Side("fastpeft", fastpeft)]
    sides += [Side(f"fastpeft, {name}", partial(fastpeft, backend=name)) for name in ("triton", "eager")]
    sides.append(Side("PyTorch", pytorch))
    if suite == "full":
        sides.append(Side("torch.compile of the formula", compiled))
    for M, K, R in sizes[device.type] if isinstance(sizes, dict) else sizes:
        shape = {"M": M, "K": K, "R": R}
        yield Case({"pass": "forward+backward"} | shape, partial(inputs, device, **shape), sides, run_formula,
                   cost(**shape))  # fmt: skip


if __name__ == "__main__":
    micro.main("bottleneck", cases)
