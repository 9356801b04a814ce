"""Integer and floating-point arithmetic of the interpreter, against Python's integers and rational numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest

from .exact import BITS, bits_of, round_to, samples, value_of
from .parse import PtxError
from .snippets import execute

pytestmark = pytest.mark.slow

INTEGERS = {"u16": "u2", "s16": "i2", "u32": "u4", "s32": "i4", "u64": "u8", "s64": "i8"}


def integers(dtype: str, seed: int, count: int = 256) -> np.ndarray:
    """Of every magnitude, the ends of the range among them."""
    info, rng = np.iinfo(dtype), np.random.default_rng(seed)
    anything = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    values = [int(value) >> int(rng.integers(info.bits)) for value in anything]
    values[:4] = [info.min, info.max, 0, 1]
    return np.array(rng.permutation(np.array(values, dtype)), dtype)


def wrapped(values, dtype: str) -> np.ndarray:
    bits = np.dtype(dtype).itemsize * 8
    return np.array([int(v) % (1 << bits) for v in values], f"u{bits // 8}").view(dtype)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("type, dtype", INTEGERS.items())
def test_integer_arithmetic_wraps(type, dtype):
    a, b = integers(dtype, 1), integers(dtype, 2)
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    for op, function in {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul.lo": lambda x, y: x * y,
        "mul.hi": lambda x, y: x * y >> np.iinfo(dtype).bits,
        "min": min,
        "max": max,
    }.items():
        actual = execute(f"{op}.{type} d, a, b;", threads=256, a=a, b=b, d=dtype)
        assert np.array_equal(actual, wrapped([function(x, y) for x, y in pairs], dtype)), op


@pytest.mark.parametrize("type, dtype", INTEGERS.items())
def test_division_truncates_and_the_remainder_follows_the_dividend(type, dtype):
    a, b = integers(dtype, 3), integers(dtype, 4)
    b[b == 0] = 3
    quotient = [truncated(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    remainder = [int(x) - int(y) * q for x, y, q in zip(a, b, quotient, strict=True)]
    d, e = execute(f"div.{type} d, a, b; rem.{type} e, a, b;", threads=256, a=a, b=b, d=dtype, e=dtype)
    assert np.array_equal(d, wrapped(quotient, dtype))
    assert np.array_equal(e, wrapped(remainder, dtype))


def test_a_division_by_zero_gives_ones():
    assert (execute("div.u32 d, a, 0;", a=np.arange(32, dtype="u4"), d="u4") == 0xFFFFFFFF).all()


@pytest.mark.parametrize("type", ("u16", "s16", "u32", "s32"))
def test_wide_products(type):
    dtype = INTEGERS[type]
    wide = f"{dtype[0]}{2 * np.dtype(dtype).itemsize}"
    a, b, c = integers(dtype, 5), integers(dtype, 6), integers(wide, 7)
    body = f"mul.wide.{type} d, a, b; mad.wide.{type} e, a, b, c;"
    d, e = execute(body, threads=256, a=a, b=b, c=c, d=wide, e=wide)
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert np.array_equal(d, wrapped(products, wide))
    assert np.array_equal(e, wrapped([p + int(z) for p, z in zip(products, c, strict=True)], wide))


def test_mad():
    a, b, c = (integers("i4", seed) for seed in (8, 9, 10))
    lo, hi = execute("mad.lo.s32 d, a, b, c; mad.hi.s32 e, a, b, c;", threads=256, a=a, b=b, c=c, d="i4", e="i4")
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert np.array_equal(lo, wrapped([p + int(z) for p, z in zip(products, c, strict=True)], "i4"))
    assert np.array_equal(hi, wrapped([(p >> 32) + int(z) for p, z in zip(products, c, strict=True)], "i4"))


def test_negation_and_magnitude_of_the_smallest_integer_wrap():
    a = np.array([-(2**31), -5, 0, 7] * 8, "i4")
    neg, mag = execute("neg.s32 d, a; abs.s32 e, a;", a=a, d="i4", e="i4")
    assert neg[:4].tolist() == [-(2**31), 5, 0, -7]
    assert mag[:4].tolist() == [-(2**31), 5, 0, 7]


# ---- floats

NAN, INF = math.nan, math.inf
COUNT = 1024  # threads, and samples of each format


SIGNS = {"add": (-1, -1), "sub": (-1, -1), "mul": (-1, 1), "fma": (-1, 1, -1)}  # that turn the sign of the result
OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}
ROUNDINGS = [("f16", "rn"), ("bf16", "rn"), *(("f32", rounding) for rounding in ("rn", "rz", "rm", "rp"))]


def rounded(op: str, format: str, rounding: str, values: list[float]) -> float:
    function = OPERATIONS[op]
    if not all(map(math.isfinite, values)):
        return function(*values)
    if exact := function(*map(Fraction, values)):
        return round_to(exact, format, rounding)
    if rounding == "rm":  # an exact zero is negative, unless rounding plays no part in its sign
        return -function(*(sign * value for sign, value in zip(SIGNS[op], values, strict=True)))
    return function(*values)


def expected(op: str, format: str, rounding: str, *operands: np.ndarray) -> np.ndarray:
    values = ([value_of(int(bits), format) for bits in row] for row in zip(*operands, strict=True))
    return np.array([bits_of(rounded(op, format, rounding, row), format) for row in values], BITS[format])


@pytest.mark.parametrize("format, rounding", ROUNDINGS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_floats_are_rounded_once(op, format, rounding):
    names = "abc"[: len(SIGNS[op])]
    operands = {name: samples(format, COUNT, seed) for seed, name in enumerate(names)}
    body = f"{op}.{rounding}.{format} d, {', '.join(names)};"
    actual = execute(body, threads=COUNT, **operands, d=BITS[format])
    assert np.array_equal(actual, expected(op, format, rounding, *operands.values()))


def test_fma_sees_what_float64_cannot():
    """(1 + 2^-12)^2 lies half way between two floats; 2^-80 more or less decides, and is lost in a float64 sum."""
    a = np.full(32, 1 + 2**-12, "f4")
    c = np.where(np.arange(32) % 2 == 0, 2.0**-80, -(2.0**-80)).astype("f4")
    actual = execute("fma.rn.f32 d, a, a, c;", a=a, c=c, d="f4")
    low, high = np.float32(1 + 2**-11), np.float32(1 + 2**-11 + 2**-23)
    assert np.array_equal(actual, np.where(np.arange(32) % 2 == 0, high, low))
    naive = (a.astype("f8") ** 2 + c).astype("f4")
    assert not np.array_equal(naive, actual)  # so this test can fail


@pytest.mark.parametrize("element", ("f16", "bf16"))
def test_packed_halves_are_computed_apart(element):
    a, b, c = (samples(element, COUNT, seed) for seed in (16, 17, 18))
    words = {name: bits.view("u4") for name, bits in {"a": a, "b": b, "c": c}.items()}
    actual = execute(f"fma.rn.{element}x2 d, a, b, c;", threads=COUNT // 2, **words, d="u4")
    assert np.array_equal(actual.view("u2"), expected("fma", element, "rn", a, b, c))


@pytest.mark.parametrize("op, function", [("div", np.divide), ("sqrt", np.sqrt), ("rcp", np.reciprocal)])
def test_division_and_root_are_nearest(op, function):
    a, b = (samples("f32", COUNT, seed).view("f4") for seed in (19, 20))
    a[0] = NAN
    operands = {"a": a, "b": b} if op == "div" else {"a": a}
    actual = execute(f"{op}.rn.f32 d, {', '.join(operands)};", threads=COUNT, **operands, d="f4")
    with np.errstate(all="ignore"):
        wanted = function(*operands.values())
    assert np.array_equal(actual, wanted, equal_nan=True)
    assert (actual.view("u4")[np.isnan(actual)] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("format", ("f32", "f16", "bf16"))
def test_minimum_and_maximum_know_nan_and_the_sign_of_zero(format):
    pairs = [(1, NAN), (NAN, 1), (NAN, NAN), (0.0, -0.0), (-0.0, 0.0), (-INF, 2), (2, INF), (3, 4)]
    a, b = (np.array([bits_of(p[i], format) for p in pairs] * 4, BITS[format]) for i in (0, 1))
    body = f"min.{format} d, a, b; max.{format} e, a, b; min.NaN.{format} f, a, b; max.NaN.{format} g, a, b;"
    results = execute(body, a=a, b=b, **{name: BITS[format] for name in "defg"})
    for actual, wanted in zip(
        results,
        (
            (1, 1, NAN, -0.0, -0.0, -INF, 2, 3),
            (1, 1, NAN, 0.0, 0.0, 2, INF, 4),
            (NAN, NAN, NAN, -0.0, -0.0, -INF, 2, 3),
            (NAN, NAN, NAN, 0.0, 0.0, 2, INF, 4),
        ),
        strict=True,
    ):
        assert actual[:8].tolist() == [bits_of(value, format) for value in wanted]


def test_flush_and_saturate():
    tiny = np.float32(2.0**-130)
    a = np.array([tiny, -tiny, 0.5, 2, -1, NAN, INF, 1] * 4, "f4")
    ftz, sat, plain = execute(
        "add.ftz.f32 d, a, 0f00000000; add.sat.f32 e, a, 0f00000000; add.f32 f, a, 0f00000000;",
        a=a,
        d="f4",
        e="f4",
        f="f4",
    )
    assert np.array_equal(ftz[:8], np.array([0, 0, 0.5, 2, -1, NAN, INF, 1], "f4"), equal_nan=True)
    assert np.array_equal(sat[:8], np.array([tiny, 0, 0.5, 1, 0, 0, 1, 1], "f4"))
    assert np.array_equal(plain, a, equal_nan=True)
    assert np.array_equal(np.signbit(execute("mul.ftz.f32 d, a, 0f3F800000;", a=a, d="f4")[:2]), [False, True])


def test_signs_of_packed_values_and_of_nan():
    a = np.array([0x80007FFF, 0x3C00BC00] * 16, "u4")
    neg, mag = execute("neg.f16x2 d, a; abs.bf16x2 e, a;", a=a, d="u4", e="u4")
    assert neg[:2].tolist() == [0x0000FFFF, 0xBC003C00]
    assert mag[:2].tolist() == [0x00007FFF, 0x3C003C00]


def test_approximations_are_close():
    a = np.linspace(0.1, 20, 32, dtype="f4")
    for op, function in {"ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda x: x**-0.5, "tanh": np.tanh}.items():
        actual = execute(f"{op}.approx.f32 d, a;", a=a, d="f4")
        assert np.allclose(actual, function(a.astype("f8")), rtol=1e-6), op


# ---- comparison

RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def relation(name: str, a, b) -> bool:
    return eval(f"a {RELATIONS[name]} b", {"a": a, "b": b})


@pytest.mark.parametrize("compare", RELATIONS)
def test_comparison_of_integers_minds_the_sign(compare):
    a, b = integers("u4", 21), integers("u4", 22)
    b[::3] = a[::3]
    body = f"setp.{compare}.u32 p, a, b; selp.u32 d, 1, 0, p; setp.{compare}.s32 p, a, b; selp.u32 e, 1, 0, p;"
    d, e = execute(body, registers=".reg .pred p;", threads=256, a=a, b=b, d="u4", e="u4")
    assert d.tolist() == [relation(compare, int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert e.tolist() == [relation(compare, int(x), int(y)) for x, y in zip(a.view("i4"), b.view("i4"), strict=True)]


@pytest.mark.parametrize("compare", RELATIONS)
def test_comparison_with_nan_is_false_or_with_u_true(compare):
    values = np.array([-INF, -1, -0.0, 0.0, 1, INF, NAN, 2], "f4")
    a, b = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    body = f"setp.{compare}.f32 p, a, b; selp.u32 d, 1, 0, p; setp.{compare}u.f32 p, a, b; selp.u32 e, 1, 0, p;"
    d, e = execute(body, registers=".reg .pred p;", threads=64, a=a, b=b, d="u4", e="u4")
    nan = np.isnan(a) | np.isnan(b)
    with np.errstate(all="ignore"):
        ordered = relation(compare, a, b)
    assert np.array_equal(d, ordered & ~nan)
    assert np.array_equal(e, ordered | nan)


def test_comparison_combines_with_a_predicate_and_gives_the_opposite():
    a = np.arange(32, dtype="u4")
    body = """
        setp.lt.u32 q, a, 16;
        and.b32 d, a, 1;
        setp.eq.u32 r, d, 0;
        setp.gt.and.u32 p|q, a, 8, !r;   // a > 8 and a odd | a <= 8 and a odd
        selp.u32 d, 1, 0, p;
        selp.u32 e, 1, 0, q;
        setp.num.f32 p, 0f7FC00000, 0f00000000;
        selp.u32 f, 1, 0, p;
    """
    d, e, f = execute(body, registers=".reg .pred p, q, r;", a=a, d="u4", e="u4", f="u4")
    assert np.array_equal(d, (a > 8) & (a % 2 == 1))
    assert np.array_equal(e, (a <= 8) & (a % 2 == 1))
    assert not f.any()


@pytest.mark.parametrize(
    "body",
    (
        "add.sat.s32 d, a, a;",  # a modifier that exists and is not implemented
        "add.f16 d, a, a;",  # the register is 32 bits wide
        "fma.f32 d, a, a, a;",  # without a rounding
        "mul.f32 d, a, 1;",  # an integer for a float
        "add.u32 d, a, 4294967296;",  # more than 32 bits
        "add.u32 d, a;",
        "frobnicate.u32 d, a;",
        "call.uni (d), f, (a);",
    ),
)
def test_what_is_not_implemented_is_refused_when_loaded(body):
    with pytest.raises(PtxError, match="PTX line"):
        execute(body, a=np.zeros(32, "u4"), d="u4")
