"""lora_linear: the product with a frozen weight, dense or NF4, and the low-rank update, in one kernel.

    forward   y[m, n]  = sum_k x[m, k] W[n, k] + bias[n] + scale * sum_r xa[m, r] B[n, r]
    backward  dx[m, k] = sum_n dy[m, n] W[n, k] + scale * keep[m, k] * sum_r u[m, r] A[r, k]

These are `lora_linear_fwd` and `lora_linear_dx`; the passes that make xa, u and the gradients of A and B stand in
`lora_linear_passes.py`, with launchers of the same kind: contiguous tensors of one device, the outputs last, nothing
returned, nothing autotuned, nothing asked of the device. Where a sum is shared (`products.py`) a launcher takes float32
memory from torch's allocator, as an operation of torch would: it can be captured in a CUDA graph.

Work split: a program makes a tile of the output and walks over K, or backward over N. One kernel does both ways. It
reads tiles of the weight as they are stored and multiplies by them as they are or transposed, which costs nothing where
the tensor core reads its right-hand operand from shared memory. All sums are float32, with one rounding at the end.

NF4: codes come in words of eight, which stay with their thread: in its layout the eight are neighbours along K, so that
their absmax is looked up once. They are dequantized in registers as `nf4.py` does it, by a look-up in shared memory and
a float32 product, rounded once to x's dtype: the bits of `nf4_dequantize`. So every block size works, also blocks that
cross rows, and every K that words divide. Where K % 8 > 0 (`why_no_words`) codes would come one by one, at about six
times the instructions, and Triton 3.6 does not compile that: such a weight is dequantized first.

Form: tokens are the rows of the product, x W^T. It is wgmma on sm_90 from 64 tokens on, tcgen05 on sm_100, and mma.sync
otherwise. The transposed form, W x^T, could feed a dequantized weight to wgmma from registers. Compiled (Triton 3.9,
sm_90, a tile of 64 x 128 x 64), it is worse: Triton moves the weight through shared memory even so, since its layout is
not the operand's, ptxas serializes the wgmma (C7510), and the loop takes 7.3 instructions a weight against 6.3. Looking
up in global memory takes 14, a tree of selects 17.

Cost, modelled, for 4096 x 4096 in bf16, nested blocks of 64 and rank 16 on an H100 (3.0 TB/s, 800 TFLOP/s, 132 SMs of 4
instructions a cycle at 1.76 GHz); instructions of the loop as counted in the machine code for sm_90. Not timed yet.

    tokens   bytes             tensor cores   instructions a weight
        16    9 MB    3.0 us   0.7 us         6.4                      3.6 us
        64   10 MB    3.2 us   2.7 us         6.8                      3.9 us
       512   17 MB    5.7 us   21.5 us        8.7, by 4 tiles         19.7 us

The float32 parts of shared sums are not in it: they stay in L2. From some hundreds of tokens on, each weight is
dequantized so often that `nf4_dequantize` (14 us) and one large product win.
"""

import math

import triton
import triton.language as tl

from .casts import round_to, to_float32
from .dropout import keep_mask, keep_threshold
from .lora_linear_passes import lora_down, lora_down_grad, lora_up_grad
from .nf4 import ABSMAX_BLOCKSIZE, NF4_VALUES, look_up, table_of
from .products import check_features, dot, launch, load, load_factor, load_tile, rank_block, share, store_tile
from .tiles import tile_of

__all__ = ["lora_down", "lora_down_grad", "lora_linear_dx", "lora_linear_fwd", "lora_up_grad"]


@triton.jit
def _unpack(words):
    """uint32 [rows, W], eight codes each, to the codes [rows, 8 W]. A thread holds the codes of its own words."""
    halves = tl.join(words, words >> 16)
    bytes = tl.join(halves, halves >> 8)
    codes = tl.join(bytes >> 4, bytes) & 15  # the even element is in the high nibble
    return codes.reshape([words.shape[0], words.shape[1] * 8]).to(tl.int32)


