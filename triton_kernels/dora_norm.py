"""dora_norm: the norm of each row of W + scale * B A, by the direct sum of squares; the formula is at the launcher.

The launcher takes contiguous tensors of one device, writes `norm` and returns nothing. The caller has checked dtypes
and sizes and has made the tensors' device the current one.

Work split: a program has 64 rows and a slice of the columns. A step of it is 64 columns: a product on tensor cores, to
which the weights are added in float32; they were asked for in the step before. Squares are summed where they arise, in
registers, and over the columns once, at the end. A second kernel adds the slices in their order, so that the bits
depend on the sizes alone. Scratch is N floats for each slice.

float32 adapters are not rounded: `tl.dot` cuts each element into three of bfloat16 and makes six products.

Cost, modelled, for 4096x4096 in NF4, nested blocks of 64, rank 16, on an H100 (3.0 to 3.35 TB/s; 132 SMs of 4
instructions a cycle at 1.76 GHz): 8.9 MB, 2.7 to 3.0 us. Instructions a weight in Triton 3.9's machine code for sm_90:
10.7, 6.0 us, which is the bound; with float32 adapters 21; where there are no vectors (K % 32 != 0, unaligned) 54 or
more. A dense W takes 6.2 and is bound by memory, 10 to 11 us. Nothing here was timed yet.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import float32

from .casts import INTERPRETED, to_float32
from .nf4 import ABSMAX_BLOCKSIZE, NF4_VALUES, look_up, table_of


@dataclass(frozen=True)
class Tile:
    """A program takes `columns` of its 64 rows at a time, and multiplies at most `ranks` of A and B at a time."""

    columns: int
    ranks: int
    warps: int


ROWS = 64  # what one wgmma makes
VECTORS = Tile(columns=64, ranks=32, warps=4)
VECTORS_FP32 = Tile(columns=32, ranks=16, warps=4)  # adapters in three parts take more registers
ELEMENTS = Tile(columns=32, ranks=16, warps=8)  # each element has an address, which takes two registers
MIN_SLICE, MAX_SLICE = 128, 1024
PROGRAMS = 360  # nearly three for each of the 132 SMs of an H100, as many as registers allow
RUN = tl.constexpr(32)  # the least blocksize: neighbours that share an absmax, if K is a multiple of it


@triton.jit
def _dot(a, b, acc):
    """a b + acc, all of it in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16, not its values
        return tl.dot(to_float32(a), to_float32(b), acc)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="bf16x6")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _load_a(lora_a, r, k, end, K, R):
    pointers = lora_a + r.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(pointers, mask=(r < R)[:, None] & (k < end)[None, :], other=0)


@triton.jit
def _load_b(lora_b, n, r, N, R):
    return tl.load(lora_b + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0)


