"""nf4_dequantize, nf4_quantize and nf4_merge against bitsandbytes and torch.compile: python -m benchmarks.nf4"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks import costs, layers, micro, peers
from benchmarks.harness import Absent, Case, Outputs, Side
from benchmarks.shapes import LINEARS
from fastpeft import NF4Weight, ops
from fastpeft.reference import nf4 as formula

SCALING, RANK = 2.0, 16


@dataclass(frozen=True)
class Inputs:
    """dense: [N, K] bf16. layer: its Linear4bit, None where bitsandbytes is absent. A, B: an adapter, bf16."""

    dense: Tensor
    layer: nn.Module | None
    weight: NF4Weight
    A: Tensor
    B: Tensor


def inputs(device: torch.device, N: int, K: int) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    dense = random(N, K) / K**0.5
    layer = layers.frozen(dense, "nf4")
    A, B = random(RANK, K) / K**0.5, random(N, RANK) / RANK**0.5
    return Inputs(dense, layer, layers.weight_of(dense, layer, "nf4"), A, B)


def _bitsandbytes(i: Inputs):
    if i.layer is None:
        raise Absent("bitsandbytes is not installed")
    import bitsandbytes.functional as bnb

    return bnb


# nf4_dequantize


def dequantize_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    return {"W": formula.nf4_dequantize(i.weight, dtype or torch.bfloat16)}


def dequantize(i: Inputs, backend: str | None = None):
    if backend is not None:
        micro.require_backend(lambda: ops.nf4_dequantize(i.weight, backend=backend))
    return lambda: {"W": ops.nf4_dequantize(i.weight, backend=backend)}


def dequantize_bitsandbytes(i: Inputs):
    bnb = _bitsandbytes(i)
    if i.weight.shape[1] % i.weight.blocksize and not i.dense.is_cuda:
        raise Absent("bitsandbytes is wrong on a CPU where a block crosses a row")
    return lambda: {"W": bnb.dequantize_4bit(i.layer.weight, i.layer.weight.quant_state)}


_compiled_dequantize = torch.compile(formula.nf4_dequantize, dynamic=False)


def dequantize_compiled(i: Inputs):
    return lambda: {"W": _compiled_dequantize(i.weight, torch.bfloat16)}


def dequantize_torchao(i: Inputs):
    weight, _ = peers.torchao_nf4(i.dense)
    return lambda: {"W": weight.get_original_weight()}


# nf4_quantize: with absmax in float32; the second level is a thousandth of the work.


def quantize_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    packed, absmax = formula.nf4_quantize(i.dense, 64)
    return {"packed": packed, "absmax": absmax if dtype is None else absmax.to(dtype)}


def quantize(i: Inputs, backend: str | None = None):
    def call(backend):
        weight = ops.nf4_quantize(i.dense, double_quant=False, backend=backend)
        return {"packed": weight.packed, "absmax": weight.absmax}

    if backend is not None:
        micro.require_backend(lambda: call(backend))
    return lambda: call(backend)


def quantize_bitsandbytes(i: Inputs):
    bnb = _bitsandbytes(i)

    def call():
        packed, state = bnb.quantize_4bit(i.dense, blocksize=64, quant_type="nf4")
        return {"packed": packed.view(-1), "absmax": state.absmax}

    return call


# nf4_merge


def merge_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    if dtype is None:
        return {"W": formula.nf4_merge(i.weight, i.A, i.B, SCALING, dtype=torch.bfloat16)}
    return {"W": formula.nf4_merge(i.weight, i.A.to(dtype), i.B.to(dtype), SCALING, dtype=dtype)}


def merge(i: Inputs, backend: str | None = None):
    def call():
        return {"W": ops.nf4_merge(i.weight, i.A, i.B, SCALING, dtype=torch.bfloat16, backend=backend)}

    if backend is not None:
        micro.require_backend(call)
    return call


def merge_bitsandbytes(i: Inputs):
    """Rounds twice: the dequantized weight, then the sum."""
    bnb = _bitsandbytes(i)
    dequantize_bitsandbytes(i)  # refuses what it cannot do
    return lambda: {
        "W": bnb.dequantize_4bit(i.layer.weight, i.layer.weight.quant_state).addmm_(i.B, i.A, alpha=SCALING)
    }


def _sides(function, *others: Side) -> list[Side]:
    forced = [Side(f"fastpeft, {name}", partial(function, backend=name)) for name in ("cuda", "triton", "eager")]
    return [Side("fastpeft", function), *forced, *others]


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    compiled = [Side("torch.compile of the formula", dequantize_compiled)] if suite != "smoke" else []
    torchao = Side(
        "torchao nf4", dequantize_torchao, lambda i: {"W": peers.torchao_dequantized(i.dense).double()}, peer=True
    )
    of_op = {
        "nf4_dequantize": (
            dequantize_formula,
            _sides(dequantize, Side("bitsandbytes", dequantize_bitsandbytes), *compiled, torchao),
            lambda N, K: costs.nf4_dequantize(N * K, 2),
        ),
        "nf4_quantize": (
            quantize_formula,
            _sides(quantize, Side("bitsandbytes", quantize_bitsandbytes)),
            lambda N, K: costs.nf4_quantize(N * K, 2),
        ),
        "nf4_merge": (
            merge_formula,
            _sides(merge, Side("bitsandbytes, then addmm", merge_bitsandbytes)),
            lambda N, K: costs.nf4_merge(N, K, RANK, 2),
        ),
    }
    for (model, layer), (name, (run_formula, sides, cost)) in product(_layers(suite, device.type), of_op.items()):
        N, K = LINEARS[model][layer]
        yield Case(
            labels={"function": name, "model": model, "layer": layer, "N": N, "K": K},
            inputs=partial(inputs, device, N, K),
            sides=sides,
            formula=run_formula,
            cost=cost(N, K),
        )


def _layers(suite: str, device: str) -> list[tuple[str, str]]:
    if suite == "smoke":
        return [("smoke", "odd")]
    if suite == "quick":
        return [("Llama-3-8B", "q, o"), ("Llama-3-8B", "down")] if device == "cuda" else [("SmolLM2-135M", "down")]
    return [(model, layer) for model in LINEARS if model != "smoke" for layer in LINEARS[model]]


if __name__ == "__main__":
    micro.main("nf4", cases)
