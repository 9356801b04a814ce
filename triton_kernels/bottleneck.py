"""bottleneck: down to few features, an activation, and up again, in one kernel for each direction.

    forward   pre = x D^T + b_d             y  = residual + scaling * (act(pre) U^T + b_u)
    backward  dpre = scaling * act'(pre) * (dy U)       dx = residual + dpre D        hidden = act(pre)
    factors   dD = dpre^T x,  dU^T = scaling * hidden^T dy  and, a row more, scaling * sum of dy

Forward and backward are one kernel: a product over all features, something elementwise on few, and a product back.
Launchers as in `lora_linear.py`; factors come in x's dtype, biases in any. `pre` is rounded before the activation, so
that backward, which makes the activation anew, finds what forward used.

Work split: a program of `bottleneck_kernel` takes 64 tokens (32 above 128 ranks) and all ranks, up to 256. The first
loop walks over the features and sums in registers; what is elementwise stays there too, and is the left operand of the
second loop, whose tiles of the output are each a single product. The residual, mostly x or dy itself, is read a second
time; a program has passed over 64 x 4096 of it, 0.5 MB, so it comes from L2 as far as the 50 MB are shared by all
programs. One of `bottleneck_grad_kernel` owns features and a block of ranks and walks over the tokens (see
`lora_down_grad`). What the activation gave is written once by backward: made anew by each of these programs, GELU took
41 instructions an element of dy, twice the time that dy takes to come.

Shared memory: a stage of the first loop holds a tile of x [64, depth] and one of the factor [ranks, depth], the second
loop the hidden tile [64, ranks] and stages of [ranks, columns]. FORMS keeps both below the 99 kB of sm_86 to sm_120.

Cost, modelled, for 8192 tokens of 4096 features and 64 ranks, bf16, residual x, on an H100 (3.0 TB/s, 800 TFLOP/s):
forward 67 MB of x, 67 MB of y, and 67 MB of the residual where L2 has lost it, 45 to 67 us; products 11 us. Backward
the same and 67 MB each of dy and x again for the factors, 90 to 112 us. Torch's operations pass over 67 MB four times
forward (8 backward: 90 and 180 us). Not timed yet.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .casts import round_to, to_float32
from .products import check_features, dot, launch, load, load_tile, rank_block, share, store_tile
from .tiles import Tile


@dataclass(frozen=True)
class Form:
    """tile: tokens, depth of the first loop's steps. columns: of the output, a step of the second loop."""

    tile: Tile
    columns: int


# Ranks up to -> form. Few registers and 99 kB of shared memory are what chose them, as compiled for sm_80 to sm_120.
FORMS = {
    64: Form(Tile(64, 64, 64, 4, 3), 64),
    128: Form(Tile(64, 128, 64, 8, 2), 64),
    256: Form(Tile(32, 256, 32, 8, 2), 32),  # with 64 tokens backward spilled
}
GRAD_TILE = Tile(64, 128, 64, 8, 3)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """x: float32."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh(z)) is sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at x: float32."""
    if ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s * (1.0 + x * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))


