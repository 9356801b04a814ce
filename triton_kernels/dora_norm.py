"""dora_norm."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import float32

from .casts import INTERPRETED, to_float32
from .nf4 import ABSMAX_BLOCKSIZE, NF4_VALUES, _look_up, _table

ROWS = 64
COLUMNS = 64
MAX_RANKS = 64
RUN = tl.constexpr(32)  # neighbours in a row that share an absmax where K is a multiple of it: the least blocksize


@triton.jit
def _dot(a, b, acc):
    """a b + acc in float32 arithmetic: operands of 16 bits are multiplied exactly, float32 is cut into three bfloat16."""
    if INTERPRETED:  # it would multiply the bits of bfloat16, not its values
        return tl.dot(to_float32(a), to_float32(b), acc)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="bf16x6")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _load_a(lora_a, r, k, end, K, R):
    return tl.load(
        lora_a + r.to(tl.int64)[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < end)[None, :], other=0
    )


@triton.jit
def _load_b(lora_b, n, r, N, R):
    return tl.load(lora_b + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0)


@triton.jit
def _absmax_of(block, inside, absmax, absmax_code, absmax_scale, absmax_offset):
    stored = tl.load(absmax + block, mask=inside, other=0)
    if absmax_code is None:
        return stored
    else:
        scale = tl.load(absmax_scale + block // ABSMAX_BLOCKSIZE, mask=inside, other=0)
        return tl.load(absmax_code + stored.to(tl.int32)) * scale + tl.load(absmax_offset)


@triton.jit
def _load_nf4(
    packed,
    absmax,
    absmax_code,
    absmax_scale,
    absmax_offset,
    table,
    n,
    k,
    end,
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows n, columns k to k + BK - 1: float32 [len(n), BK], 0 past `end`."""
    BN: tl.constexpr = n.shape[0]
    if WHOLE:
        run = k + tl.arange(0, BK // RUN) * RUN
        block = (n[:, None] * K + run[None, :]) // BLOCKSIZE
        scale = _absmax_of(
            block, (n < N)[:, None] & (run < end)[None, :], absmax, absmax_code, absmax_scale, absmax_offset
        )
        byte = tl.arange(0, BK // 2)
        inside = (n < N)[:, None] & (byte < (end - k) // 2)[None, :]
        codes = tl.load(packed + (n * (K // 2))[:, None] + k // 2 + byte[None, :], mask=inside, other=0x77).to(tl.int32)
        values = _look_up(table, tl.interleave(codes >> 4, codes & 15)).reshape([BN, BK // RUN, RUN])
        return (values * scale[:, :, None]).reshape([BN, BK])
    else:
        column = k + tl.arange(0, BK)
        inside = (n < N)[:, None] & (column < end)[None, :]
        at = n[:, None] * K + column[None, :]
        byte = tl.load(packed + at // 2, mask=inside, other=0x77).to(tl.int32)
        scale = _absmax_of(at // BLOCKSIZE, inside, absmax, absmax_code, absmax_scale, absmax_offset)
        return _look_up(table, tl.where(at % 2 == 0, byte >> 4, byte & 15)) * scale


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
    SLICE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNKED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """squares[slice, n] = sum over the columns k of a slice of (W[n, k] + scale * sum_r B[n, r] A[r, k])^2."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    slice = tl.program_id(1)
    begin = slice * SLICE
    end = tl.minimum(begin + SLICE, K)
    scale = scaling
    if scaling_tensor is not None:
        scale = scaling * tl.load(scaling_tensor)
    if BLOCKSIZE > 0:
        table = _table(NF4_VALUES)
    r = tl.arange(0, BR)
    b = _load_b(lora_b, n, r, N, R)

    acc = tl.zeros([BN, BK], tl.float32)
    for k in range(begin, end, BK):
        column = k + tl.arange(0, BK)
        product = _dot(b, _load_a(lora_a, r, column, end, K, R), tl.zeros([BN, BK], tl.float32))
        if CHUNKED:
            for r0 in range(BR, R, BR):
                a = _load_a(lora_a, r0 + r, column, end, K, R)
                product = _dot(_load_b(lora_b, n, r0 + r, N, R), a, product)
        if BLOCKSIZE > 0:
            w = _load_nf4(
                weight, absmax, absmax_code, absmax_scale, absmax_offset, table, n, k, end, N, K, BLOCKSIZE, WHOLE, BK
            )
        else:
            inside = (n < N)[:, None] & (column < end)[None, :]
            w = to_float32(tl.load(weight + (n * K)[:, None] + column[None, :], mask=inside, other=0))
        x = tl.fma(product, tl.full([BN, BK], scale, tl.float32), w)
        acc = tl.fma(x, x, acc)
    tl.store(squares + slice.to(tl.int64) * N + n, tl.sum(acc, 1), mask=n < N)


@triton.jit(do_not_specialize=["slices"])
def dora_norm_sum_kernel(squares, norm, slices, N, BLOCK: tl.constexpr):
    """norm[n] = sqrt(sum over slices of squares[slice, n])."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slice in range(slices):
        total += tl.load(squares + tl.cast(slice, tl.int64) * N + n, mask=n < N, other=0)
    tl.store(norm + n, tl.sqrt_rn(total), mask=n < N)


def dora_norm(weight, A, B, scaling, scaling_tensor, norm):
    N, (R, K) = norm.numel(), A.shape
    if N == 0:
        return
    if isinstance(weight, tuple):
        *storage, blocksize = weight
    else:
        storage, blocksize = (weight, None, None, None, None), 0
    slice = 256
    slices = triton.cdiv(K, slice)
    squares = norm.new_empty((slices, N), dtype=float32)
    br = min(max(16, triton.next_power_of_2(R)), MAX_RANKS)
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
            SLICE=slice,
            BLOCKSIZE=blocksize,
            WHOLE=K % RUN.value == 0,
            CHUNKED=R > br,
            BN=ROWS,
            BK=COLUMNS,
            BR=br,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=False,
        )
    dora_norm_sum_kernel[(triton.cdiv(N, 128),)](
        squares, norm, slices, N, BLOCK=128, num_warps=4, enable_fp_fusion=False
    )
