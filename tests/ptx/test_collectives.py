"""Shuffles, votes and reductions of a warp."""

import numpy as np
import pytest

from .parse import PtxError
from .snippets import execute

pytestmark = pytest.mark.slow

LANES = np.arange(32, dtype="u4")
VALUES = LANES * 10 + 5
REGISTERS = ".reg .pred p, q; .reg .b32 x;"


def shuffled(mode, value, b, c):
    """The definition in the PTX ISA, lane by lane."""
    result, valid = [], []
    for lane in range(32):
        bval, cval, segment = b[lane] & 31, c[lane] & 31, c[lane] >> 8 & 31
        last = (lane & segment) | (cval & ~segment)
        source, inside = {
            "up": (lane - bval, lane - bval >= last),
            "down": (lane + bval, lane + bval <= last),
            "bfly": (lane ^ bval, lane ^ bval <= last),
            "idx": ((lane & segment) | (bval & ~segment), ((lane & segment) | (bval & ~segment)) <= last),
        }[mode]
        result.append(value[source] if inside else value[lane])
        valid.append(inside)
    return np.array(result, "u4"), np.array(valid)


@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
@pytest.mark.parametrize("width", (32, 16, 8, 2))
def test_shuffles_within_segments(mode, width):
    """b and c as CUDA's __shfl_*_sync pass them: c = (32 - width) << 8 | (0 for up, else 31); b of any size."""
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (np.full(32, n, "u4") for n in (0, 1, 3, 8, 17, 31, 33, 255)):
        body = f"shfl.sync.{mode}.b32 d|p, a, b, {c}, -1; selp.u32 e, 1, 0, p;"
        d, e = execute(body, registers=REGISTERS, a=VALUES, b=b, d="u4", e="u4")
        result, valid = shuffled(mode, VALUES, b.astype(int), np.full(32, c))
        assert np.array_equal(d, result) and np.array_equal(e, valid)


def test_each_lane_may_ask_for_another():
    b = np.random.default_rng(0).integers(0, 32, 32, dtype="u4")
    assert np.array_equal(execute("shfl.sync.idx.b32 d, a, b, 31, -1;", a=VALUES, b=b, d="u4"), VALUES[b])


def test_a_lane_that_does_not_take_part_gives_nothing_of_use():
    body = """
        setp.lt.u32 p, a, 85;                             // lanes 0 to 7
        mov.u32 d, 0;
        @p shfl.sync.down.b32 d, a, 4, 31, 255;
    """
    d = execute(body, registers=REGISTERS, a=VALUES, d="u4")
    assert np.array_equal(d, np.where(LANES < 4, VALUES + 40, np.where(LANES < 8, 0xFFFFFFFF, 0)))


def test_a_mask_without_the_lane_itself_is_an_error():
    with pytest.raises(PtxError, match=r"mask 0x0000ffff lacks the lane(?s:.*)thread \(16, 0, 0\)"):
        execute("shfl.sync.idx.b32 d, a, 0, 31, 65535;", a=VALUES, d="u4")


def test_votes():
    body = """
        setp.gt.u32 p, a, 100;
        vote.sync.ballot.b32 d, p, -1;
        vote.sync.any.pred q, p, -1;  selp.u32 e, 1, 0, q;
        vote.sync.all.pred q, p, -1;  selp.u32 x, 2, 0, q;  or.b32 e, e, x;
        vote.sync.uni.pred q, p, -1;  selp.u32 x, 4, 0, q;  or.b32 e, e, x;
        @p vote.sync.all.pred q, p, 4294966272;           // lanes 10 to 31, which are those
        @p selp.u32 x, 8, 0, q;
        @p or.b32 e, e, x;
    """
    d, e = execute(body, registers=REGISTERS, a=VALUES, d="u4", e="u4")
    assert (d == 0xFFFFFC00).all()
    assert np.array_equal(e, np.where(VALUES > 100, 1 + 8, 1))


@pytest.mark.parametrize("op, function", (("add", np.add), ("min", np.minimum), ("max", np.maximum)))
def test_redux_of_integers(op, function):
    a = np.random.default_rng(1).integers(0, 2**32, 32, dtype="u4")
    d, e = execute(f"redux.sync.{op}.u32 d, a, -1; redux.sync.{op}.s32 e, a, -1;", a=a, d="u4", e="i4")
    assert (d == function.reduce(a, dtype="u4")).all() and (e == function.reduce(a.view("i4"), dtype="i4")).all()


def test_redux_of_bits_by_a_part_of_the_warp():
    body = "setp.lt.u32 p, a, 8; mov.u32 d, 0; @p redux.sync.or.b32 d, a, 255; @!p redux.sync.xor.b32 d, a, 4294967040;"
    d = execute(body, registers=REGISTERS, a=LANES, d="u4")
    assert np.array_equal(d, np.where(LANES < 8, 7, np.bitwise_xor.reduce(LANES[8:])))


def test_redux_of_floats():
    a = np.random.default_rng(2).standard_normal(32).astype("f4")
    a[5] = np.nan
    body = "redux.sync.min.f32 d, a, -1; redux.sync.max.f32 e, a, -1; redux.sync.max.NaN.f32 f, a, -1;"
    d, e, f = execute(body, a=a, d="f4", e="f4", f="u4")
    assert (d == np.nanmin(a)).all() and (e == np.nanmax(a)).all() and (f == 0x7FFFFFFF).all()


def test_special_registers():
    body = "mov.u32 d, %laneid; mov.u32 e, %lanemask_lt; mov.u32 f, %lanemask_ge; mov.u32 g, %warpid;"
    d, e, f, g = execute(body, threads=64, d="u4", e="u4", f="u4", g="u4")
    assert np.array_equal(d, np.tile(LANES, 2)) and np.array_equal(g, np.arange(64) // 32)
    assert e.tolist()[:32] == [2**n - 1 for n in range(32)]
    assert f.tolist()[:32] == [2**32 - 2**n for n in range(32)]
    with pytest.raises(PtxError, match="%clock"):
        execute("mov.u32 d, %clock;", d="u4")
