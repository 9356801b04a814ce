"""wip"""

import math

import triton
import triton.language as tl

from .casts import round_to, to_float32
from .dropout import keep_mask, keep_threshold
from .lora_linear_passes import lora_down, lora_down_grad, lora_up_grad
from .nf4 import ABSMAX_BLOCKSIZE, NF4_VALUES, look_up, table_of
from .products import dot, launch, load, load_factor, load_tile, rank_block, share, store_tile
from .tiles import tile_of

__all__ = ["lora_down", "lora_down_grad", "lora_linear_dx", "lora_linear_fwd", "lora_up_grad"]

MOST_FEATURES = 2**24  # times the 128 rows of the largest tile this is 2**31: places in a tile are int32


@triton.jit
def _unpack(words):
    """uint32 [rows, W], eight codes each, to the codes [rows, 8 W]. A thread holds the codes of its own words."""
    halves = tl.join(words, words >> 16)
    bytes = tl.join(halves, halves >> 8)
    codes = tl.join(bytes >> 4, bytes) & 15  # the even element is in the high nibble
    return codes.reshape([words.shape[0], words.shape[1] * 8]).to(tl.int32)


@triton.jit
def _load_codes(
    packed, origin, row, row_inside, columns_left, COLUMNS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr
):
    """Codes of the elements origin + row + column: int32 [len(row), COLUMNS]."""
    if WORDS:
        word = tl.arange(0, COLUMNS // 8)[None, :]
        inside = None if EVEN else row_inside & (word * 8 < columns_left)
        words = load(packed.to(tl.pointer_type(tl.int32)) + origin // 8 + (row // 8 + word), inside)
        return _unpack(words.to(tl.uint32, bitcast=True))
    else:
        column = tl.arange(0, COLUMNS)[None, :]
        element = row + column + (origin % 2).to(tl.int32)
        bytes = load(packed + origin // 2 + element // 2, row_inside & (column < columns_left)).to(tl.int32)
        return tl.where(element % 2 == 0, bytes >> 4, bytes & 15)


@triton.jit
def _load_absmax(
    absmax,
    absmax_scale,
    origin,
    row,
    row_inside,
    columns_left,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Of each GROUP of columns the absmax as it is stored and its second-level scale: [len(row), COLUMNS / GROUP]."""
    column = tl.arange(0, COLUMNS // GROUP)[None, :] * GROUP
    inside = None if EVEN else row_inside & (column < columns_left)
    first = origin // BLOCKSIZE
    block = (row + column + (origin % BLOCKSIZE).to(tl.int32)).to(tl.uint32) // BLOCKSIZE  # unsigned: a shift
    stored = load(absmax + first + block, inside)
    if absmax_scale is None:
        return stored, stored
    else:
        group = ((first % ABSMAX_BLOCKSIZE).to(tl.uint32) + block) // ABSMAX_BLOCKSIZE
        return stored, load(absmax_scale + first // ABSMAX_BLOCKSIZE + group, inside)


@triton.jit
def _decode_absmax(stored, absmax_code, absmax_offset):
    if absmax_code is None:
        return stored[0]
    else:
        return tl.load(absmax_code + stored[0].to(tl.int32)) * stored[1] + tl.load(absmax_offset)


@triton.jit
def _dequantize(codes, absmax, table, dtype: tl.constexpr):
    """codes [rows, columns], absmax [rows, groups]: each value is formed in float32 and rounded once."""
    rows: tl.constexpr = codes.shape[0]
    columns: tl.constexpr = codes.shape[1]
    groups: tl.constexpr = absmax.shape[1]
    values = look_up(table, codes).reshape([rows, groups, columns // groups])
    return round_to(values * absmax[:, :, None], dtype).reshape([rows, columns])


@triton.jit
def _update(
    left,
    right,
    stride_r,
    stride_c,
    bias,
    seed,
    threshold,
    scale,
    m0,
    c0,
    M,
    C,
    R,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """bias[c] + scale * keep[m, c] * sum_r left[m, r] right[r, c], float32 [BM, BC]."""
    acc = tl.zeros([BM, BC], tl.float32)
    for r0 in tl.range(0, R, BR, num_stages=1):  # few steps: stages would cost shared memory that the product needs
        a = load_tile(left, m0, r0, R, 1, M, R, BM, BR)
        acc = dot(a, load_factor(right, r0, c0, stride_r, stride_c, R, C, BR, BC, a.dtype), acc)
    acc *= scale
    c = c0 + tl.arange(0, BC)
    if seed is not None:
        acc = tl.where(keep_mask(tl.load(seed), m0 + tl.arange(0, BM), c, threshold), acc, 0.0)
    if bias is not None:
        acc += to_float32(load(bias + c, c < C))[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "k_units", "threshold"])
def lora_linear_kernel(
    out,
    x,
    weight,
    absmax,
    absmax_code,
    absmax_scale,
    absmax_offset,
    left,
    right,
    stride_r,
    stride_c,
    bias,
    seed,
    threshold,
    scale,
    M,
    N,
    k_units,
    R,
    FORWARD: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """out[m, c] = sum_d x[m, d] W[c, d] + bias[c] + scale * keep[m, c] * sum_r left[m, r] right[r, c], or a part of it.

    Backward, that is not FORWARD: W[d, c], and `x` is dy. K = k_units * UNIT, so that the compiler knows what divides
    K. EVEN: no tile of the weight crosses an edge, and nothing is masked. BLOCKSIZE: 0 for a dense weight. WORDS: codes
    can be loaded by eight.
    """
    NF4: tl.constexpr = BLOCKSIZE > 0
    BN: tl.constexpr = BC if FORWARD else BD  # a tile of the weight is [BN, BK]
    BK: tl.constexpr = BD if FORWARD else BC
    GROUP: tl.constexpr = min(UNIT, BLOCKSIZE, BK)  # columns that share an absmax, whatever the row
    K = k_units * UNIT
    C = N if FORWARD else K
    D = K if FORWARD else N
    m0 = tl.program_id(0).to(tl.int64) * BM
    c0 = tl.program_id(1) * BC
    split = tl.program_id(2)
    begin, end = share(D, BD, split, tl.num_programs(2))

    # Rows past the last are that one again: nothing is masked in the loop, and they are not stored.
    x += m0 * D + tl.minimum(tl.arange(0, BM), M - 1 - m0).to(tl.int32)[:, None] * D
    depth = tl.arange(0, BD)[None, :]
    n = tl.arange(0, BN)[:, None]
    row = n * K
    acc = tl.zeros([BM, BC], tl.float32)
    if NF4:
        # The update comes first: after the loop it would hold a second accumulator beside the first.
        if split == 0:
            acc = _update(left, right, stride_r, stride_c, bias, seed, threshold, scale, m0, c0, M, C, R, BM, BC, BR)
        table = table_of(NF4_VALUES)
        d = tl.minimum(begin, D - BD) if EVEN else begin
        n0 = c0 if FORWARD else d
        k0 = d if FORWARD else c0
        origin = tl.cast(n0, tl.int64) * K + k0
        stored = _load_absmax(absmax, absmax_scale, origin, row, n < N - n0, K - k0, BK, GROUP, BLOCKSIZE, EVEN)
        w_absmax = _decode_absmax(stored, absmax_code, absmax_offset)
    for d in range(begin, end, BD):
        x_tile = load(x + (d + depth), None if EVEN else depth < D - d)
        n0 = c0 if FORWARD else d
        k0 = d if FORWARD else c0
        origin = tl.cast(n0, tl.int64) * K + k0
        if NF4:
            codes = _load_codes(weight, origin, row, n < N - n0, K - k0, BK, WORDS, EVEN)
            # The absmax of the next step: nested, it is two loads in a row.
            ahead = tl.minimum(d + BD, D - BD) if EVEN else d + BD
            n0 = c0 if FORWARD else ahead
            k0 = ahead if FORWARD else c0
            origin = tl.cast(n0, tl.int64) * K + k0
            stored = _load_absmax(absmax, absmax_scale, origin, row, n < N - n0, K - k0, BK, GROUP, BLOCKSIZE, EVEN)
            w = _dequantize(codes, w_absmax, table, x_tile.dtype)
        else:
            k = tl.arange(0, BK)[None, :]
            w = load(weight + origin + (row + k), None if EVEN else (n < N - n0) & (k < K - k0))
        acc = dot(x_tile, w.T if FORWARD else w, acc)
        if NF4:
            w_absmax = _decode_absmax(stored, absmax_code, absmax_offset)

    if not NF4:
        # The update comes last: ptxas serializes the wgmma of the loop where it adds to a product.
        if split == 0:
            acc += _update(left, right, stride_r, stride_c, bias, seed, threshold, scale, m0, c0, M, C, R, BM, BC, BR)
    store_tile(out + split.to(tl.int64) * M * C, acc, m0, c0, C, 1, M, C)


def weight_kind(weight, K):
    """Which tiles of tiles.py.

    nf4: codes come in words of eight. nf4_narrow: K % 32 > 0, so that few columns are known to share an absmax and more
    registers hold them. nf4_bytes: rows or `packed` are not aligned to words, and codes come one by one.
    """
    if not isinstance(weight, tuple):
        return "dense"
    if K % 8 > 0 or weight[0].data_ptr() % 4 > 0:
        return "nf4_bytes"
    return "nf4" if K % 32 == 0 else "nf4_narrow"


def _product(launcher, x, weight, left, right, strides, bias, seed, dropout_p, scale, out):
    if out.numel() == 0:
        return
    (M, D), C, R = x.shape, out.shape[1], left.shape[1]
    forward = launcher == "lora_linear_fwd"
    N, K = (C, D) if forward else (D, C)
    if max(N, K) > MOST_FEATURES:
        raise ValueError(f"the weight is [{N}, {K}]; the Triton kernels take up to {MOST_FEATURES} features")
    kind = weight_kind(weight, K)
    *tensors, blocksize = weight if isinstance(weight, tuple) else (weight, None, None, None, None, 0)
    tile = tile_of(f"{launcher} {kind}", M)
    unit = math.gcd(K, 128)
    launch(
        lora_linear_kernel,
        tile,
        (triton.cdiv(M, tile.rows), triton.cdiv(C, tile.columns)),
        triton.cdiv(D, tile.depth),
        out,
        x,
        *tensors,
        left,
        right,
        *strides,
        bias,
        seed,
        keep_threshold(dropout_p),
        scale,
        M,
        N,
        K // unit,
        R,
        FORWARD=forward,
        UNIT=unit,
        EVEN=C % tile.columns == 0 and D % tile.depth == 0 and D > 0,
        BLOCKSIZE=blocksize,
        WORDS=kind != "nf4_bytes",
        BM=tile.rows,
        BC=tile.columns,
        BD=tile.depth,
        BR=rank_block(R, 64),
    )


def lora_linear_fwd(x, weight, xa, B, bias, scale, y):
    _product("lora_linear_fwd", x, weight, xa, B, (1, B.shape[1]), bias, None, 0.0, scale, y)


def lora_linear_dx(dy, weight, u, A, scale, seed, dropout_p, dx):
    _product("lora_linear_dx", dy, weight, u, A, (A.shape[1], 1), None, seed, dropout_p, scale, dx)
