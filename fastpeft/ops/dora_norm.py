"""dora_norm: the row norms of a frozen weight, dense or 4-bit, with its low-rank update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.ops.lora_linear import _WEIGHT, _describe, _flatten, _unflatten, autocast_dtype
from fastpeft.ops.lora_linear_backends import call, storage
from fastpeft.quant import NF4Weight, native_storage
from fastpeft.reference.dora import dora_norm as _reference
from fastpeft.reference.dora import norm_dtype
from fastpeft.reference.nf4 import ABSMAX_BLOCKSIZE


def _of_kernels(A: Tensor, weight: Tensor | NF4Weight, B: Tensor) -> str | None:
    if type(weight) is Tensor and weight.dtype not in backends.HALF_TYPES:
        return f"weight is {weight.dtype}; the kernels take bf16, fp16 and NF4"
    if torch.float64 in (A.dtype, B.dtype):
        return "an adapter is torch.float64; the kernels take up to float32"
    return None


_RULES = {
    "cuda": lambda *args: _of_kernels(*args) or backends.needs_cuda_module(*args),
    "triton": lambda *args: _of_kernels(*args) or backends.needs_triton(*args),
    "eager": backends.always,
    "reference": backends.always,
}

# Elements of the weight that are in work at a time: 1 MB of float32, which stays in the second-level caches of a CPU
# and is little beside any weight.
_BLOCK = 2**19


def dora_norm(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """`||W[n] + scaling * B[n] A||_2` -> [N] float32 (float64 where weight, A or B is), detached.

    weight: [N, K] in any float dtype, or an NF4Weight. A: [R, K], B: [N, R]: any float dtype. scaling: a float, or a
    tensor with one element, which is never read on the host. The sum of squares is direct: the expansion
    `||W||^2 + 2 scaling <B, W A^T> + ...` cancels where the update is close to -W, and rows of norm 1e-4 come out as 0.
    One pass over the stored weight, in blocks of rows: memory beside the result is some megabytes, or some rows.

    Raises ValueError (shapes, devices, an unable backend) or TypeError (dtypes) before anything is computed.
    """
    _check(weight, A, B, scaling)
    with torch.no_grad():
        if isinstance(scaling, Tensor):
            B, scaling = B * scaling, 1.0  # as lora_linear does: the norm is that of the weight which the layer uses
        if torch.compiler.is_compiling():
            return torch.ops.fastpeft.dora_norm(*_flatten(weight), A, B, scaling, backend)
        return _norm(weight, A, B, scaling, backend)


def _check(weight, A, B, scaling) -> None:
    if not isinstance(weight, Tensor | NF4Weight) or len(weight.shape) != 2:
        raise TypeError(f"weight must be a tensor [N, K] or an NF4Weight; got {_describe(weight)}")
    N, K = weight.shape
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or A.shape[0] != B.shape[1]:
        raise ValueError(f"A is {tuple(A.shape)} and B is {tuple(B.shape)}; for a weight of [{N}, {K}] "
                         f"they must be [R, {K}] and [{N}, R]")  # fmt: skip
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        raise ValueError(f"scaling is {_describe(scaling)}; it must be a number or a tensor with one element")
    if not isinstance(scaling, int | float | Tensor):
        raise TypeError(f"scaling is {_describe(scaling)}; it must be a number or a tensor with one element")
    for name, tensor in {"weight": weight, "A": A, "B": B}.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight.device}")


def _norm(weight, A, B, scaling, backend) -> Tensor:
    name = backends.choose("dora_norm", _RULES, A, weight, B, backend=backend)
    if name == "reference":
        return _reference(weight, A, B, scaling)
    if name != "eager":
        return _by_kernels(name, weight, A, B, float(scaling))
    # Autocast would round the products to 16 bits.
    guard = torch.autocast(A.device.type, enabled=False) if autocast_dtype(A) is not None else nullcontext()
    with guard:
        return _eager(weight, A, B, scaling)


def _by_kernels(name, weight, A, B, scaling) -> Tensor:
    """A and B as they are where they share a type that goes with the weight, else in float32."""
    is_nf4 = type(weight) is NF4Weight
    own = A.dtype == B.dtype and A.dtype in (backends.HALF_TYPES if is_nf4 else (weight.dtype,))
    A, B = (t.detach().to(A.dtype if own else torch.float32).contiguous() for t in (A, B))
    weight = weight if is_nf4 else weight.contiguous()  # that of a Conv1D is copied
    norm = torch.empty(B.shape[0], dtype=torch.float32, device=B.device)
    if name == "triton":
        from fastpeft.triton_kernels import dora_norm as kernels

        with _native.stream_on(norm.device):
            kernels.dora_norm(storage(weight, weight.dtype), A, B, scaling, None, norm)
        return norm
    call(
        "dora_norm",
        A,
        dict(N=B.shape[0], K=A.shape[1], R=A.shape[0]),
        dtype=A.dtype if own else torch.bfloat16 if is_nf4 else weight.dtype,
        weight=None if is_nf4 else weight,
        nf4=native_storage(weight) if is_nf4 else None,
        lora_a=A,
        lora_b=B,
        adapter_dtype=A.dtype,
        scaling=scaling,
        scaling_tensor=None,
        norm=norm,
    )
    return norm


def _eager(weight, A, B, scaling) -> Tensor:
    wide = norm_dtype(weight, A, B)
    A, B = A.to(wide), B.to(wide)
    norm = torch.empty(weight.shape[0], dtype=wide, device=A.device)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    blocks = _dense_blocks if isinstance(weight, Tensor) else _nf4_blocks
    for block, B_rows, norm_rows in zip(blocks(weight, rows, wide), B.split(rows), norm.split(rows), strict=True):
        block.addmm_(B_rows, A, alpha=scaling)
        torch.linalg.vector_norm(block, dim=1, out=norm_rows)
    return norm


def _dense_blocks(weight: Tensor, rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Copies of `rows` rows at a time; each is overwritten by the next."""
    memory = torch.empty(min(rows, weight.shape[0]), weight.shape[1], dtype=dtype, device=weight.device)
    for block in weight.split(rows):
        yield memory[: block.shape[0]].copy_(block)


