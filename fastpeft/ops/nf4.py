"""nf4_quantize and nf4_dequantize: into the 4-bit storage of bitsandbytes and back; nf4_merge: back, with an update."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.quant import NF4Weight, native_dtype, native_storage
from fastpeft.reference import nf4 as formula


def nf4_quantize(
    weight: Tensor, blocksize: int = 64, double_quant: bool = True, *, backend: str | None = None
) -> NF4Weight:
    """weight: [N, K] bf16|fp16|fp32 -> NF4Weight, the bytes that bitsandbytes writes on a CPU.

    blocksize: 32, 64, ... 4096 elements of the flattened weight that share an absmax. double_quant: store the absmax
    vector in 8 bits. Every backend writes the same bytes. Not differentiable. Raises ValueError for other shapes,
    dtypes and blocksizes, and for a backend that cannot run here.
    """
    return NF4Weight.quantize(weight, blocksize, double_quant, backend=backend)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """`W[n, k] = values[index[n, k]] * absmax[block]` -> [N, K] in `dtype` (default: the dtype before quantization).

    Formed in float32 and rounded once; every backend gives the same bits, those of bitsandbytes. Not differentiable.
    Raises ValueError for a backend that cannot run here.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastpeft.nf4_dequantize(*_flatten(weight), dtype or weight.dtype, backend)
    return weight.dequantize(dtype, backend=backend)


def nf4_merge(
    weight: NF4Weight,
    A: Tensor,
    B: Tensor,
    scaling: float | Tensor,
    gain: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`gain[n] * (W[n, k] + scaling * sum_r B[n, r] A[r, k])` -> [N, K] in `dtype` (default: the weight's).

    The weight with its low-rank update folded in: LoRA's, and with gain = magnitude / norm DoRA's. A: [R, K] and
    B: [N, R], any float dtype; the kernel multiplies them in `dtype`, accumulating in float32. scaling: a float, or a
    tensor with one element, which is never read on the host. gain: [N] or None. The sum and the gain are formed in
    float32 and rounded once. Not differentiable. Raises ValueError (shapes, devices, an unable backend) or TypeError
    (dtypes).
    """
    dtype = dtype or weight.dtype
    _check_merge(weight, A, B, scaling, gain, dtype)
    factor = scaling if isinstance(scaling, Tensor) else None
    number = 1.0 if factor is not None else float(scaling)
    if torch.compiler.is_compiling():
        return torch.ops.fastpeft.nf4_merge(*_flatten(weight), A, B, number, factor, gain, dtype, backend)
    return _merge(weight, A, B, number, factor, gain, dtype, backend)


def _check_merge(weight, A, B, scaling, gain, dtype) -> None:
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight must be an NF4Weight; got {type(weight).__name__}")
    N, K = weight.shape
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or A.shape[0] != B.shape[1]:
        raise ValueError(f"A is {tuple(A.shape)} and B is {tuple(B.shape)}; for a weight of [{N}, {K}] "
                         f"they must be [R, {K}] and [{N}, R]")  # fmt: skip
    if gain is not None and gain.shape != (N,):
        raise ValueError(f"gain is {tuple(gain.shape)}; it must be ({N},)")
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        raise ValueError(f"scaling is a tensor of {scaling.numel()} elements; it must be a number or hold one")
    tensors = {"A": A, "B": B, "gain": gain, "scaling": scaling}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight.device}")
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; it must be floating point")


def _merge_needs_tensor_cores(packed: Tensor, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {dtype}; the kernel writes bf16 and fp16"
    return backends.needs_cuda_module(packed)


_MERGE_RULES = {"cuda": _merge_needs_tensor_cores, "eager": backends.always, "reference": backends.always}


def _merge(weight, A, B, scaling, factor, gain, dtype, backend) -> Tensor:
    """`factor`: None, or a tensor with one element that multiplies `scaling`."""
    name = backends.choose("nf4_merge", _MERGE_RULES, weight.packed, dtype, backend=backend)
    if name == "cuda":
        return _merge_cuda(weight, A, B, scaling, factor, gain, dtype)
    scaling = scaling if factor is None else scaling * factor.float()
    if name == "reference":
        return formula.nf4_merge(weight, A, B, scaling, gain, dtype)
    wide = torch.promote_types(A.dtype, torch.float32)
    merged = weight.dequantize(wide).addmm_(B.to(wide) * scaling, A.to(wide))
    if gain is not None:
        merged *= gain.to(wide).unsqueeze(1)
    return merged.to(dtype)


def _merge_cuda(weight, A, B, scaling, factor, gain, dtype) -> Tensor:
    (N, K), R = weight.shape, A.shape[0]
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
    factor, gain = (None if t is None else t.float().contiguous() for t in (factor, gain))
    with _native.stream_on(weight.device) as stream:
        _native.cuda.nf4_merge(
            weight=native_storage(weight),
            lora_a=A.data_ptr(),
            lora_b=B.data_ptr(),
            scaling=scaling,
            scaling_tensor=0 if factor is None else factor.data_ptr(),
            gain=0 if gain is None else gain.data_ptr(),
            out=out.data_ptr(),
            dtype=native_dtype(dtype),
            N=N,
            K=K,
            R=R,
            stream=stream,
        )
    return out


# The same as torch.library ops: opaque nodes in a compiled graph. An NF4Weight goes in as its parts.

_STORAGE = "Tensor packed, Tensor absmax, Tensor? absmax_code, Tensor? absmax_scale, Tensor? absmax_offset,"
_STORAGE += " int[] shape, int blocksize"


def _flatten(w: NF4Weight) -> tuple:
    return w.packed, w.absmax, w.absmax_code, w.absmax_scale, w.absmax_offset, w.shape, w.blocksize


def _unflatten(storage: tuple, dtype: torch.dtype) -> NF4Weight:
    packed, absmax, *nested, shape, blocksize = storage
    return NF4Weight(packed, absmax, tuple(shape), blocksize, dtype, *nested)


@torch.library.custom_op(
    "fastpeft::nf4_dequantize", mutates_args=(), schema=f"({_STORAGE}, ScalarType dtype, str? backend) -> Tensor"
)
def _dequantize_op(*arguments):
    *storage, dtype, backend = arguments
    return _unflatten(storage, dtype).dequantize(backend=backend)


@torch.library.custom_op(
    "fastpeft::nf4_merge",
    mutates_args=(),
    schema=f"({_STORAGE}, Tensor A, Tensor B, float scaling, Tensor? factor, Tensor? gain, ScalarType dtype,"
    " str? backend) -> Tensor",
)
def _merge_op(*arguments):
    *storage, A, B, scaling, factor, gain, dtype, backend = arguments
    return _merge(_unflatten(storage, dtype), A, B, scaling, factor, gain, dtype, backend)


@_dequantize_op.register_fake
@_merge_op.register_fake
def _dense(*arguments):
    packed, shape, dtype = arguments[0], arguments[5], arguments[-2]
    return packed.new_empty(shape, dtype=dtype)
