"""The loss of a causal language model against PyTorch's and Liger's: python -m benchmarks.cross_entropy"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import layers, micro, peers
from benchmarks.costs import Cost
from benchmarks.harness import Absent, Case, Outputs, Side, gradients
from fastpeft import ops
from fastpeft.reference.cross_entropy import cross_entropy as formula


@dataclass(frozen=True)
class Inputs:
    """logits: [M, V] bf16; labels: [M]."""

    logits: Tensor
    labels: Tensor


def inputs(device: torch.device, M: int, V: int) -> Inputs:
    logits = (2 * torch.randn(M, V, device=device)).to(torch.bfloat16).requires_grad_(True)
    return Inputs(logits, torch.randint(0, V, (M,), device=device))


def step(mean_loss, logits: Tensor, labels: Tensor) -> Outputs:
    return gradients(lambda: mean_loss(logits, labels), torch.ones((), device=logits.device), logits=logits)


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    logits = i.logits if dtype is None else layers.leaf(i.logits, dtype)
    return step(lambda logits, labels: formula(logits, labels).mean(), logits, i.labels)


def fastpeft(i: Inputs):
    return lambda: step(lambda logits, labels: ops.cross_entropy(logits, labels).mean(), i.logits, i.labels)


def torch_float32(i: Inputs):
    """As transformers does it: a float32 copy of the logits first."""
    return lambda: step(lambda x, labels: functional.cross_entropy(x.float(), labels), i.logits, i.labels)


_compiled_formula = torch.compile(lambda logits, labels: formula(logits, labels).mean(), dynamic=False)


def compiled(i: Inputs):
    return lambda: step(_compiled_formula, i.logits, i.labels)


def liger(i: Inputs):
    """It writes the gradient over the logits: these are a copy, and hold gradients from the second call on."""
    loss = peers.module("liger_kernel.transformers", "liger-kernel").LigerCrossEntropyLoss()
    if not i.logits.is_cuda:
        raise Absent("liger-kernel needs a GPU")
    leaf = i.logits.detach().clone().requires_grad_(True)
    return lambda: step(loss, leaf, i.labels)


def cost(M: int, V: int) -> Cost:
    """Logits once, their gradient once, labels; per logit an exponential and a subtraction, and as much in backward."""
    return Cost(M * V * 2 + M * 8, M * V * 2, 4 * M * V)


# tokens, vocabulary of Llama-3, Qwen2.5 and SmolLM2
_SIZES = {
    "smoke": [(7, 97)],
    "quick": {"cuda": [(2048, 128256)], "cpu": [(512, 49152)]},
    "full": [(M, V) for V in (128256, 152064, 49152) for M in (512, 4096)],
}


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    sizes = _SIZES[suite]
    sides = [Side("fastpeft", fastpeft), Side("torch, float32 copy", torch_float32)]
    if suite == "full":
        sides.append(Side("torch.compile of the formula", compiled))
    sides.append(Side("liger", liger, peer=True))
    for M, V in sizes[device.type] if isinstance(sizes, dict) else sizes:
        yield Case({"pass": "forward+backward", "M": M, "V": V}, partial(inputs, device, M, V), sides, run_formula,
                   cost(M, V))  # fmt: skip


if __name__ == "__main__":
    micro.main("cross_entropy", cases)