def _nf4_blocks(weight: NF4Weight, rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    N, K = weight.shape
    size, numel = weight.blocksize, prod(weight.shape)
    for row in range(0, N, rows):
        start, end = row * K, min(row + rows, N) * K
        # Quantization blocks may cross rows: the whole blocks that hold these rows, or all to the end of the weight.
        first, last = start // size, min(-(-end // size), -(-numel // size))
        stored = min(last * size, numel) - first * size
        shape = (stored // size, size) if stored % size == 0 else (1, stored)
        packed = weight.packed[first * size // 2 : -(-min(last * size, numel) // 2)]
        part = NF4Weight(packed, _absmax(weight, first, last), shape, size, dtype).dequantize(dtype)
        yield part.view(-1)[start - first * size : end - first * size].view(-1, K)


def _absmax(weight: NF4Weight, first: int, last: int) -> Tensor:
    """Of the quantization blocks from `first` up to `last`; float32."""
    if not weight.nested:
        return weight.absmax[first:last]
    start, size = first // ABSMAX_BLOCKSIZE, ABSMAX_BLOCKSIZE
    absmax, scale = weight.absmax[start * size : last], weight.absmax_scale[start : -(-last // size)]
    return replace(weight, absmax=absmax, absmax_scale=scale).absmax_float()[first - start * size :]


@torch.library.custom_op(
    "fastpeft::dora_norm",
    mutates_args=(),
    schema=f"({_WEIGHT}, Tensor A, Tensor B, float scaling, str? backend) -> Tensor",
)
def _op(*arguments):
    *weight, A, B, scaling, backend = arguments
    return _norm(_unflatten(*weight), A, B, scaling, backend)


@_op.register_fake
def _(*arguments):
    *weight, A, B, _, _ = arguments
    return B.new_empty(B.shape[0], dtype=norm_dtype(_unflatten(*weight), A, B))
