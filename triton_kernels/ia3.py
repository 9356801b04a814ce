"""ia3: the columns of a matrix times a vector, and the sums that are the vector's gradient, in one pass.

    dx[m, c] = gain[c] * dy[m, c]          sums[c] = sum over m of dy[m, c] * x[m, c]

Without x it is the forward: y = gain * x. The product with the weight stays cuBLAS. Launchers as in `lora_linear.py`.

Work split: a program owns 128 columns and a share of the rows, and walks over them 16 at a time: two loads of 16 bytes
a thread and operand (32 rows spilled where columns are odd). Its sums stay in registers, a part of float32 is written
at the end, and `sum_partials` adds the parts in their order: no atomics, the same bits in every run. The rows are
shared by as many programs as give each SM about eight, but by at most 64: few programs add the parts.

Cost, modelled, on an H100 (3.0 TB/s), bf16: two bytes read or written for each element of dy, x and dx, and nothing
else that counts. For 8192 tokens of 14336 features 705 MB, 235 us; torch's operations take 1.9 GB for the same, two
float32 copies included. Memory bounds it: 14 instructions an element, as counted in Triton 3.9's machine code for
sm_90, are 55 us. Not timed yet.
"""

import triton
import triton.language as tl

from .casts import to_float32
from .products import check_features, load, load_tile, partials_of, share, store_tile, sum_partials

COLUMNS, ROWS = 128, 16  # a row of a tile is two whole sectors of 128 bytes, 16 lanes of 16 bytes; see above
PROGRAMS = 8 * 132  # eight CTAs of four warps on each SM of an H100: half of what fits, and enough loads in flight
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["M"])
def scale_columns_kernel(sums, dx, dy, x, gain, M, C, BM: tl.constexpr, BC: tl.constexpr):
    """dx = gain * dy; sums[split, c] = that of dy * x over this split's rows. dx, or x and sums, may be None."""
    split = tl.program_id(0)
    c0 = tl.program_id(1) * BC
    begin, end = share(M, BM, split, tl.num_programs(0))
    c = c0 + tl.arange(0, BC)
    factor = load(gain + c, c < C)[None, :]
    acc = tl.zeros([BC], tl.float32)
    for m0 in range(begin, end, BM):
        tile = to_float32(load_tile(dy, m0, c0, C, 1, M, C, BM, BC))
        if x is not None:
            acc += tl.sum(tile * to_float32(load_tile(x, m0, c0, C, 1, M, C, BM, BC)), 0)
        if dx is not None:
            store_tile(dx, tile * factor, m0, c0, C, 1, M, C)
    if x is not None:
        tl.store(sums + split.to(tl.int64) * C + c, acc, mask=c < C)


def scale_columns(dy, x, gain, dx, sums):
    """dx = gain * dy, sums = sum over m of dy * x.

    dy, dx: [M, C] bf16|fp16, dx None where it is not wanted. x: [M, C] of that dtype and sums: [C] float32, or both
    None. gain: [C] float32. Raises ValueError where C exceeds 2**22.
    """
    M, C = dy.shape
    check_features(C)
    tiles = triton.cdiv(C, COLUMNS)
    splits = max(1, min(PROGRAMS // tiles, MOST_SPLITS, triton.cdiv(M, ROWS)))
    partials = None if sums is None else partials_of(sums, splits)
    scale_columns_kernel[(splits, tiles)](
        partials, dx, dy, x, gain, M, C, BM=ROWS, BC=COLUMNS, num_warps=4, enable_fp_fusion=False
    )
    if sums is not None:
        sum_partials(partials, sums)
