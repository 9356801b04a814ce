"""Logic, shifts, and fields of bits."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ..formats import U32, Type
from . import compute, instruction

WORDS = ("b16", "b32", "b64")


@instruction("{op}.{type}", op=("and", "or", "xor"), type=("pred", *WORDS))
def logic(op, type):
    return compute(type, (type, type), {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op])


@instruction("not.{type}", type=("pred", *WORDS))
def not_(type):
    return compute(type, (type,), np.invert)


@instruction("lop3.{type}", type=("b32",))
def lop3(type):
    """Any function of three bits: bit 4a + 2b + c of the table."""

    def function(a: ndarray, b: ndarray, c: ndarray, table: ndarray) -> ndarray:
        result = np.zeros_like(a)
        for entry in range(8):
            matches = (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
            result |= np.where(table >> np.uint32(entry) & np.uint32(1), matches, np.uint32(0))
        return result

    return compute(type, (type, type, type, U32), function)


def shifted_left(a: ndarray, count: ndarray) -> ndarray:
    bits = a.dtype.itemsize * 8
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def shifted_right(a: ndarray, count: ndarray) -> ndarray:
    """Fills with the sign if `a` is signed. Counts beyond the width shift everything out."""
    bits = a.dtype.itemsize * 8
    result = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return result if a.dtype.kind == "i" else np.where(count < bits, result, a.dtype.type(0))


@instruction("shl.{type}", type=WORDS)
def shl(type):
    return compute(type, (type, U32), shifted_left)


@instruction("shr.{type}", type=(*WORDS, "u16", "s16", "u32", "s32", "u64", "s64"))
def shr(type):
    return compute(type, (type, U32), shifted_right)


@instruction("shf.{direction}.{over}.b32", direction=("l", "r"), over=("clamp", "wrap"))
def shf(direction, over):
    """A half of the 64 bits of b and a, b on top, after a shift by 0 to 32, or with .wrap modulo 32."""

    def function(a: ndarray, b: ndarray, count: ndarray) -> ndarray:
        both = b.astype(np.uint64) << np.uint64(32) | a
        count = (np.minimum(count, 32) if over == "clamp" else count % 32).astype(np.uint64)
        moved = both << count >> np.uint64(32) if direction == "l" else both >> count
        return moved.astype(np.uint32)

    return compute(U32, (U32, U32, U32), function)


@instruction("prmt.b32")
def prmt():
    """Each nibble of c picks a byte of b and a (0 to 3: of a), or with its high bit set the sign of that byte."""

    def function(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
        pool = np.stack([a, b], 1).view(np.uint8)  # [lanes, 8]
        picks = c[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(pool, (picks & np.uint32(7)).astype(np.int64), 1)
        signs = np.where(chosen & 0x80, np.uint8(0xFF), np.uint8(0))
        return np.where(picks & np.uint32(8), signs, chosen).view(np.uint32).reshape(-1)

    return compute(U32, (U32, U32, U32), function)


def low_bits(count: ndarray, type: Type) -> ndarray:
    return ~shifted_left(~type.dtype.type(0) + np.zeros(len(count), type.dtype), count)


@instruction("bfe.{type}", type=("u32", "s32", "u64", "s64"))
def bfe(type):
    """`length` bits from `position` on, filled with zeros, or for signed types with the field's sign."""

    def function(a: ndarray, position: ndarray, length: ndarray) -> ndarray:
        position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
        field = shifted_right(a, position)
        if type.kind == "u":
            return field & low_bits(length, type)
        unused = np.maximum(type.bits - length.astype(np.int64), 0)
        return np.where(length == 0, type.dtype.type(0), shifted_right(shifted_left(field, unused), unused))

    return compute(type, (type, U32, U32), function)


@instruction("bfi.{type}", type=("b32", "b64"))
def bfi(type):
    """b with its `length` bits from `position` on replaced by the lowest of a."""

    def function(a: ndarray, b: ndarray, position: ndarray, length: ndarray) -> ndarray:
        position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
        field = shifted_left(low_bits(length, type), position)
        return (b & ~field) | (shifted_left(a, position) & field)

    return compute(type, (type, type, U32, U32), function)


def _each(function, type: Type):
    return lambda a: np.array([function(int(x)) for x in a]).astype(type.dtype)


@instruction("popc.{type}", type=("b32", "b64"))
def popc(type):
    return compute(U32, (type,), _each(lambda x: x.bit_count(), U32))


@instruction("clz.{type}", type=("b32", "b64"))
def clz(type):
    return compute(U32, (type,), _each(lambda x: type.bits - x.bit_length(), U32))


@instruction("brev.{type}", type=("b32", "b64"))
def brev(type):
    return compute(type, (type,), _each(lambda x: int(f"{x:0{type.bits}b}"[::-1], 2), type))


@instruction("bfind[.shiftamt].{type}", type=("u32", "s32", "u64", "s64"))
def bfind(shiftamt, type):
    """Place of the highest bit that is not the sign's, or with .shiftamt its distance from the top; ones if none."""

    def place(x: int) -> int:
        highest = (x if x >= 0 else ~x).bit_length() - 1
        return 0xFFFFFFFF if highest < 0 else type.bits - 1 - highest if shiftamt else highest

    return compute(U32, (type,), _each(place, U32))
