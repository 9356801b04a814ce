"""NF4 quantization in plain PyTorch: the meaning of the 4-bit storage, bit for bit that of bitsandbytes on a CPU.

Storage: elements are flattened row by row and cut into blocks; each block keeps its largest magnitude (`absmax`) and
each element the index of the nearest of sixteen values of `element / absmax`. Two indices share a byte, the first
element in the high nibble. With double quantization the `absmax` vector, less its mean, is itself stored in 8 bits.

Source: Dettmers et al., "QLoRA", 2023 (https://arxiv.org/abs/2305.14314) and, for the 8-bit code, Dettmers, "8-Bit
Approximations for Parallelism in Deep Learning", 2015 (https://arxiv.org/abs/1511.04561).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Quantiles of a standard normal, scaled to [-1, 1] with an exact zero (QLoRA, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ABSMAX_BLOCKSIZE = 256  # absmax values that share one second-level scale

# bitsandbytes rounds to the 8-bit code through a table over [-1, 1] with this many steps, not by an exact search.
_CODE_TABLE_STEPS = 65535


def nf4_values(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


@cache
def _absmax_code() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return tuple(sorted(values))


def absmax_code(device: torch.device) -> Tensor:
    """The signed dynamic 8-bit code: seven decades, each with twice the linear steps of the one below; [256] fp32."""
    return torch.tensor(_absmax_code(), dtype=torch.float32, device=device)


def _nearest_absmax_code(normalized: Tensor, code: Tensor) -> Tensor:
    steps = torch.arange(_CODE_TABLE_STEPS + 1, dtype=torch.float32, device=normalized.device)
    table = torch.bucketize(steps * (2 / _CODE_TABLE_STEPS) - 1, (code[1:] + code[:-1]) / 2)
    step = torch.floor((normalized + 1) * (0.5 * _CODE_TABLE_STEPS) + 0.5)
    # A block of zeros divides by zero; its NaN maps to the first code, whose product with absmax 0 is 0 again.
    index = table[step.nan_to_num(0.0).clamp(0, _CODE_TABLE_STEPS).long()]
    return torch.where(normalized.isnan(), 0, index).to(torch.uint8)


def quantize_absmax(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """absmax: [blocks] float32, offset: their mean, code: `absmax_code`.

    Returns (uint8 codes [blocks], float32 scales [ceil(blocks / 256)]).
    """
    padding = -absmax.numel() % ABSMAX_BLOCKSIZE
    groups = torch.nn.functional.pad(absmax - offset, (0, padding)).view(-1, ABSMAX_BLOCKSIZE)
    scale = groups.abs().nan_to_num(0.0, posinf=float("inf")).amax(1)
    normalized = (groups * (1 / scale).unsqueeze(1)).reshape(-1)[: absmax.numel()]
    return _nearest_absmax_code(normalized, code), scale


def dequantize_absmax(codes: Tensor, code: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`code[codes[i]] * scale[i // 256] + offset`, each step rounded to float32; returns [blocks] float32."""
    scales = scale.repeat_interleave(ABSMAX_BLOCKSIZE)[: codes.numel()]
    return code[codes.int()] * scales + offset


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight: any shape, bf16|fp16|fp32. Returns (packed uint8 [ceil(numel / 2)], absmax float32 [blocks])."""
    values = nf4_values(weight.device)
    flat = weight.reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    blocks, rest = flat[:full].view(-1, blocksize), flat[full:]
    # 1e-38 keeps a block of zeros from dividing by zero; the last, short block stores it (so does bitsandbytes).
    absmax = blocks.abs().amax(1)
    normalized = (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last.view(1)])
        normalized = torch.cat([normalized, rest / last])
    normalized = torch.nn.functional.pad(normalized.clamp(-1, 1), (0, flat.numel() % 2))
    index = torch.bucketize(normalized, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)
    return (index[::2] << 4) | index[1::2], absmax


def nf4_dequantize(weight, dtype: torch.dtype) -> Tensor:
    """weight: an NF4Weight. Returns `values[index] * absmax`, formed in float32 and rounded once to `dtype`; [N, K]."""
    rows, columns = weight.shape
    packed = weight.packed
    index = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: rows * columns]
    absmax = weight.absmax_float().repeat_interleave(weight.blocksize)[: rows * columns]
    return (nf4_values(packed.device)[index.int()] * absmax).to(dtype).view(rows, columns)


def nf4_merge(weight, A, B, scaling, gain=None, dtype=None) -> Tensor:
    """`gain * (W + scaling * B A)` -> [N, K] in `dtype`; arguments as in `fastpeft.ops.nf4_merge`.

    Everything is computed in float32, or in A's dtype where that is wider, and rounded once.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    merged = nf4_dequantize(weight, wide) + scaling * (B.to(wide) @ A.to(wide))
    if gain is not None:
        merged = gain.to(wide).unsqueeze(1) * merged
    return merged.to(dtype or weight.dtype)
