"""Conversion between types, and moves that pack and unpack."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ..actions import Compute
from ..formats import F32, TYPES, Type, exact_sum, flush, narrow, packed, saturate, unsigned, widen
from ..memory import CONST_WINDOW, LOCAL_WINDOW, SHARED_WINDOW
from ..parse import PtxError, Vector
from . import compute, instruction

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
ROUNDINGS = ("rn", "rz", "rm", "rp")
TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt[.sat].{to}.{source}", to=INTEGERS, source=INTEGERS)
def integer_to_integer(sat, to, source):
    def function(a: ndarray) -> ndarray:
        if sat:
            limits, own = np.iinfo(to.dtype), np.iinfo(source.dtype)
            a = np.clip(a, max(limits.min, own.min), min(limits.max, own.max))
        return a.astype(to.dtype)

    return compute(to, (source,), function, wider=True)


@instruction("cvt.{mode}[.ftz][.sat].{to}.{source}", mode=tuple(TO_INTEGRAL), to=INTEGERS, source=("f32",))
@instruction("cvt.{mode}[.sat].{to}.{source}", mode=tuple(TO_INTEGRAL), to=INTEGERS, source=("f16", "bf16", "f64"))
def float_to_integer(mode, to, source, sat, ftz=False):
    """Clamps to the range of `to`, with or without .sat. NaN gives 0, or where 64 bits take part the highest bit."""
    limits = np.iinfo(to.dtype)
    nan = 1 << to.bits - 1 if 64 in (to.bits, source.bits) else 0
    nan = unsigned(to.bits).type(nan).astype(to.dtype)

    def function(a: ndarray) -> ndarray:
        value = TO_INTEGRAL[mode](widen(flush(a) if ftz else a, source))
        inside = (value > float(limits.min)) & (value < float(limits.max))  # float(2**63 - 1) is 2**63
        result = np.where(inside, value, 0).astype(to.dtype)
        result = np.where(inside, result, np.where(value > 0, limits.max, limits.min).astype(to.dtype))
        return np.where(np.isnan(value), nan, result)

    return compute(to, (source,), function, wider=True)


@instruction("cvt.{rounding}.{to}.{source}", rounding=ROUNDINGS, to=("f16", "bf16", "f32"), source=INTEGERS)
@instruction("cvt.{rounding}.{to}.{source}", rounding=("rn",), to=("f64",), source=INTEGERS[:6])
def integer_to_float(rounding, to, source):
    def function(a: ndarray) -> ndarray:
        if source.bits < 64:
            return narrow(a.astype(np.float64), to, rounding)
        high, low = a >> a.dtype.type(32), a & a.dtype.type(0xFFFFFFFF)
        return narrow(exact_sum(high.astype(np.float64) * 2.0**32, low.astype(np.float64)), to, rounding)

    return compute(to, (source,), function, wider=True)


def _float_to_float(to: Type, source: Type, rounding: str, ftz: bool, sat: bool):
    def function(a: ndarray) -> ndarray:
        result = narrow(widen(flush(a) if ftz else a, source), to, rounding)
        result = saturate(result) if sat else result
        return flush(result) if ftz and to == F32 else result

    return compute(to, (source,), function)


@instruction("cvt.{rounding}[.ftz][.sat].{to}.{source}", rounding=ROUNDINGS, to=("f32",), source=("f64",))
@instruction("cvt.{rounding}.{to}.{source}", rounding=ROUNDINGS, to=("f16",), source=("f32", "f64"))
@instruction("cvt.{rounding}.{to}.{source}", rounding=("rn", "rz"), to=("bf16",), source=("f32",))
@instruction("cvt[.ftz][.sat].{to}.{source}", to=("f32",), source=("f16", "bf16", "f32"))
@instruction("cvt.{to}.{source}", to=("f64",), source=("f16", "f32"))
def float_to_float(to, source, rounding="rn", ftz=False, sat=False):
    return _float_to_float(to, source, rounding, ftz, sat)


@instruction("cvt.{mode}[.ftz][.sat].{type}.f32", mode=tuple(TO_INTEGRAL), type=("f32",))
@instruction("cvt.{mode}.{type}.f64", mode=tuple(TO_INTEGRAL), type=("f64",))
@instruction("cvt.{mode}.{type}.f16", mode=tuple(TO_INTEGRAL), type=("f16",))
def to_integral(mode, type, ftz=False, sat=False):
    def function(a: ndarray) -> ndarray:
        result = TO_INTEGRAL[mode](flush(a) if ftz else a)
        return saturate(result) if sat else result

    return compute(type, (type,), function)


@instruction("cvt.{rounding}.{to}.f32", rounding=("rn", "rz"), to=("f16x2", "bf16x2"))
def two_floats(rounding, to):
    """The first source becomes the high half."""

    def function(high: ndarray, low: ndarray) -> ndarray:
        return packed(*(narrow(widen(value, F32), to.element, rounding) for value in (low, high)))

    return compute(to, (F32, F32), function)


@instruction("mov.{type}", type=("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64", "pred"))
def mov(type):
    def bind(kernel, destination, source):
        if isinstance(destination, Vector):
            return _unpack(kernel, type, destination, source)
        if isinstance(source, Vector):
            return _pack(kernel, type, destination, source)
        return compute(type, (type,), lambda a: a)(kernel, destination, source)

    return bind


def _parts(kernel, type: Type, vector: Vector) -> Type:
    if type.bits % len(vector.elements) or f"b{type.bits // len(vector.elements)}" not in TYPES:
        raise PtxError(f"{type.bits} bits in {len(vector.elements)} parts")
    return TYPES[f"b{type.bits // len(vector.elements)}"]


def _unpack(kernel, type: Type, destination: Vector, source):
    part = _parts(kernel, type, destination)
    read, writes = kernel.source(source, type), [kernel.destination(e, part) for e in destination.elements]

    def run(warp, lanes):
        values = np.ascontiguousarray(read(warp)).view(part.dtype).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(warp, lanes, values[:, i].copy())

    return Compute(run)


def _pack(kernel, type: Type, destination, source: Vector):
    part = _parts(kernel, type, source)
    write, reads = kernel.destination(destination, type), [kernel.source(e, part) for e in source.elements]

    def run(warp, lanes):
        values = np.stack([read(warp) for read in reads], 1)
        write(warp, lanes, values.view(type.dtype).reshape(-1))

    return Compute(run)


WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "const": CONST_WINDOW, "global": 0}


@instruction("cvta[.to].{space}.{type}", space=tuple(WINDOWS), type=("u64",))
def cvta(to, space, type):
    window = np.uint64(WINDOWS[space])
    return compute(type, (type,), (lambda a: a - window) if to else (lambda a: a + window))
