"""Correct rounding from the definition, in rational numbers: what the interpreter's arithmetic is tested against."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy import ndarray

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}  # digits, exponents of normal numbers
BITS = {"f16": "u2", "bf16": "u2", "f32": "u4"}
SPECIAL = {  # bit patterns: zeros, smallest and largest subnormal, smallest normal, 1, largest, infinity
    "f16": (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x3C01, 0x7BFF, 0x7C00),
    "bf16": (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x7F7F, 0x7F80),
    "f32": (0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000),
}


def value_of(bits: int, format: str) -> float:
    if format == "f16":
        return float(np.uint16(bits).view(np.float16))
    return float(np.uint32(bits << 16 if format == "bf16" else bits).view(np.float32))


def bits_of(value: float, format: str) -> int:
    """`value` is a number of the format, or NaN, which becomes the NaN that arithmetic returns."""
    if math.isnan(value):
        return {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}[format]
    if format == "f16":
        return int(np.float16(value).view(np.uint16))
    bits = int(np.float32(value).view(np.uint32))
    return bits >> 16 if format == "bf16" else bits


def round_to(exact: Fraction, format: str, rounding: str = "rn") -> float:
    if exact == 0:
        return 0.0
    digits, lowest, highest = FORMATS[format]
    exponent = abs(exact).numerator.bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    below = math.floor(exact / unit)
    rest = exact / unit - below
    if rounding == "rn":
        below += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2)
    elif rounding == "rp" or (rounding == "rz" and exact < 0):
        below += rest > 0
    result, largest = below * unit, (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** highest
    if abs(result) <= largest:
        return float(result) if result else math.copysign(0.0, exact)
    to_infinity = rounding == "rn" or rounding == ("rp" if exact > 0 else "rm")
    return math.copysign(math.inf if to_infinity else float(largest), exact)


def samples(format: str, count: int, seed: int) -> ndarray:
    """Bit patterns: random ones, half of them near 1 so that sums have digits to lose, and the special ones."""
    rng = np.random.default_rng(seed)
    digits, _, highest = FORMATS[format]
    near = rng.integers(0, 1 << digits + 2, count) + (highest - 2 << digits - 1)
    sign = rng.integers(0, 2, count) << (8 * np.dtype(BITS[format]).itemsize - 1)
    anything = rng.integers(0, (SPECIAL[format][-1]), count)
    chosen = np.where(rng.random(count) < 0.5, near, anything)
    chosen = np.where(rng.random(count) < 0.2, rng.choice(SPECIAL[format], count), chosen)
    return (chosen | sign).astype(BITS[format])
