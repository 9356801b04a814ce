"""The types of PTX as numpy arrays, and rounding between the floating ones.

Arithmetic in a narrow format is done in float64 and rounded once. That is the correctly rounded result if the float64
value is exact, or if it was "rounded to odd" (`exact_sum`): an inexact value gets an odd last bit, which no later
rounding to a format at least two bits shorter can mistake for a tie or for an exact value (Boldo and Melquiond,
"Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

LANES = 32  # threads of a warp, the length of every array of values


def unsigned(bits: int) -> np.dtype:
    return np.dtype(bool if bits == 1 else f"u{bits // 8}")


@dataclass(frozen=True)
class Type:
    name: str
    bits: int
    dtype: np.dtype  # of an array that holds values; bf16 and packed types are held as their bits
    element: Type | None = None  # of a packed type

    @property
    def kind(self) -> str:
        """b, u, s, f or p(red)"""
        return "f" if "f" in self.name[:2] else self.name[0]

    @property
    def wide(self) -> Type:
        """Twice as many bits, for mul.wide."""
        return TYPES[f"{self.kind}{2 * self.bits}"]


TYPES = {
    **{f"{k}{n}": Type(f"{k}{n}", n, np.dtype(f"{'i' if k == 's' else 'u'}{n // 8}")) for k in "bus" for n in (8, 16)},
    **{f"{k}{n}": Type(f"{k}{n}", n, np.dtype(f"{'i' if k == 's' else 'u'}{n // 8}")) for k in "bus" for n in (32, 64)},
    "pred": Type("pred", 1, np.dtype(bool)),
    "f16": Type("f16", 16, np.dtype("f2")),
    "bf16": Type("bf16", 16, np.dtype("u2")),
    "f32": Type("f32", 32, np.dtype("f4")),
    "f64": Type("f64", 64, np.dtype("f8")),
}
PRED, U32, S32, U64, F32 = (TYPES[name] for name in ("pred", "u32", "s32", "u64", "f32"))
for _element in ("f16", "bf16", "f32"):
    _bits = 2 * TYPES[_element].bits
    TYPES[f"{_element}x2"] = Type(f"{_element}x2", _bits, unsigned(_bits), TYPES[_element])

# The NaN that arithmetic returns, whatever NaN went in.
_NAN = {
    "f16": np.uint16(0x7FFF).view("f2"),
    "bf16": np.uint16(0x7FFF),
    "f32": np.uint32(0x7FFFFFFF).view("f4"),
    "f64": np.uint64(0x7FF8000000000000).view("f8"),
}


def canonical(value: ndarray, type: Type) -> ndarray:
    nan = value != value
    return np.where(nan, _NAN[type.name], value) if nan.any() else value


def widen(value: ndarray, type: Type) -> ndarray:
    """To float64, exactly."""
    if type.name == "bf16":
        value = (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return value.astype(np.float64)


def narrow(value: ndarray, type: Type, rounding: str = "rn") -> ndarray:
    """float64, exact or rounded to odd, to `type`: rn nearest even, rz toward zero, rm down, rp up."""
    if type.name == "f64":
        assert rounding == "rn"
        return canonical(value, type)
    if type.name == "bf16":
        return _narrow_to_bf16(value, rounding)
    near = value.astype(type.dtype)
    if rounding != "rn":
        back = near.astype(np.float64)
        too_far = {
            "rz": np.abs(back) > np.abs(value),
            "rm": back > value,
            "rp": back < value,
        }[rounding]
        toward = np.array({"rz": 0, "rm": -np.inf, "rp": np.inf}[rounding], type.dtype)
        near = np.where(too_far, np.nextafter(near, toward), near)
    return canonical(near, type)


def _narrow_to_bf16(value: ndarray, rounding: str) -> ndarray:
    near = value.astype(np.float32)
    # The float32 between: rounded to odd in its turn. Toward zero, then the last bit set if anything was lost.
    short = np.where(np.abs(near) > np.abs(value), np.nextafter(near, np.float32(0)), near)
    inexact = (short.astype(np.float64) != value) & ~np.isnan(value)
    bits = short.view(np.uint32) | inexact.astype(np.uint32)
    up = {
        "rn": np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)),
        "rz": np.uint32(0),
        "rm": np.where(np.signbit(value), np.uint32(0xFFFF), np.uint32(0)),
        "rp": np.where(np.signbit(value), np.uint32(0), np.uint32(0xFFFF)),
    }[rounding]
    up = np.where(np.isinf(short), np.uint32(0), up)
    return np.where(np.isnan(value), _NAN["bf16"], ((bits + up) >> np.uint32(16)).astype(np.uint16))


def exact_sum(a: ndarray, b: ndarray, rounding: str | None = None) -> ndarray:
    """a + b of float64, rounded to odd. Neither may be so large that the sum overflows. `rounding`: the one to come; an
    exact zero is negative if that is down, unless both are +0."""
    total = a + b
    if rounding == "rm":
        total = np.where(total == 0, -(-a - b), total)
    part = total - a
    lost = (a - (total - part)) + (b - part)  # exactly (Knuth's TwoSum)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    away = (lost != 0) & even & np.isfinite(total)
    return np.where(away, np.nextafter(total, np.copysign(np.inf, lost)), total)


def flush(value: ndarray) -> ndarray:
    """Float32 subnormals to zero, the sign kept (.ftz)."""
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)


def saturate(value: ndarray) -> ndarray:
    """To [0, 1], NaN to 0 (.sat of floats)."""
    return np.where(value > 0, np.minimum(value, value.dtype.type(1)), value.dtype.type(0))


def halves(value: ndarray, element: Type) -> list[ndarray]:
    """The two elements of a packed value, the low one first."""
    low = value.astype(unsigned(element.bits))
    high = (value >> value.dtype.type(element.bits)).astype(unsigned(element.bits))
    return [low.view(element.dtype), high.view(element.dtype)]


def packed(low: ndarray, high: ndarray) -> ndarray:
    bits = low.dtype.itemsize * 8
    word = unsigned(2 * bits)
    low, high = (half.view(unsigned(bits)).astype(word) for half in (low, high))
    return low | high << word.type(bits)
