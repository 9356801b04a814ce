"""mma and ldmatrix: the fragments as the PTX ISA draws them, element by element."""

import numpy as np
import pytest
import torch

from .parse import PtxError
from .snippets import execute

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def halves(shape, type: str):
    """Random values of a 16-bit type: their bits, and their values in float64."""
    values = torch.from_numpy(RNG.standard_normal(shape)).to(TORCH[type])
    return values.view(torch.int16).numpy().view("u2"), values.double().numpy()


def a_word(bits, lane: int, register: int):
    """The two elements of A [16, K] in a register, by the ISA's formula for element i = 2 * register and the next."""
    group, rank = lane // 4, lane % 4
    row = group if register in (0, 2) else group + 8
    column = 2 * rank + (8 if register >= 2 else 0)
    return int(bits[row, column]) | int(bits[row, column + 1]) << 16


def b_word(bits, lane: int, register: int):
    group, rank = lane // 4, lane % 4
    row = 2 * rank + (8 if register else 0)
    return int(bits[row, group]) | int(bits[row + 1, group]) << 16


def fragment(word, bits, registers: int):
    return [np.array([word(bits, lane, r) for lane in range(32)], "u4") for r in range(registers)]


def accumulator(matrix, dtype="f4"):
    """[16, 8] -> four arrays of an element a lane."""
    rows = lambda lane, i: lane // 4 + 8 * (i // 2)  # noqa: E731
    return [np.array([matrix[rows(n, i), 2 * (n % 4) + i % 2] for n in range(32)], dtype) for i in range(4)]


