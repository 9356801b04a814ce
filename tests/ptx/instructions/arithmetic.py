"""Integer and floating-point arithmetic, comparison and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from ..actions import Compute
from ..formats import (
    F32,
    PRED,
    TYPES,
    Type,
    canonical,
    exact_sum,
    flush,
    halves,
    narrow,
    packed,
    saturate,
    unsigned,
    widen,
)
from ..parse import Pair, PtxError, Symbol
from . import compute, instruction

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
HALVES = ("f16x2", "bf16x2", "f16", "bf16")
ROUNDINGS = ("rn", "rz", "rm", "rp")

Function = Callable[..., ndarray]

# ---- integers


@instruction("{op}.{type}", op=("add", "sub", "min", "max"), type=INTEGERS)
def integer(op, type):
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[op]
    return compute(type, (type, type), function)


def product(part: str, type: Type) -> Function:
    if part == "lo":
        return np.multiply
    if part == "wide":
        return lambda a, b: a.astype(type.wide.dtype) * b.astype(type.wide.dtype)
    if type.bits == 64:
        return lambda a, b: np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], dtype=type.dtype)
    bits = type.wide.dtype.type(type.bits)
    return lambda a, b: (a.astype(type.wide.dtype) * b.astype(type.wide.dtype) >> bits).astype(type.dtype)


@instruction("mul.{part}.{type}", part=("lo", "hi"), type=INTEGERS)
@instruction("mul.{part}.{type}", part=("wide",), type=INTEGERS[:4])
def mul_integer(part, type):
    return compute(type.wide if part == "wide" else type, (type, type), product(part, type))


@instruction("mad.{part}.{type}", part=("lo", "hi"), type=INTEGERS)
@instruction("mad.{part}.{type}", part=("wide",), type=INTEGERS[:4])
def mad_integer(part, type):
    out, multiply = type.wide if part == "wide" else type, product(part, type)
    return compute(out, (type, type, out), lambda a, b, c: multiply(a, b) + c)


@instruction("{op}.{type}", op=("div", "rem"), type=INTEGERS)
def div_integer(op, type):
    """Truncates toward zero; the remainder has the sign of the dividend. A division by zero gives ones."""

    def function(a: ndarray, b: ndarray) -> ndarray:
        divisor = np.where(b == 0, type.dtype.type(1), b)
        remainder = np.fmod(a, divisor)
        result = (a - remainder) // divisor if op == "div" else remainder
        return np.where(b == 0, unsigned(type.bits).type(2**type.bits - 1).astype(type.dtype), result)

    return compute(type, (type, type), function)


@instruction("abs.{type}", type=("s16", "s32", "s64"))
def abs_integer(type):
    return compute(type, (type,), np.abs)


@instruction("neg.{type}", type=("s16", "s32", "s64"))
def neg_integer(type):
    return compute(type, (type,), np.negative)


# ---- floats


def by_element(type: Type, function: Function) -> Function:
    """`function` on each half of the values of a packed type; itself for any other."""
    if type.element is None:
        return function
    return lambda *values: packed(*map(function, *(halves(value, type.element) for value in values)))


def rounded(type: Type, function: Function, rounding: str | None = None, ftz: bool = False, sat: bool = False):
    """A function of float64 values whose result is exact, or rounded to odd, as one of `type` that rounds once."""
    element = type.element or type

    def apply(*values: ndarray) -> ndarray:
        if ftz:
            values = map(flush, values)
        result = narrow(function(*(widen(value, element) for value in values)), element, rounding or "rn")
        result = saturate(result) if sat else result
        return flush(result) if ftz else result

    return by_element(type, apply)


def native(type: Type, function: Function) -> Function:
    """The same for an operation that numpy itself rounds to nearest in `type`."""
    return lambda *values: canonical(function(*values), type)


@instruction(
    "{op}[.{rounding}][.ftz][.sat].{type}", op=("add", "sub", "mul"), rounding=ROUNDINGS, type=("f32", "f32x2")
)
@instruction("{op}[.{rounding}].{type}", op=("add", "sub", "mul"), rounding=("rn",), type=(*HALVES, "f64"))
def add_mul(op, rounding, type, ftz=False, sat=False):
    plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op]
    if type.name == "f64" or (type == F32 and rounding in (None, "rn") and not (ftz or sat)):
        return compute(type, (type, type), native(type, plain))
    exact = {
        "add": lambda a, b: exact_sum(a, b, rounding),
        "sub": lambda a, b: exact_sum(a, -b, rounding),
        "mul": np.multiply,
    }[op]
    return compute(type, (type, type), rounded(type, exact, rounding, ftz, sat))


@instruction("fma.{rounding}[.ftz][.sat].{type}", rounding=ROUNDINGS, type=("f32", "f32x2"))
@instruction("fma.{rounding}.{type}", rounding=("rn",), type=HALVES)
def fma(rounding, type, ftz=False, sat=False):
    def exact(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
        return exact_sum(a * b, c, rounding)  # the product of two floats of at most 24 digits is exact in float64

    return compute(type, (type, type, type), rounded(type, exact, rounding, ftz, sat))


# The hardware's .approx and .full results differ from these, which are the nearest floats, by a few units in the last
# place (PTX ISA, each instruction's table of errors).
@instruction("div.{how}[.ftz].{type}", how=("rn", "full", "approx"), type=("f32",))
@instruction("div.{how}.{type}", how=("rn",), type=("f64",))
def div_float(how, type, ftz=False):
    return compute(type, (type, type), rounded(type, np.divide, ftz=ftz))


@instruction("{op}.{how}[.ftz].{type}", op=("sqrt", "rcp"), how=("rn", "approx"), type=("f32",))
@instruction(
    "{op}.{how}[.ftz].{type}", op=("rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), how=("approx",), type=("f32",)
)
def unary(op, how, ftz, type):
    function = {
        "sqrt": np.sqrt,
        "rcp": np.reciprocal,
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }[op]
    return compute(type, (type,), rounded(type, function, ftz=ftz))


def minimum_or_maximum(op: str, nan_wins: bool) -> Function:
    """Of any number of floats. -0 is less than +0. A NaN loses against a number, or wins against all."""

    def function(*values: ndarray) -> ndarray:
        result = values[0]
        for value in values[1:]:
            smaller = (result < value) | ((result == value) & np.signbit(result))
            larger = (result > value) | ((result == value) & np.signbit(value))
            keep = (smaller if op == "min" else larger) | np.isnan(result if nan_wins else value)
            result = np.where(keep, result, value)
        return result

    return function


@instruction("{op}[.ftz][.NaN].{type}", op=("min", "max"), type=("f32",))
@instruction("{op}[.NaN].{type}", op=("min", "max"), type=HALVES)
@instruction("{op}.{type}", op=("min", "max"), type=("f64",))
def min_max(op, type, ftz=False, NaN=False):
    function = rounded(type, minimum_or_maximum(op, bool(NaN)), ftz=ftz)

    def bind(kernel, *operands):  # sm_100 and later have a form with three sources
        return compute(type, (type,) * min(max(len(operands) - 1, 2), 3), function)(kernel, *operands)

    return bind


@instruction("{op}[.ftz].{type}", op=("abs", "neg"), type=("f32",))
@instruction("{op}.{type}", op=("abs", "neg"), type=(*HALVES, "f64"))
def sign(op, type, ftz=False):
    """Of the sign bits only: a NaN keeps its payload."""
    bits = TYPES[f"b{type.bits}"]
    signs = sum(1 << place for place in range(type.bits - 1, 0, -(type.element or type).bits))
    signs = unsigned(type.bits).type(signs)
    function = (lambda a: a & ~signs) if op == "abs" else (lambda a: a ^ signs)
    if ftz:
        return compute(bits, (F32,), lambda a: function(flush(a).view(np.uint32)))
    return compute(bits, (bits,), function)


@instruction("copysign.{type}", type=("f32", "f64"))
def copysign(type):
    return compute(type, (type, type), lambda a, b: np.copysign(b, a))


@instruction("testp.{test}.{type}", test=("finite", "infinite", "number", "notanumber"), type=("f32", "f64"))
def testp(test, type):
    tests = {"finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan}
    return compute(PRED, (type,), tests[test])


# ---- comparison and selection

_COMPARE = {
    **{
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}
_COMBINE = {None: lambda a, c: a, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_SIGNED, _UNSIGNED = ("eq", "ne", "lt", "le", "gt", "ge"), ("eq", "ne", "lo", "ls", "hi", "hs", "lt", "le", "gt", "ge")
_FLOAT = (*_SIGNED, *(f"{name}u" for name in ("eq", "ne", "lt", "le", "gt", "ge")), "num", "nan")
_COMBINES = ("and", "or", "xor")


@instruction("setp.{compare}[.{combine}].{type}", compare=_SIGNED, combine=_COMBINES, type=("s16", "s32", "s64"))
@instruction("setp.{compare}[.{combine}].{type}", compare=_UNSIGNED, combine=_COMBINES, type=("u16", "u32", "u64"))
@instruction("setp.{compare}[.{combine}].{type}", compare=("eq", "ne"), combine=_COMBINES, type=("b16", "b32", "b64"))
def setp_integer(compare, combine, type):
    return _setp(_COMPARE[compare], combine, type)


@instruction("setp.{compare}[.{combine}][.ftz].{type}", compare=_FLOAT, combine=_COMBINES, type=("f32",))
@instruction("setp.{compare}[.{combine}].{type}", compare=_FLOAT, combine=_COMBINES, type=("f16", "bf16", "f64"))
def setp_float(compare, combine, type, ftz=False):
    def function(a: ndarray, b: ndarray) -> ndarray:
        a, b = (widen(flush(value) if ftz else value, type) for value in (a, b))
        nan = np.isnan(a) | np.isnan(b)
        if compare in ("num", "nan"):
            return nan == (compare == "nan")
        if compare.endswith("u"):
            return _COMPARE[compare[:-1]](a, b) | nan
        return _COMPARE[compare](a, b) & ~nan

    return _setp(function, combine, type)


def _setp(test: Function, combine: str | None, type: Type):
    """p|q = test(a, b) and its opposite, each combined with c."""

    def bind(kernel, destination, a, b, c=None):
        if (c is None) != (combine is None):
            raise PtxError("setp: a third source operand goes with .and, .or and .xor")
        p, q = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, Symbol("_"))
        write_p, write_q = kernel.destination(p, PRED), kernel.destination(q, PRED)
        read_a, read_b = kernel.source(a, type), kernel.source(b, type)
        read_c = kernel.source(c, PRED) if c else lambda warp: None

        def run(warp, lanes):
            result, other = test(read_a(warp), read_b(warp)), read_c(warp)
            write_p(warp, lanes, _COMBINE[combine](result, other))
            write_q(warp, lanes, _COMBINE[combine](~result, other))

        return Compute(run)

    return bind


@instruction("selp.{type}", type=(*INTEGERS, "b16", "b32", "b64", "f32", "f64", "f16", "bf16"))
def selp(type):
    return compute(type, (type, type, PRED), lambda a, b, c: np.where(c, a, b))
