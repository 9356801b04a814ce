"""mma.sync and ldmatrix.

Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "m16n8k16"), with lane = 4 * group + rank and e = 32 / bits
elements to a register, neighbours in a row of A or a column of B:
- register r of A: row group + 8 * (r % 2), columns from e * rank + 4 * e * (r // 2) on;
- register r of B: column group, rows from e * rank + 4 * e * r on;
- accumulator i: row group + 8 * (i // 2), column 2 * rank + i % 2.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ..actions import ALL, LANE_NUMBERS, Compute, mask
from ..formats import F32, TYPES, U32, halves, narrow, packed, widen
from ..memory import Fault
from ..parse import PtxError
from . import instruction

GROUP, RANK = LANE_NUMBERS // 4, LANE_NUMBERS % 4


def whole_warp(warp, lanes: ndarray) -> ndarray:
    return ALL


def _require_all(lanes: ndarray) -> None:
    if lanes is not ALL:
        raise Fault(f"lanes {np.flatnonzero(~lanes).tolist()} of the warp do not take part", 0)


_BITS = {"f16": 16, "bf16": 16, "tf32": 32}


def _elements(word: ndarray, type: str) -> list[ndarray]:
    """The elements of a register, in float64."""
    if type == "tf32":  # the tensor core reads the upper 19 bits of a float32
        return [widen((word & np.uint32(0xFFFFE000)).view(np.float32), F32)]
    return [widen(half, TYPES[type]) for half in halves(word, TYPES[type])]


def matrix_a(words: list[ndarray], type: str) -> ndarray:
    """[16, K] float64"""
    e = 32 // _BITS[type]
    matrix = np.empty((16, 2 * e * len(words)))
    for r, word in enumerate(words):
        for i, element in enumerate(_elements(word, type)):
            matrix[GROUP + 8 * (r % 2), e * RANK + 4 * e * (r // 2) + i] = element
    return matrix


def matrix_b(words: list[ndarray], type: str) -> ndarray:
    """[K, 8] float64"""
    e = 32 // _BITS[type]
    matrix = np.empty((4 * e * len(words), 8))
    for r, word in enumerate(words):
        for i, element in enumerate(_elements(word, type)):
            matrix[e * RANK + 4 * e * r + i, GROUP] = element
    return matrix


ACCUMULATORS = [(GROUP + 8 * (i // 2), 2 * RANK + i % 2) for i in range(4)]
_MMA = "mma.sync.aligned.{shape}.row.col.{out}.{type}.{type}.{out}"


@instruction(_MMA, shape=("m16n8k16", "m16n8k8"), type=("f16", "bf16"), out=("f32",))
@instruction(_MMA, shape=("m16n8k16", "m16n8k8"), type=("f16",), out=("f16",))
@instruction(_MMA, shape=("m16n8k8", "m16n8k4"), type=("tf32",), out=("f32",))
def mma(shape, type, out):
    """d = a * b + c, the sum formed in float64 and rounded once. The hardware has an order and roundings of its own."""
    type = getattr(type, "name", type)
    registers_b = int(shape.removeprefix("m16n8k")) * _BITS[type] // 128
    counts = [4 if out == F32 else 2, 2 * registers_b, registers_b, 4 if out == F32 else 2]
    word = F32 if out == F32 else U32

    def bind(kernel, *operands):
        vectors = [kernel.elements(operand) for operand in operands]
        if [len(vector) for vector in vectors] != counts:
            raise PtxError(f"mma with {[len(vector) for vector in vectors]} registers, not {counts}")
        writes = [kernel.destination(element, word) for element in vectors[0]]
        reads_a, reads_b = ([kernel.source(element, U32) for element in vector] for vector in vectors[1:3])
        reads_c = [kernel.source(element, word) for element in vectors[3]]

        def run(warp, lanes):
            _require_all(lanes)
            addends = [read(warp) for read in reads_c]
            if out != F32:
                addends = [half for pair in addends for half in halves(pair, out)]
            total = np.empty((16, 8))
            for place, addend in zip(ACCUMULATORS, addends, strict=True):
                total[place] = widen(addend, out)
            total += matrix_a([read(warp) for read in reads_a], type) @ matrix_b([read(warp) for read in reads_b], type)
            result = narrow(total, out)
            results = [result[place] for place in ACCUMULATORS]
            if out != F32:
                results = [packed(*results[:2]), packed(*results[2:])]
            for write, value in zip(writes, results, strict=True):
                write(warp, lanes, value)

        return Compute(run, whole_warp)

    return bind


@instruction("ldmatrix.sync.aligned.m8n8.{count}[.trans].shared.b16", count=("x1", "x2", "x4"))
@instruction("ldmatrix.sync.aligned.m8n8.{count}[.trans].shared::cta.b16", count=("x1", "x2", "x4"))
def ldmatrix(count, trans):
    """Lane 8 * i + j gives the address of row j of matrix i; each register receives two elements of a row of one."""
    count = int(count[1:])

    def bind(kernel, destination, address):
        if len(kernel.elements(destination)) != count:
            raise PtxError(f"ldmatrix.x{count} with {len(kernel.elements(destination))} registers")
        writes = [kernel.destination(o, U32) for o in kernel.elements(destination)]
        read_address = kernel.address(address)

        def run(warp, lanes):
            _require_all(lanes)
            rows, threads = warp.active(mask(count > LANE_NUMBERS // 8))
            loaded = warp.spaces.load("shared", read_address(warp)[rows], 16, threads)
            matrices = loaded.view(np.uint16).reshape(count, 8, 8)
            for write, matrix in zip(writes, matrices, strict=True):
                matrix = matrix.T if trans else matrix
                write(warp, lanes, packed(matrix[GROUP, 2 * RANK], matrix[GROUP, 2 * RANK + 1]))

        return Compute(run, whole_warp)

    return bind
