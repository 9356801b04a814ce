"""What dora_linear needs besides lora_linear's passes: the gain, dropout's sum, and the gradient of the gain.

The launchers take contiguous tensors of one device, write into their output and return nothing; x, dy, z, the offset
and `out` have one dtype, bf16 or fp16. The caller has checked dtypes and sizes and has made the tensors' device the
current one.

Bound by memory: a matrix [8192, 4096] of bf16 is 67 MB, 20.0 to 22.4 us at 3.35 to 3.0 TB/s (H100, modelled). add reads
one or two of them and writes one, the gradient of the gain reads two. A program has 16 rows of 256 columns: a row of
them is 32 vectors of 16 bytes, and a thread has two or four on their way. The sum over rows is shared by as many
programs as fill the GPU (products.py); each keeps a sum for each of its elements, and adds over its rows at the end.
"""

import triton
import triton.language as tl

from .casts import to_float32
from .dropout import keep_mask, keep_threshold
from .products import launch, load_tile, share, store_tile
from .tiles import Tile

__all__ = ["dora_linear_add", "dora_linear_gain_grad"]

ADD = Tile(rows=16, columns=256, depth=1, warps=4, stages=1)
GAIN_GRAD = Tile(rows=1, columns=256, depth=16, warps=8, stages=1)


@triton.jit(do_not_specialize=["M", "threshold"])
def dora_linear_add_kernel(
    out, x, gain, offset, offset_stride, seed, threshold, M, N, BM: tl.constexpr, BN: tl.constexpr
):
    tiles = tl.cdiv(N, BN)
    m0, n0 = (tl.program_id(0) // tiles).to(tl.int64) * BM, tl.program_id(0) % tiles * BN
    n = n0 + tl.arange(0, BN)
    result = to_float32(load_tile(x, m0, n0, N, 1, M, N, BM, BN))
    if gain is not None:
        result *= tl.load(gain + n, mask=n < N, other=0)[None, :]
    if seed is not None:
        result = tl.where(keep_mask(tl.load(seed), m0 + tl.arange(0, BM), n, threshold), result, 0.0)
    if offset is not None:
        result += to_float32(load_tile(offset, m0, n0, offset_stride, 1, M, N, BM, BN))
    store_tile(out, result, m0, n0, N, 1, M, N)


@triton.jit(do_not_specialize=["M"])
def dora_linear_gain_grad_kernel(out, dy, z, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """out[n] = sum_m dy[m, n] z[m, n], or a part of it."""
    n0 = tl.program_id(0) * BN
    split = tl.program_id(1)
    begin, end = share(M, BM, split, tl.num_programs(1))
    acc = tl.zeros([BM, BN], tl.float32)
    for m0 in range(begin, end, BM):
        left, right = load_tile(dy, m0, n0, N, 1, M, N, BM, BN), load_tile(z, m0, n0, N, 1, M, N, BM, BN)
        acc += to_float32(left) * to_float32(right)
    n = n0 + tl.arange(0, BN)
    tl.store(out + split.to(tl.int64) * N + n, tl.sum(acc, 0), mask=n < N)


def dora_linear_add(x, gain, offset, seed, dropout_p, out):
    """out[m, n] = keep(m, n) * gain[n] * x[m, n] + offset[m, n], in float32, rounded once.

    gain: [N] float32, or None for 1. offset: [M, N], or [N] for every m, or None for 0. seed: one int64, or None to
    keep all. out may be x or offset.
    """
    M, N = x.shape
    dora_linear_add_kernel[(triton.cdiv(M, ADD.rows) * triton.cdiv(N, ADD.columns),)](
        out,
        x,
        gain,
        offset,
        0 if offset is None or offset.dim() == 1 else N,
        seed,
        keep_threshold(dropout_p),
        M,
        N,
        BM=ADD.rows,
        BN=ADD.columns,
        num_warps=ADD.warps,
        enable_fp_fusion=False,
    )


def dora_linear_gain_grad(dy, z, d_gain):
    """d_gain[n] = sum_m dy[m, n] * z[m, n], in float32, in an order that depends on the sizes alone."""
    M, N = dy.shape
    grid, steps = (triton.cdiv(N, GAIN_GRAD.columns),), triton.cdiv(M, GAIN_GRAD.depth)
    constants = dict(BM=GAIN_GRAD.depth, BN=GAIN_GRAD.columns)
    launch(dora_linear_gain_grad_kernel, GAIN_GRAD, grid, steps, d_gain, dy, z, M, N, **constants)
