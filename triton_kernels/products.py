"""What kernels that multiply have in common: tiles in and out, and sums that several programs share.

A sum that is too long for one program, where the output has too few tiles to fill the GPU, is shared: each of `splits`
programs writes its part in float32, and `sum_partials` adds the parts in their order. There are no atomics, so a result
has the same bits in every run. How many share depends on shapes alone, not on the GPU.
"""

import math

import triton
import triton.language as tl
from torch import float32

from .casts import INTERPRETED, round_to, to_float32

PROGRAMS = 264  # twice the SMs of an H100: with fewer tiles than this, sums are shared
MIN_STEPS = 4  # of a loop: fewer would not pay for writing and reading a part
MOST_FEATURES = 2**22  # 256 rows of a tile times this is 2**30: places in a tile are int32


@triton.jit
def dot(a, b, acc):
    """a b + acc, accumulated in float32. The interpreter would multiply the bits of bfloat16, not its values."""
    if INTERPRETED:
        return tl.dot(to_float32(a), to_float32(b), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def load(pointers, inside):
    """Zero where not inside; inside: None for everywhere."""
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def tile_at(tensor, i0, j0, stride_i, stride_j, size_i, size_j, BI: tl.constexpr, BJ: tl.constexpr):
    """Pointers to the tile [BI, BJ] of `tensor` [size_i, size_j] that begins at [i0, j0], and which of them are inside.

    Only where the tile begins is int64. Inside it int32 do: half the registers, of which a tile takes many.
    """
    i = tl.arange(0, BI)[:, None]
    j = tl.arange(0, BJ)[None, :]
    origin = tensor + tl.cast(i0, tl.int64) * stride_i + tl.cast(j0, tl.int64) * stride_j
    return origin + (i * stride_i + j * stride_j), (i < size_i - i0) & (j < size_j - j0)


@triton.jit
def load_tile(tensor, i0, j0, stride_i, stride_j, size_i, size_j, BI: tl.constexpr, BJ: tl.constexpr):
    """[BI, BJ], zeros outside."""
    pointers, inside = tile_at(tensor, i0, j0, stride_i, stride_j, size_i, size_j, BI, BJ)
    return load(pointers, inside)


@triton.jit
def load_factor(factor, r0, c0, stride_r, stride_c, R, C, BR: tl.constexpr, BC: tl.constexpr, dtype: tl.constexpr):
    """A at [r, c], or B at [c, r], as the strides say: [BR, BC] of `dtype`, zeros outside."""
    tile = load_tile(factor, r0, c0, stride_r, stride_c, R, C, BR, BC)
    if tile.dtype == dtype:
        return tile
    else:
        return round_to(to_float32(tile), dtype)


@triton.jit
def store_tile(tensor, tile, i0, j0, stride_i, stride_j, size_i, size_j):
    """tile: float32, rounded here."""
    pointers, inside = tile_at(tensor, i0, j0, stride_i, stride_j, size_i, size_j, tile.shape[0], tile.shape[1])
    tl.store(pointers, round_to(tile, tensor.dtype.element_ty), mask=inside)


@triton.jit
def share(size, BLOCK: tl.constexpr, split, splits):
    """Begin and end of the part of range(size) that program `split` of `splits` sums: whole blocks, maybe none."""
    part = tl.cdiv(tl.cdiv(size, BLOCK), splits) * BLOCK
    return split * part, tl.minimum((split + 1) * part, size)


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(partials, out, count, numel, BLOCK: tl.constexpr):
    """out[i] = sum over p of partials[p, i], eight p at a time, so that eight loads are under way."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, 8):
        p = first + tl.arange(0, 8).to(tl.int64)
        parts = load(partials + (p * numel)[:, None] + i[None, :], (p < count)[:, None] & (i < numel)[None, :])
        acc += tl.sum(parts, 0)
    tl.store(out + i, round_to(acc, out.dtype.element_ty), mask=i < numel)


def check_features(*sizes):
    """Raises ValueError where `tile_at` would overflow."""
    if max(sizes) > MOST_FEATURES:
        raise ValueError(f"a layer with {max(sizes)} features; the Triton kernels take up to {MOST_FEATURES}")


def launch(kernel, tile, grid, steps, out, *arguments, **constants):
    """Launches `kernel` over `grid` and, in its last dimension, over the programs that share a sum of `steps` steps.

    The kernel's first argument is `out`, or where its parts go.
    """
    splits = splits_of(grid, steps)
    partials = partials_of(out, splits)
    kernel[(*grid, splits)](
        partials,
        *arguments,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=255,  # all there are: left alone, ptxas spills some of them to fit one more program on an SM
        enable_fp_fusion=False,
    )
    sum_partials(partials, out)


def splits_of(grid, steps):
    """How many programs share a sum of `steps` steps where `grid` are the tiles of the output."""
    return max(1, min(PROGRAMS // math.prod(grid), steps // MIN_STEPS))


def partials_of(out, count):
    """Where `count` programs write that share a sum: `out` itself for one, else float32 [count, *out.shape], each part
    laid out in memory as `out` is, which has no gaps."""
    if count == 1:
        return out
    return out.new_empty_strided((count, *out.shape), (out.numel(), *out.stride()), dtype=float32)


def sum_partials(partials, out):
    if partials is not out:
        block = 512  # 4 floats a thread and part: a vector of 16 bytes
        grid = (triton.cdiv(out.numel(), block),)
        sum_partials_kernel[grid](
            partials, out, partials.shape[0], out.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=False
        )


def rank_block(R, most):
    """Ranks that a program has at a time. 16 is the least that a tensor core sums over."""
    return min(max(16, triton.next_power_of_2(R)), most)