@triton.jit
def _load_codes(packed, origin, row, row_inside, columns_left, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Codes of the elements origin + row + column: int32 [len(row), COLUMNS]."""
    word = tl.arange(0, COLUMNS // 8)[None, :]
    inside = None if EVEN else row_inside & (word * 8 < columns_left)
    words = load(packed.to(tl.pointer_type(tl.int32)) + origin // 8 + (row // 8 + word), inside)
    return _unpack(words.to(tl.uint32, bitcast=True))


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
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """out[m, c] = sum_d x[m, d] W[c, d] + bias[c] + scale * keep[m, c] * sum_r left[m, r] right[r, c], or a part of it.

    Backward, that is not FORWARD: W[d, c], and `x` is dy. K = k_units * UNIT, so that the compiler knows what divides
    K. EVEN: no tile of the weight crosses an edge, and nothing is masked. BLOCKSIZE: 0 for a dense weight.
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
            codes = _load_codes(weight, origin, row, n < N - n0, K - k0, BK, EVEN)
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

    if not NF4:  # noqa: SIM102, one of the two is known to the compiler
        # The update comes last: ptxas serializes the wgmma of the loop where it adds to a product.
        if split == 0:
            acc += _update(left, right, stride_r, stride_c, bias, seed, threshold, scale, m0, c0, M, C, R, BM, BC, BR)
    store_tile(out + split.to(tl.int64) * M * C, acc, m0, c0, C, 1, M, C)


def weight_kind(weight, K):
    """Which tiles: "dense", "nf4", or "nf4_ragged": few columns are known to share an absmax."""
    if not isinstance(weight, tuple):
        return "dense"
    return "nf4" if K % 32 == 0 else "nf4_ragged"


def why_no_words(packed, K):
    """Why eight codes are not always a word of memory in each row, or None where they are."""
    if K % 8:
        return f"K = {K} is no multiple of 8, the codes of a word"
    return "the codes do not begin at a multiple of 4 bytes" if packed.data_ptr() % 4 else None


def _product(launcher, x, weight, left, right, strides, bias, seed, dropout_p, scale, out):
    if out.numel() == 0:
        return
    (M, D), C, R = x.shape, out.shape[1], left.shape[1]
    forward = launcher == "lora_linear_fwd"
    N, K = (C, D) if forward else (D, C)
    check_features(N, K)
    kind = weight_kind(weight, K)
    *tensors, blocksize = weight if isinstance(weight, tuple) else (weight, None, None, None, None, 0)
    if blocksize > 0 and (reason := why_no_words(tensors[0], K)):
        raise ValueError(f"{launcher}: {reason}")
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
        BM=tile.rows,
        BC=tile.columns,
        BD=tile.depth,
        BR=rank_block(R, 64),
    )


def lora_linear_fwd(x, weight, xa, B, bias, scale, y):
    """y = x W^T + bias + scale * xa B^T.

    x: [M, K] bf16|fp16. weight: [N, K] of that dtype, or a tuple (packed, absmax, absmax_code, absmax_scale,
    absmax_offset, blocksize), see `nf4_dequantize`. xa: [M, R] and bias: [N] or None, of that dtype. B: [N, R], of that
    dtype or float32, then rounded to it. scale: a number. y: [M, N]. Raises ValueError where N or K exceeds 2**22, and
    for a tuple where `why_no_words` has a reason.
    """
    _product("lora_linear_fwd", x, weight, xa, B, (1, B.shape[1]), bias, None, 0.0, scale, y)


def lora_linear_dx(dy, weight, u, A, scale, seed, dropout_p, dx):
    """dx = dy W + scale * keep * (u A).

    dy: [M, N]. u: [M, R]. A: [R, K]. seed: int64 tensor of one element that makes the mask (`dropout.py`), or None.
    dx: [M, K]. The rest as in `lora_linear_fwd`.
    """
    _product("lora_linear_dx", dy, weight, u, A, (A.shape[1], 1), None, seed, dropout_p, scale, dx)