@triton.jit(do_not_specialize=["M"])
def bottleneck_kernel(
    out,
    small,
    hidden_out,
    x,
    pre,
    first,
    first_r,
    first_c,
    second,
    second_r,
    second_c,
    first_bias,
    second_bias,
    residual,
    scaling,
    M,
    C,
    N,
    R,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Of BM tokens: small[m, r] from sum_c x[m, c] first[r, c], and out[m, n] from sum_r hidden[m, r] second[r, n].

    Forward `small` is pre. Backward it is dpre, `x` is dy, there are no biases, and `hidden_out` gets act(pre). out may
    be None.
    """
    m0 = tl.program_id(0).to(tl.int64) * BM
    acc = tl.zeros([BM, BR], tl.float32)
    for c0 in range(0, C, BC):
        tile = load_tile(x, m0, c0, C, 1, M, C, BM, BC)
        acc = dot(tile, load_tile(first, 0, c0, first_r, first_c, R, C, BR, BC).T, acc)
    dtype: tl.constexpr = x.dtype.element_ty
    if BACKWARD:
        before = to_float32(load_tile(pre, m0, 0, R, 1, M, R, BM, BR))
        store_tile(hidden_out, _activate(before, ACTIVATION), m0, 0, R, 1, M, R)
        acc *= scaling * _slope(before, ACTIVATION)
        hidden = round_to(acc, dtype)
        store_tile(small, acc, m0, 0, R, 1, M, R)
    else:
        if first_bias is not None:
            r = tl.arange(0, BR)
            acc += to_float32(load(first_bias + r, r < R))[None, :]
        rounded = round_to(acc, dtype)
        store_tile(small, acc, m0, 0, R, 1, M, R)
        hidden = round_to(_activate(to_float32(rounded), ACTIVATION), dtype)
    if out is not None:
        for n0 in range(0, N, BN):
            factor = load_tile(second, 0, n0, second_r, second_c, R, N, BR, BN)
            tile = dot(hidden, factor, tl.zeros([BM, BN], tl.float32))
            if second_bias is not None:
                n = n0 + tl.arange(0, BN)
                tile += to_float32(load(second_bias + n, n < N))[None, :]
            if not BACKWARD:
                tile *= scaling
            if residual is not None:
                tile += to_float32(load_tile(residual, m0, n0, N, 1, M, N, BM, BN))
            store_tile(out, tile, m0, n0, N, 1, M, N)


@triton.jit(do_not_specialize=["M"])
def bottleneck_grad_kernel(
    out,
    x,
    small,
    scaling,
    M,
    C,
    R,
    SUMS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """out[r, c] = scaling * sum_m small[m, r] x[m, c], with SUMS out[R, c] = scaling * sum_m x[m, c]; or a part."""
    rank_blocks = tl.cdiv(R, BR)
    c0 = tl.program_id(0) // rank_blocks * BC
    r0 = tl.program_id(0) % rank_blocks * BR
    split = tl.program_id(1)
    begin, end = share(M, BM, split, tl.num_programs(1))
    acc = tl.zeros([BR, BC], tl.float32)
    sums = tl.zeros([BC], tl.float32)
    rows = R + 1 if SUMS else R
    for m0 in range(begin, end, BM):
        tile = load_tile(x, m0, c0, C, 1, M, C, BM, BC)
        if SUMS:
            sums += tl.sum(to_float32(tile), 0)
        acc = dot(load_tile(small, m0, r0, R, 1, M, R, BM, BR).T, tile, acc)
    out += split.to(tl.int64) * rows * C
    store_tile(out, acc * scaling, r0, c0, C, 1, R, C)
    if SUMS:  # noqa: SIM102, one of the two is known to the compiler
        if r0 == 0:
            c = c0 + tl.arange(0, BC)
            tl.store(out + tl.cast(R, tl.int64) * C + c, sums * scaling, mask=c < C)


def _bottleneck(out, small, hidden, x, pre, first, second, strides, biases, residual, scaling, activation, backward):
    (M, C), R = x.shape, small.shape[1]
    N = C if out is None else out.shape[1]
    check_features(C, N)
    block = rank_block(R, max(FORMS))
    form = next(form for most, form in FORMS.items() if most >= block)
    bottleneck_kernel[(triton.cdiv(M, form.tile.rows),)](
        out,
        small,
        hidden,
        x,
        pre,
        first,
        *strides[:2],
        second,
        *strides[2:],
        *biases,
        residual,
        scaling,
        M,
        C,
        N,
        R,
        ACTIVATION=activation,
        BACKWARD=backward,
        BM=form.tile.rows,
        BC=form.tile.depth,
        BN=form.columns,
        BR=block,
        num_warps=form.tile.warps,
        num_stages=form.tile.stages,
        enable_fp_fusion=False,
    )


def bottleneck_fwd(x, down, up, down_bias, up_bias, residual, activation, scaling, y, pre):
    """pre = x D^T + b_d, y = residual + scaling * (act(pre) U^T + b_u).

    x: [M, K] bf16|fp16. down: [R, K] and up: [N, R] of that dtype. down_bias: [R], up_bias: [N], float or None.
    residual: [M, N] of x's dtype, or None. activation: relu, gelu, gelu_tanh or silu. y: [M, N]. pre: [M, R]. Raises
    ValueError where K or N exceeds 2**22.
    """
    strides = (down.shape[1], 1, 1, up.shape[1])
    _bottleneck(y, pre, None, x, None, down, up, strides, (down_bias, up_bias), residual, scaling, activation, False)


def bottleneck_bwd(dy, pre, up, down, residual, activation, scaling, dpre, hidden, dx):
    """dpre = scaling * act'(pre) * (dy U), hidden = act(pre), dx = residual + dpre D.

    dy: [M, N]. residual: [M, K] or None. dpre, hidden: [M, R]. dx: [M, K], or None where it is not wanted. The rest as
    above.
    """
    strides = (1, up.shape[1], down.shape[1], 1)
    _bottleneck(dx, dpre, hidden, dy, pre, up, down, strides, (None, None), residual, scaling, activation, True)


def bottleneck_grad(small, x, scaling, out):
    """out = scaling * small^T x, and where out has a row more, there scaling * the sum of x over m.

    small: [M, R], x: [M, C] of one dtype. out: [R, C] or [R + 1, C] float32.
    """
    (M, C), R = x.shape, small.shape[1]
    check_features(C)
    block = rank_block(R, GRAD_TILE.rows)
    launch(
        bottleneck_grad_kernel,
        GRAD_TILE,
        (triton.cdiv(C, GRAD_TILE.columns) * triton.cdiv(R, block),),
        triton.cdiv(M, GRAD_TILE.depth),
        out,
        x,
        small,
        scaling,
        M,
        C,
        R,
        SUMS=out.shape[0] > R,
        BM=GRAD_TILE.depth,
        BC=GRAD_TILE.columns,
        BR=block,
    )
