"""Conversions and moves of the interpreter, against rational numbers, numpy and torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from .exact import BITS, bits_of, round_to, samples, value_of
from .parse import PtxError
from .snippets import execute

pytestmark = pytest.mark.slow

COUNT = 1024
NAN, INF = math.nan, math.inf


def converted(values: list[float], to: str, rounding: str) -> np.ndarray:
    rounded = [round_to(Fraction(v), to, rounding) if math.isfinite(v) and v else v for v in values]
    return np.array([bits_of(v, to) for v in rounded], BITS[to])


@pytest.mark.parametrize("to, rounding", [("f16", "rn"), ("f16", "rz"), ("bf16", "rn"), ("bf16", "rz")])
def test_float_to_half_rounds_once(to, rounding):
    a = samples("f32", COUNT, 1)
    rng = np.random.default_rng(2)  # ties and their neighbours, where halves have their digits
    a[:256] = rng.integers(0x3000, 0x4800, 256, dtype="u4") << 16 | rng.choice(
        np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0xFFF, 0x1001, 0x3000], "u4"), 256
    )
    values = [value_of(int(bits), "f32") for bits in a]
    actual = execute(f"cvt.{rounding}.{to}.f32 d, a;", threads=COUNT, a=a, d="u2")
    assert np.array_equal(actual, converted(values, to, rounding))
    if rounding == "rn":
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[to]
        agrees = torch.from_numpy(a.view("f4")).to(dtype).view(torch.int16).numpy().view("u2") == actual
        assert agrees[~np.isnan(a.view("f4"))].all()


@pytest.mark.parametrize("to", ("f16", "bf16"))
def test_two_floats_to_a_word_put_the_first_on_top(to):
    a, b = samples("f32", COUNT, 3), samples("f32", COUNT, 4)
    actual = execute(f"cvt.rn.{to}x2.f32 d, a, b;", threads=COUNT, a=a, b=b, d="u4")
    high, low = (converted([value_of(int(bits), "f32") for bits in array], to, "rn") for array in (a, b))
    assert np.array_equal(actual, low.astype("u4") | high.astype("u4") << np.uint32(16))


@pytest.mark.parametrize("source", ("f16", "bf16"))
def test_half_to_float_is_exact(source):
    a = np.arange(COUNT * 64, dtype="u2").reshape(64, COUNT)
    for row in a[::7]:
        actual = execute(f"cvt.f32.{source} d, a;", threads=COUNT, a=row, d="u4")
        assert np.array_equal(actual, [bits_of(value_of(int(bits), source), "f32") for bits in row])


def test_double_to_float_rounds_once():
    a = np.random.default_rng(5).standard_normal(COUNT) * 2.0 ** np.linspace(-160, 130, COUNT)
    for rounding in ("rn", "rz", "rm", "rp"):
        actual = execute(f"cvt.{rounding}.f32.f64 d, a;", threads=COUNT, a=a, d="u4")
        assert np.array_equal(actual, converted(a.tolist(), "f32", rounding)), rounding
    actual = execute("cvt.rn.f16.f64 d, a;", threads=COUNT, a=a, d="u2")
    assert np.array_equal(actual, converted(a.tolist(), "f16", "rn"))
    f = samples("f32", COUNT, 7).view("f4")
    f = np.where(np.isnan(f), 0, f)
    assert np.array_equal(execute("cvt.f64.f32 d, a;", threads=COUNT, a=f, d="f8"), f.astype("f8"))


INTEGERS = {"u8": "u1", "s8": "i1", "u16": "u2", "s16": "i2", "u32": "u4", "s32": "i4", "u64": "u8", "s64": "i8"}


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize(
    "mode, integral", [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)]
)
def test_float_to_integer_clamps(mode, integral, to):
    info = np.iinfo(INTEGERS[to])
    a = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 2.7, -2.7, -0.0, 1e30, -1e30, INF, -INF, 127.5, 255.5, 2.0**31, 2.0**63], "f4"
    )
    a = np.concatenate([a, -1.37 * 2.0 ** np.arange(16)]).astype("f4")
    register = f"u{max(2, info.bits // 8)}"  # there is no narrower one
    actual = execute(f"cvt.{mode}.{to}.f32 d, a;", a=a, d=register)
    clamped = [int(min(max(integral(x) if math.isfinite(x) else x, info.min), info.max)) for x in a.tolist()]
    assert np.array_equal(actual, [x % (1 << 8 * np.dtype(register).itemsize) for x in clamped])


def test_nan_to_integer():
    a = np.full(32, NAN, "f4")
    d, e, f = execute("cvt.rni.s32.f32 d, a; cvt.rni.u64.f32 e, a; cvt.rni.s64.f32 f, a;", a=a, d="i4", e="u8", f="i8")
    assert (d[0], e[0], f[0]) == (0, 2**63, -(2**63))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", ("f16", "bf16", "f32"))
def test_integer_to_float_rounds_once(source, to):
    info, rng = np.iinfo(INTEGERS[source]), np.random.default_rng(6)
    values = [
        int(v) >> int(rng.integers(0, info.bits)) for v in rng.integers(info.min, info.max, 252, info.dtype, True)
    ]
    values += [info.min, info.max, 0, min(info.max, 2**54 + 2**30 + 1)]  # the last: a tie for float32 but for one bit
    a = np.array(values, INTEGERS[source])
    a = a.astype(f"{a.dtype.kind}2") if info.bits == 8 else a
    actual = execute(f"cvt.rn.{to}.{source} d, a;", threads=256, a=a, d=BITS[to])
    assert np.array_equal(actual, [bits_of(round_to(Fraction(v), to), to) for v in values])


def test_between_integers_extends_truncates_and_saturates():
    a = np.array([0x1FF, 0x80, 0x7F, 0xFFFFFF80, 0x8000, 0xFFFF8000, 0, 0x7FFFFFFF] * 4, "u4")
    for to, source, sat, wanted in (
        ("u64", "u32", "", lambda x: x),
        ("s64", "s32", "", lambda x: x - (x >> 31 << 32)),
        ("u64", "u8", "", lambda x: x & 0xFF),
        ("s64", "s8", "", lambda x: (x & 0xFF) - (x >> 7 & 1) * 256),
        ("u64", "u16", "", lambda x: x & 0xFFFF),
        ("s64", "s16", "", lambda x: (x & 0xFFFF) - (x >> 15 & 1) * 65536),
        ("u64", "s32", ".sat", lambda x: max(x - (x >> 31 << 32), 0)),
    ):
        actual = execute(f"cvt{sat}.{to}.{source} d, a;", a=a, d="u8")
        assert np.array_equal(actual, [wanted(int(x)) % 2**64 for x in a]), (to, source)
    narrow = {"u8": (0, 255), "s8": (-128, 127), "u16": (0, 65535), "s16": (-32768, 32767)}
    for to, (low, high) in narrow.items():
        actual = execute(f"cvt.sat.{to}.s32 d, a;", a=a, d="u2")
        assert np.array_equal(actual, [min(max(int(x), low), high) % 65536 for x in a.view("i4")]), to
        actual = execute(f"cvt.{to}.u32 d, a;", a=a, d="u2")
        bits = int(to[1:])
        extended = [int(x) % (1 << bits) - (int(x) >> bits - 1 & 1) * (1 << bits) * (to[0] == "s") for x in a]
        assert np.array_equal(actual, [x % 65536 for x in extended]), to


def test_rounding_to_an_integral_float_and_saturation():
    a = np.array([0.5, 1.5, -0.5, 2.7, -2.7, NAN, INF, 0.25] * 4, "f4")
    body = "cvt.rni.f32.f32 d, a; cvt.rmi.f32.f32 e, a; cvt.rzi.f32.f32 f, a; cvt.sat.f32.f32 g, a;"
    d, e, f, g = execute(body, a=a, d="f4", e="f4", f="f4", g="f4")
    for actual, wanted in ((d, np.rint(a)), (e, np.floor(a)), (f, np.trunc(a))):
        assert np.array_equal(actual, wanted, equal_nan=True)
    assert g[:8].tolist() == [0.5, 1, 0, 1, 0, 0, 1, 0.25]


def test_moves_pack_and_unpack():
    a = np.arange(32, dtype="u4") * 0x01020304
    b = np.arange(32, dtype="u8") * 0x0102030405060708
    body = """
        mov.b32 {low, high}, a;
        mov.b32 d, {high, low};
        mov.b64 {x, y}, b;
        mov.b64 e, {y, x};
        mov.b32 f, {0, low};
        mov.b32 {_, low}, a;
        mov.b32 g, {low, low};
    """
    registers = ".reg .b16 low, high; .reg .b32 x, y;"
    d, e, f, g = execute(body, registers=registers, a=a, b=b, d="u4", e="u8", f="u4", g="u4")
    assert np.array_equal(d, a >> np.uint32(16) | a << np.uint32(16))
    assert np.array_equal(e, b >> np.uint64(32) | b << np.uint64(32))
    assert np.array_equal(f, a << np.uint32(16))
    assert np.array_equal(g, (a >> np.uint32(16)) * np.uint32(0x10001))


def test_a_register_that_was_never_written_holds_ones():
    assert (execute("mov.b32 d, never;", registers=".reg .b32 never;", d="u4") == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    "body", ("cvt.rn.relu.f16.f32 d, a;", "cvt.f16.f32 d, a;", "cvt.rn.satfinite.e4m3x2.f32 d, a, a;")
)
def test_conversions_that_are_not_implemented_are_refused(body):
    with pytest.raises(PtxError, match="not implemented"):
        execute(body, a=np.zeros(32, "f4"), d="u2")
