"""The passes of lora_linear over x and dy that are low-rank products: each reads its large operand once.

    lora_down        xa = (keep * x) A^T                 [M, R]
    lora_up_grad     u  = dy B,  dB = scale * dy^T xa    [M, R], [N, R]
    lora_down_grad   dA = scale * u^T (keep * x)         [R, K]

keep is dropout's mask, made again from its seed (`dropout.py`); its 1 / (1 - p) is in `scale`. Launchers as in
`lora_linear.py`: A, B and their gradients are of x's dtype or float32.

Work split: a program of `lora_down` owns some tokens and a block of ranks and walks over K; one of `lora_down_grad`
owns some features and a block of ranks and walks over the tokens. One of `lora_up_grad` owns features of dy, walks over
the tokens and feeds each tile to both products: dB stays in its registers, and of u it writes a part, since a row of u
needs all features. A part costs 8 bytes for each token and rank, reading its 256 features of dy again 512 for each
token: for more than 32 ranks `lora_up_grad` becomes the two other kernels, with B and its strides in the place of A.
More ranks than a program has are more programs, which find x in L2.

Form: in the gradients and in u = dy B the ranks are the rows of the products, u^T x and B^T dy^T, so that the large
operand is on the right, in shared memory. With ranks as columns a step of `lora_down_grad` took 974 instructions for
487 on sm_90, and ptxas serialized the wgmma (C7510): what the mask had changed was transposed in registers. On sm_80
`lora_up_grad` took 461 for 193 and spilled. For `lora_down` both forms take the same.

Cost, modelled, for 8192 tokens of 4096 features, rank 16, bf16, on an H100 (3.0 TB/s, 132 SMs of 4 instructions a cycle
at 1.76 GHz); instructions of the loop as counted in Triton 3.9's machine code for sm_90. Memory bounds all. Not timed
yet.

    lora_down         67 MB of x                            22 us   3 instructions an element, 3 us; dropout 14, 16 us
    lora_down_grad    67 MB of x                            22 us   3 instructions an element, 4 us; dropout 15, 17 us
    lora_up_grad      67 MB of dy, 8 MB of u's parts twice  28 us   3 instructions an element, 4 us
"""

import triton
import triton.language as tl

from .dropout import keep_mask, keep_threshold
from .products import (
    check_features,
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
        store_tile(u, dot(b, tile.T, tl.zeros([BR, BM], tl.float32)), 0, m0, 1, R, R, M)
    store_tile(d_b + split.to(tl.int64) * N * R, acc * scale, 0, n0, 1, R, R, N)


def _down(x, factor, strides, seed, dropout_p, out):
    if out.numel() == 0:
        return
    (M, C), R = x.shape, out.shape[1]
    check_features(C)
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
    check_features(C)
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
    """xa = (keep * x) A^T. x: [M, K] bf16|fp16. A: [R, K]. seed: int64 tensor of one element, or None. xa: [M, R]."""
    _down(x, A, (A.shape[1], 1), seed, dropout_p, xa)


def lora_down_grad(x, u, seed, dropout_p, scale, dA):
    """dA = scale * u^T (keep * x). x: [M, K]. u: [M, R] of x's dtype. dA: [R, K]."""
    _down_grad(x, u, seed, dropout_p, scale, (dA.shape[1], 1), dA)


def lora_up_grad(dy, B, xa, u, dB, scale):
    """u = dy B, dB = scale * dy^T xa. dy: [M, N]. B: [N, R]. xa: [M, R]. u: [M, R], dB: [N, R]; None: not wanted."""
    (M, N), R = dy.shape, B.shape[1]
    check_features(N)
    tile = tile_of("lora_up_grad", M)
    if u is None or dB is None or tile.rows < R or dy.numel() == 0:
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
