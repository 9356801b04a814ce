"""prefix_attention against the attention without a prefix, peft's path and flex_attention.

    python -m benchmarks.prefix_attention

peft gives the prefix to the model as a cache. The keys are then longer than the queries, so that transformers' sdpa
path needs a mask [B, 1, S, P + S], and repeats the heads of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks import layers, micro
from benchmarks.costs import Cost
from benchmarks.harness import Absent, Case, Outputs, Side, gradients
from fastpeft import ops
from fastpeft.reference.prefix_attention import prefix_attention as formula

_BF16, _FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Inputs:
    """q, do: [B, H, S, D]; k, v: [B, Hkv, T, D], bf16; prefix_k, prefix_v: [Hkv, P, D] float32.

    do is None where no gradients are asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    do: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(None if t is None else layers.leaf(t, dtype) for t in self.tensors))

    @property
    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def inputs(device: torch.device, B: int, H: int, Hkv: int, S: int, T: int, P: int, D: int, backward: bool) -> Inputs:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    q, k, v = random(B, H, S, D), random(B, Hkv, T, D), random(B, Hkv, T, D)
    prefix_k, prefix_v = random(Hkv, P, D).float(), random(Hkv, P, D).float()
    for leaf in (q, k, v, prefix_k, prefix_v):
        leaf.requires_grad_(backward)
    return Inputs(q, k, v, prefix_k, prefix_v, random(B, H, S, D) if backward else None)


def _gradients(i: Inputs, y) -> Outputs:
    return gradients(y, i.do, q=i.q, k=i.k, v=i.v, prefix_k=i.prefix_k, prefix_v=i.prefix_v)


def run_formula(i: Inputs, dtype: torch.dtype | None) -> Outputs:
    i = i if dtype is None else i.to(dtype)
    return _gradients(i, lambda: formula(i.q, i.k, i.v, i.prefix_k, i.prefix_v))


def fastpeft(i: Inputs, backend: str | None = None):
    def y() -> Tensor:
        return ops.prefix_attention(i.q, i.k, i.v, i.prefix_k, i.prefix_v, backend=backend)

    if backend is not None:
        micro.require_backend(y)
    return lambda: _gradients(i, y)


def _causal_offset(i: Inputs) -> Tensor:
    """[S, T + P], True where a query sees: the last query stands at the last key."""
    S, columns = i.q.shape[2], i.k.shape[2] + i.prefix_k.shape[1]
    row = torch.arange(columns - S, columns, device=i.q.device).unsqueeze(1)
    return torch.arange(columns, device=i.q.device) <= row


def _with_prefix(i: Inputs) -> tuple[Tensor, Tensor]:
    pairs = ((i.prefix_k, i.k), (i.prefix_v, i.v))
    return tuple(torch.cat([prefix.to(real.dtype).expand(len(real), -1, -1, -1), real], 2) for prefix, real in pairs)


def peft(i: Inputs):
    mask = _causal_offset(i).expand(len(i.q), 1, -1, -1).contiguous()  # made once for all layers of a model
    groups = i.q.shape[1] // i.k.shape[1]

    def y() -> Tensor:
        k, v = (t.repeat_interleave(groups, 1) for t in _with_prefix(i))
        return sdpa(i.q, k, v, attn_mask=mask)

    return lambda: _gradients(i, y)


def _attend(i: Inputs) -> Tensor:
    return sdpa(i.q, i.k, i.v, is_causal=i.q.shape[2] > 1, enable_gqa=i.q.shape[1] != i.k.shape[1])


def without_prefix(i: Inputs):
    return lambda: gradients(lambda: _attend(i), i.do, q=i.q, k=i.k, v=i.v)


def without_prefix_exact(i: Inputs) -> Outputs:
    """A prefix that nobody sees: softmax over the real keys alone, in float64."""
    i = i.to(torch.float64)
    return without_prefix(i)()


def flex(i: Inputs):
    if not i.q.is_cuda:
        raise Absent("flex_attention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    S, T, P = i.q.shape[2], i.k.shape[2], i.prefix_k.shape[1]

    def visible(b, h, row, column):
        return column <= row + (P + T - S)

    mask = create_block_mask(visible, None, None, S, P + T, device=str(i.q.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def y() -> Tensor:
        return compiled(i.q, *_with_prefix(i), block_mask=mask, enable_gqa=True)

    return lambda: _gradients(i, y)


def cost(B: int, H: int, Hkv: int, S: int, T: int, P: int, D: int, backward: bool) -> Cost:
    """Each tensor once. Two products of the visible scores forward, five more backward (one is made again)."""
    visible = B * H * (S * P + S * T - S * (S - 1) // 2)
    q, kv, prefix = B * H * S * D * _BF16, 2 * B * Hkv * T * D * _BF16, 2 * Hkv * P * D * _FP32
    if not backward:
        return Cost(q + kv + prefix, q, 0, 4 * visible * D)
    return Cost(2 * q + kv + prefix, 2 * q + kv + prefix, 0, 14 * visible * D)


# heads, key heads, head size
_HEADS = {"Llama-3-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64), "smoke": (4, 2, 16)}


def _sizes(suite: str, device: str) -> Iterator[tuple[str, int, int, int, int]]:
    """model, B, S, T, P; S of 1 is decoding. B * S * T is bounded by the formula's float64 scores [B, H, S, P + T]."""
    if suite == "smoke":
        yield from (("smoke", 2, 9, 9, 3), ("smoke", 2, 1, 9, 3))
    elif device == "cpu":
        yield from (("SmolLM2-135M", 1, 256, 256, P) for P in (32,))
    elif suite == "quick":
        yield from (("Llama-3-8B", 1, 4096, 4096, 64), ("Llama-3-8B", 8, 1, 4096, 64))
    else:
        for model in ("Llama-3-8B", "SmolLM2-135M"):
            yield from ((model, B, S, S, P) for B, S in ((8, 512), (4, 1024), (1, 4096)) for P in (16, 64, 128))
            yield from ((model, B, 1, 4096, P) for B in (1, 8) for P in (64, 1024))


def cases(suite: str, device: torch.device) -> Iterator[Case]:
    sides = [Side("fastpeft", fastpeft)]
    sides += [Side(f"fastpeft, {name}", partial(fastpeft, backend=name)) for name in ("cuda", "triton", "eager")]
    sides += [
        Side("sdpa, no prefix", without_prefix, without_prefix_exact),
        Side("peft's path: sdpa, mask", peft),
    ]
    if suite == "full":
        sides.append(Side("flex_attention", flex, peer=True))
    for model, B, S, T, P in _sizes(suite, device.type):
        H, Hkv, D = _HEADS[model]
        sizes = {"B": B, "H": H, "Hkv": Hkv, "S": S, "T": T, "P": P, "D": D}
        backward = S > 1
        labels = {"model": model, "pass": "forward+backward" if backward else "forward"}
        yield Case(labels | sizes, partial(inputs, device, **sizes, backward=backward), sides, run_formula,
                   cost(**sizes, backward=backward))  # fmt: skip


if __name__ == "__main__":
    micro.main("prefix_attention", cases)
