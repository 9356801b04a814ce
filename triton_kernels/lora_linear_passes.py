"""wip"""

import triton
import triton.language as tl

from .dropout import keep_mask, keep_threshold
from .products import (
    dot,
    launch,
    load_factor,
    load_tile,
    partials_of,
    rank_block,
    share,
    store_tile,
    sum_partials,
)
from .tiles import tile_of


@triton.jit
def _load_kept(x, m0, c0, M, C, seed, threshold, BM: tl.constexpr, BC: tl.constexpr):
    tile = load_tile(x, m0, c0, C, 1, M, C, BM, BC)
    if seed is None:
        return tile
    else:
        return tl.where(keep_mask(seed, m0 + tl.arange(0, BM), c0 + tl.arange(0, BC), threshold), tile, 0)


@triton.jit(do_not_specialize=["M", "threshold"])
def lora_down_kernel(
    out,
    x,
    factor,
    seed,
    threshold,
    M,
    C,
    R,
    stride_r,
    stride_c,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """out[m, r] = sum_c x[m, c] keep[m, c] factor[r, c], or a part of it."""
    rank_blocks = tl.cdiv(R, BR)
    m0 = (tl.program_id(0) // rank_blocks).to(tl.int64) * BM
    r0 = tl.program_id(0) % rank_blocks * BR
    split = tl.program_id(1)
    begin, end = share(C, BC, split, tl.num_programs(1))
    if seed is not None:
        seed = tl.load(seed)
    acc = tl.zeros([BM, BR], tl.float32)
    for c0 in range(begin, end, BC):
        tile = _load_kept(x, m0, c0, M, C, seed, threshold, BM, BC)
        acc = dot(tile, load_factor(factor, r0, c0, stride_r, stride_c, R, C, BR, BC, tile.dtype).T, acc)
    store_tile(out + split.to(tl.int64) * M * R, acc, m0, r0, R, 1, M, R)


@triton.jit(do_not_specialize=["M", "threshold"])
def lora_down_grad_kernel(
    out,
    x,
    u,
    seed,
    threshold,
    scale,
    M,
    C,
    R,
    stride_r,
    stride_c,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """out[r, c] = scale * sum_m u[m, r] x[m, c] keep[m, c], or a part of it."""
    rank_blocks = tl.cdiv(R, BR)
    c0 = tl.program_id(0) // rank_blocks * BC
    r0 = tl.program_id(0) % rank_blocks * BR
    split = tl.program_id(1)
    begin, end = share(M, BM, split, tl.num_programs(1))
    if seed is not None:
        seed = tl.load(seed)
    acc = tl.zeros([BR, BC], tl.float32)
    for m0 in range(begin, end, BM):
        tile = _load_kept(x, m0, c0, M, C, seed, threshold, BM, BC)
        acc = dot(load_tile(u, m0, r0, R, 1, M, R, BM, BR).T, tile, acc)
    store_tile(out + split.to(tl.int64) * R * C, acc * scale, r0, c0, stride_r, stride_c, R, C)


@triton.jit(do_not_specialize=["M"])
def lora_up_grad_kernel(
    d_b,
    u,
    dy,
    lora_b,
    xa,
    scale,
    M,
    N,
    R,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """u[m, r] = sum_n dy[m, n] B[n, r] and dB[n, r] = scale * sum_m dy[m, n] xa[m, r], or parts of both."""
    n0 = tl.program_id(0) * BN
    split = tl.program_id(1)
    begin, end = share(M, BM, split, tl.num_programs(1))
    b = load_factor(lora_b, 0, n0, 1, R, R, N, BR, BN, dy.dtype.element_ty)
    u += tl.program_id(0).to(tl.int64) * M * R
    acc = tl.zeros([BR, BN], tl.float32)
    for m0 in range(begin, end, BM):
        tile = load_tile(dy, m0, n0, N, 1, M, N, BM, BN)
        acc = dot(load_tile(xa, m0, 0, R, 1, M, R, BM, BR).T, tile, acc)
        store_tile(u, dot(tile, b.T, tl.zeros([BM, BR], tl.float32)), m0, 0, R, 1, M, R)
    store_tile(d_b + split.to(tl.int64) * N * R, acc * scale, 0, n0, 1, R, R, N)


def _down(x, factor, strides, seed, dropout_p, out):
    if out.numel() == 0:
        return
    (M, C), R = x.shape, out.shape[1]
    tile = tile_of("lora_down", M)
    block = rank_block(R, tile.columns)
    launch(
        lora_down_kernel,
        tile,
        (triton.cdiv(M, tile.rows) * triton.cdiv(R, block),),
        triton.cdiv(C, tile.depth),
        out,
        x,
        factor,
        seed,
        keep_threshold(dropout_p),
        M,
        C,
        R,
        *strides,
        BM=tile.rows,
        BC=tile.depth,
        BR=block,
    )


def _down_grad(x, u, seed, dropout_p, scale, strides, out):
    if out.numel() == 0:
        return
    (M, C), R = x.shape, u.shape[1]
    tile = tile_of("lora_down_grad", M)
    block = rank_block(R, tile.rows)
    launch(
        lora_down_grad_kernel,
        tile,
        (triton.cdiv(C, tile.columns) * triton.cdiv(R, block),),
        triton.cdiv(M, tile.depth),
        out,
        x,
        u,
        seed,
        keep_threshold(dropout_p),
        scale,
        M,
        C,
        R,
        *strides,
        BM=tile.depth,
        BC=tile.columns,
        BR=block,
    )


def lora_down(x, A, seed, dropout_p, xa):
    _down(x, A, (A.shape[1], 1), seed, dropout_p, xa)


def lora_down_grad(x, u, seed, dropout_p, scale, dA):
    _down_grad(x, u, seed, dropout_p, scale, (dA.shape[1], 1), dA)


def lora_up_grad(dy, B, xa, u, dB, scale):
    (M, N), R = dy.shape, B.shape[1]
    tile = tile_of("lora_up_grad", M)
    if u is None or dB is None or R > tile.rows or dy.numel() == 0:
        if u is not None:
            _down(dy, B, (1, R), None, 0.0, u)
        if dB is not None:
            _down_grad(dy, xa, None, 0.0, scale, (1, R), dB)
        return
    tiles = triton.cdiv(N, tile.columns)
    u_partials = partials_of(u, tiles)
    launch(
        lora_up_grad_kernel,
        tile,
        (tiles,),
        triton.cdiv(M, tile.depth),
        dB,
        u_partials,
        dy,
        B,
        xa,
        scale,
        M,
        N,
        R,
        BM=tile.depth,
        BN=tile.columns,
        BR=rank_block(R, tile.rows),
    )
    sum_partials(u_partials, u)