@pytest.mark.parametrize("type", ("f16", "bf16"))
@pytest.mark.parametrize("k", (16, 8))
def test_mma_of_halves(type, k):
    (a_bits, a), (b_bits, b) = halves((16, k), type), halves((k, 8), type)
    c = RNG.standard_normal((16, 8)).astype("f4")
    names_a, names_b = ("a0", "a1", "a2", "a3")[: k // 4], ("b0", "b1")[: k // 8]
    values = dict(zip(names_a, fragment(a_word, a_bits, k // 4), strict=True))
    values |= dict(zip(names_b, fragment(b_word, b_bits, k // 8), strict=True))
    values |= dict(zip(("c0", "c1", "c2", "c3"), accumulator(c), strict=True))
    body = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type}.{type}.f32 {{d0, d1, d2, d3}}, {{{', '.join(names_a)}}},"
    body += f"{{{', '.join(names_b)}}}, {{c0, c1, c2, c3}};"
    results = execute(body, **values, d0="f4", d1="f4", d2="f4", d3="f4")
    for actual, wanted in zip(results, accumulator((a @ b + c).astype("f4")), strict=True):
        assert np.array_equal(actual, wanted)


def test_mma_with_half_accumulators():
    (a_bits, a), (b_bits, b), (c_bits, c) = halves((16, 16), "f16"), halves((16, 8), "f16"), halves((16, 8), "f16")
    values = dict(zip(("a0", "a1", "a2", "a3"), fragment(a_word, a_bits, 4), strict=True))
    values |= dict(zip(("b0", "b1"), fragment(b_word, b_bits, 2), strict=True))
    pairs = accumulator(c_bits, "u4")
    values |= {"c0": pairs[0] | pairs[1] << np.uint32(16), "c1": pairs[2] | pairs[3] << np.uint32(16)}
    body = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {d0, d1}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1};"
    d0, d1 = execute(body, **values, d0="u4", d1="u4")
    wanted = accumulator((a @ b + c).astype("f2").view("u2"), "u4")
    assert np.array_equal(d0, wanted[0] | wanted[1] << np.uint32(16))
    assert np.array_equal(d1, wanted[2] | wanted[3] << np.uint32(16))


def test_mma_of_tf32_reads_nineteen_bits():
    a, b = RNG.standard_normal((16, 8)).astype("f4"), RNG.standard_normal((8, 8)).astype("f4")
    lane = np.arange(32)
    group, rank = lane // 4, lane % 4
    values = {"a0": a[group, rank], "a1": a[group + 8, rank], "a2": a[group, rank + 4], "a3": a[group + 8, rank + 4]}
    values |= {"b0": b[rank, group], "b1": b[rank + 4, group]}
    body = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d0, d1, d2, d3}, {a0, a1, a2, a3}, {b0, b1}, {z, z, z, z};"
    )
    results = execute("mov.b32 z, 0;" + body, registers=".reg .b32 z;", **values, d0="f4", d1="f4", d2="f4", d3="f4")
    cut = [(m.view("u4") & np.uint32(0xFFFFE000)).view("f4").astype("f8") for m in (a, b)]
    for actual, wanted in zip(results, accumulator((cut[0] @ cut[1]).astype("f4")), strict=True):
        assert np.array_equal(actual, wanted)


@pytest.mark.parametrize(
    "body",
    (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {d, d, d, d}, {d, d, d, d}, {d, d}, {d, d, d, d};",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {d, d, d, d}, {d, d, d, d}, {d, d}, {d, d, d, d};",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {d, d, d, d}, {d, d, d, d}, {d, d}, {d, d, d, d};",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d, d, d, d}, {d, d, d, d}, {d, h}, {d, d, d, d};",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d, d}, [d];",
        "ldmatrix.sync.aligned.m8n8.x4.b16 {d, d, d, d}, [d];",
    ),
)
def test_other_forms_and_registers_are_refused(body):
    with pytest.raises(PtxError, match="PTX line"):
        execute(body, registers=".reg .b16 h;", d="u4")


TILE = """
    mov.u32 x, tile;
    mad.lo.u32 y, thread, 16, x;
    st.shared.v4.b32 [y], {r0, r1, r2, r3};     // row `thread` of 32: four matrices of 8 rows
    bar.sync 0;
"""
REGISTERS = ".reg .pred p; .reg .b32 x, y;"
SHARED = ".shared .align 16 .b8 tile[512];"


def matrices():
    rows = RNG.integers(0, 2**16, (32, 8), dtype="u2")
    return rows.reshape(4, 8, 8), {f"r{i}": np.ascontiguousarray(rows.view("u4")[:, i]) for i in range(4)}


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("trans", ("", ".trans"))
def test_ldmatrix(count, trans):
    tiles, rows = matrices()
    names = [f"d{i}" for i in range(count)]
    body = f"{TILE} ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(names)}}}, [y];"
    results = execute(body, registers=REGISTERS, declarations=SHARED, **rows, **dict.fromkeys(names, "u4"))
    for tile, actual in zip(tiles, [results] if count == 1 else results, strict=False):
        tile = tile.T if trans else tile
        wanted = [int(tile[n // 4, 2 * (n % 4)]) | int(tile[n // 4, 2 * (n % 4) + 1]) << 16 for n in range(32)]
        assert actual.tolist() == wanted


def test_ldmatrix_needs_aligned_rows_and_the_whole_warp():
    _, rows = matrices()
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d, d, d, d}, [y];"
    with pytest.raises(PtxError, match="misaligned: 16 bytes"):
        execute(f"{TILE} add.u32 y, y, 8; {load}", registers=REGISTERS, declarations=SHARED, **rows, d="u4")
    with pytest.raises(PtxError, match="divergent"):
        body = f"{TILE} setp.lt.u32 p, thread, 31; @p {load} bar.sync 0;"
        execute(body, registers=REGISTERS, declarations=SHARED, **rows, d="u4")
    with pytest.raises(PtxError, match=r"lanes \[31\] of the warp do not take part"):
        execute(
            f"{TILE} {load}",
            registers=REGISTERS,
            declarations=SHARED,
            threads=31,
            **{k: v[:31] for k, v in rows.items()},
            d="u4",
        )
    with pytest.raises(PtxError, match="race"):
        body = TILE.replace("bar.sync 0;", "xor.b32 y, y, 16;")
        execute(f"{body} {load}", registers=REGISTERS, declarations=SHARED, **rows, d="u4")
