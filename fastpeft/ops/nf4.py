"""nf4_quantize, nf4_dequantize: into the 4-bit storage of bitsandbytes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.quant import NF4Weight


def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """weight: [N, K] bf16|fp16|fp32 -> NF4Weight, the bytes that bitsandbytes writes on a CPU.

    blocksize: 32, 64, ... 4096 elements of the flattened weight that share an absmax. double_quant: store the absmax
    vector in 8 bits. Not differentiable. Raises ValueError for other shapes, dtypes and blocksizes.
    """
    return NF4Weight.quantize(weight, blocksize, double_quant)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """`W[n, k] = values[index[n, k]] * absmax[block]` -> [N, K] in `dtype` (default: the dtype before quantization).

    Formed in float32 and rounded once; every backend gives the same bits, those of bitsandbytes. Not differentiable.
    Raises ValueError for a backend that cannot run here.
    """
    if torch.compiler.is_compiling():
        w, dtype = weight, dtype or weight.dtype
        nested = (w.absmax_code, w.absmax_scale, w.absmax_offset)
        return torch.ops.fastpeft.nf4_dequantize(w.packed, w.absmax, *nested, w.shape, w.blocksize, dtype, backend)
    return weight.dequantize(dtype, backend=backend)


@torch.library.custom_op(
    "fastpeft::nf4_dequantize",
    mutates_args=(),
    schema="(Tensor packed, Tensor absmax, Tensor? absmax_code, Tensor? absmax_scale, Tensor? absmax_offset,"
    " int[] shape, int blocksize, ScalarType dtype, str? backend) -> Tensor",
)
def _op(packed, absmax, absmax_code, absmax_scale, absmax_offset, shape, blocksize, dtype, backend):
    nested = (absmax_code, absmax_scale, absmax_offset)
    return NF4Weight(packed, absmax, tuple(shape), blocksize, dtype, *nested).dequantize(backend=backend)


@_op.register_fake
def _(packed, absmax, absmax_code, absmax_scale, absmax_offset, shape, blocksize, dtype, backend):
    return packed.new_empty(shape, dtype=dtype)