@triton.jit
def _load_weight(
    weight, absmax, absmax_scale, n, k, end, N, K, BLOCKSIZE: tl.constexpr, WHOLE: tl.constexpr, BK: tl.constexpr
):
    """Rows n and columns k to k + BK - 1, as they are stored: what `_values` takes."""
    column = tl.arange(0, BK)
    row_inside = (n < N)[:, None]
    inside = row_inside & (column < end - k)[None, :]
    at = (n * K)[:, None] + k + column[None, :]
    if BLOCKSIZE == 0:
        return (tl.load(weight + at, mask=inside, other=0),)
    else:
        zeros: tl.constexpr = 0x77
        if WHOLE:
            byte = tl.arange(0, BK // 2)
            pointers = weight + (n * (K // 2))[:, None] + k // 2 + byte[None, :]
            codes = tl.load(pointers, mask=row_inside & (byte < (end - k) // 2)[None, :], other=zeros)
            first = tl.arange(0, BK // RUN) * RUN
            inside = row_inside & (first < end - k)[None, :]
            at = (n * K)[:, None] + k + first[None, :]
        else:
            codes = tl.load(weight + at // 2, mask=inside, other=zeros) >> tl.where(at % 2 == 0, 4, 0).to(tl.uint8)
        stored = tl.load(absmax + at // BLOCKSIZE, mask=inside, other=0)
        if absmax_scale is None:
            return codes, stored
        else:
            return codes, stored, tl.load(absmax_scale + at // BLOCKSIZE // ABSMAX_BLOCKSIZE, mask=inside, other=0)


@triton.jit
def _values(loaded, absmax_code, absmax_offset, table, BLOCKSIZE: tl.constexpr, WHOLE: tl.constexpr):
    """float32 [rows, BK]; zeros where nothing was loaded. Of NF4 value * absmax, rounded once."""
    if BLOCKSIZE == 0:
        return to_float32(loaded[0])
    else:
        codes, block = loaded[0].to(tl.int32), loaded[1]
        if absmax_code is not None:
            block = tl.load(absmax_code + block.to(tl.int32)) * loaded[2] + tl.load(absmax_offset)
        if WHOLE:
            rows: tl.constexpr = codes.shape[0]
            runs: tl.constexpr = block.shape[1]
            values = look_up(table, tl.interleave(codes >> 4, codes & 15)).reshape([rows, runs, RUN])
            return (values * block[:, :, None]).reshape([rows, runs * RUN])
        else:
            return look_up(table, codes & 15) * block


@triton.jit
def dora_norm_kernel(
    weight,
    absmax,
    absmax_code,
    absmax_scale,
    absmax_offset,
    lora_a,
    lora_b,
    scaling,
    scaling_tensor,
    squares,
    N,
    K,
    R,
    columns,
    BLOCKSIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNKED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """squares[slice, n] = sum over the `columns` columns k of a slice of (W[n, k] + scale * sum_r B[n, r] A[r, k])^2.

    BLOCKSIZE: 0 for a dense weight. WHOLE: K is a multiple of RUN. CHUNKED: R is more than BR.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    slice = tl.program_id(1)
    begin = slice * columns
    end = tl.minimum(begin + columns, K)
    loaded = _load_weight(weight, absmax, absmax_scale, n, begin, end, N, K, BLOCKSIZE, WHOLE, BK)

    scale = scaling
    if scaling_tensor is not None:
        scale = scaling * tl.load(scaling_tensor)
    scale = tl.full([BN, BK], scale, tl.float32)
    table = table_of(NF4_VALUES)
    r = tl.arange(0, BR)
    b = _load_b(lora_b, n, r, N, R)
    acc = tl.zeros([BN, BK], tl.float32)
    for k in range(begin, end, BK):
        ahead = _load_weight(weight, absmax, absmax_scale, n, k + BK, end, N, K, BLOCKSIZE, WHOLE, BK)
        column = k + tl.arange(0, BK)
        product = _dot(b, _load_a(lora_a, r, column, end, K, R), tl.zeros([BN, BK], tl.float32))
        if CHUNKED:
            for r0 in range(BR, R, BR):
                a = _load_a(lora_a, r0 + r, column, end, K, R)
                product = _dot(_load_b(lora_b, n, r0 + r, N, R), a, product)
        x = tl.fma(product, scale, _values(loaded, absmax_code, absmax_offset, table, BLOCKSIZE, WHOLE))
        acc = tl.fma(x, x, acc)
        loaded = ahead
    tl.store(squares + slice.to(tl.int64) * N + n, tl.sum(acc, 1), mask=n < N)


@triton.jit(do_not_specialize=["slices"])
def dora_norm_sum_kernel(squares, norm, slices, N, BLOCK: tl.constexpr):
    """norm[n] = sqrt(squares[0, n] + squares[1, n] + ...), in this order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(slices):
        total += tl.load(squares + n, mask=n < N, other=0)
        squares += N
    tl.store(norm + n, tl.sqrt_rn(total), mask=n < N)


def dora_norm(weight, A, B, scaling, scaling_tensor, norm):
    """norm[n] = sqrt(sum_k (W[n, k] + scaling * scaling_tensor * sum_r B[n, r] A[r, k])^2), in float32.

    weight: [N, K] bf16|fp16; or an NF4 weight as (packed, absmax, absmax_code, absmax_scale, absmax_offset, blocksize),
    each as in `nf4.nf4_dequantize`, whose values count as float32. A: [R, K] and B: [N, R], bf16|fp16|fp32, of one
    dtype. scaling: a float. scaling_tensor: one float32, or None for 1. norm: [N] float32.
    """
    N, (R, K) = norm.numel(), A.shape
    if N == 0:
        return
    *storage, blocksize = weight if isinstance(weight, tuple) else (weight, None, None, None, None, 0)
    columns = MAX_SLICE
    while columns > MIN_SLICE and triton.cdiv(N, ROWS) * triton.cdiv(K, columns) < PROGRAMS:
        columns //= 2
    slices = triton.cdiv(K, columns)
    squares = norm.new_empty((slices, N), dtype=float32)
    # Vectors of 16 bytes: Triton sees them where K and pointers are multiples of 16.
    whole = K % RUN.value == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in (storage[0], A, B))
    tile = ELEMENTS if not whole else VECTORS_FP32 if A.dtype == float32 else VECTORS
    br = 16 if R <= 16 else tile.ranks  # 16: the depth of a tensor-core instruction
    if slices > 0:
        dora_norm_kernel[(triton.cdiv(N, ROWS), slices)](
            *storage,
            A,
            B,
            scaling,
            scaling_tensor,
            squares,
            N,
            K,
            R,
            columns,
            BLOCKSIZE=blocksize,
            WHOLE=whole,
            CHUNKED=br < R,
            BN=ROWS,
            BK=tile.columns,
            BR=br,
            num_warps=tile.warps,
            num_stages=1,  # another would bring A sooner, by more instructions
            enable_fp_fusion=False,
        )
    grid = (triton.cdiv(N, 128),)
    dora_norm_sum_kernel[grid](squares, norm, slices, N, BLOCK=128, num_warps=4, enable_fp_fusion=False)
