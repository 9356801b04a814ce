"""The device functions of the emulation against numpy: every one, in all orders, with whole and partial warps."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from . import Emulation, build

pytestmark = pytest.mark.slow

SCHEDULES = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]
UNDEFINED = -1  # what the emulation gives for a lane that took no part


@cache
def loaded(mode: str) -> Emulation:
    return Emulation(build.module(mode, Path(__file__).parent / "intrinsics"))


@pytest.fixture(params=["plain", "race"])
def emulation(request):
    yield loaded(request.param)
    loaded(request.param).configure()


# ---- warps and blocks: name -> the result of all threads from the values of all threads


def by_warp(formula):
    """Of formula(values of a warp, its lanes): the last warp may have less than 32 lanes."""

    def of_block(v):
        warps = [v[i : i + 32] for i in range(0, len(v), 32)]
        return np.concatenate([np.broadcast_to(formula(w, np.arange(len(w))), w.shape) for w in warps])

    return of_block


def at(v, source):
    """v[source], undefined where there is no such lane."""
    source = np.broadcast_to(source, v.shape)
    return np.where(source < len(v), v[np.minimum(source, len(v) - 1)], UNDEFINED)


def bits(flags):
    return int(sum(int(flag) << lane for lane, flag in enumerate(flags)))


def whole(v):
    return (1 << len(v)) - 1


def equal_values(v):
    return np.array([bits(v == x) for x in v])


WARP = {
    "shfl": by_warp(lambda v, lane: at(v, 3)),
    "shfl_width_8": by_warp(lambda v, lane: at(v, lane // 8 * 8 + (lane + 5) % 8)),
    "shfl_up": by_warp(lambda v, lane: at(v, np.where(lane >= 2, lane - 2, lane))),
    "shfl_up_width_8": by_warp(lambda v, lane: at(v, np.where(lane % 8 >= 3, lane - 3, lane))),
    "shfl_down": by_warp(lambda v, lane: at(v, np.where(lane + 5 < 32, lane + 5, lane))),
    "shfl_down_width_16": by_warp(lambda v, lane: at(v, np.where(lane % 16 + 2 < 16, lane + 2, lane))),
    "shfl_xor": by_warp(lambda v, lane: at(v, lane ^ 5)),
    # An earlier segment of the warp may be read, a later one may not.
    "shfl_xor_width_8": by_warp(lambda v, lane: at(v, np.where((lane ^ 9) <= lane // 8 * 8 + 7, lane ^ 9, lane))),
    "ballot": by_warp(lambda v, lane: bits(v & 2 != 0)),
    "any": by_warp(lambda v, lane: (v == 7).any()),
    "all": by_warp(lambda v, lane: (v < 20).all()),
    "match_any": by_warp(lambda v, lane: equal_values(v & 3)),
    "match_all": by_warp(lambda v, lane: whole(v)),
    "match_all_not": by_warp(lambda v, lane: 0 if len(set(v & 1)) > 1 else whole(v) + 2),
    "reduce_add": by_warp(lambda v, lane: (v - 15).sum()),
    "reduce_min": by_warp(lambda v, lane: (v - 15).min()),
    "reduce_max": by_warp(lambda v, lane: (-v).max()),
    "reduce_max_unsigned": by_warp(lambda v, lane: ((v - 15) % 2**32).max()),
    "reduce_add_unsigned": by_warp(lambda v, lane: (0xF0000000 + v).sum()),
    "reduce_and": by_warp(lambda v, lane: np.bitwise_and.reduce(v | 8)),
    "reduce_or": by_warp(lambda v, lane: np.bitwise_or.reduce(v)),
    "reduce_xor": by_warp(lambda v, lane: np.bitwise_xor.reduce(v)),
    "reduce_by_halves": by_warp(lambda v, lane: np.where(lane < 16, v[:16].sum(), 2 * v[16:].sum())),
    "syncwarp": lambda v: v[np.minimum(np.arange(len(v)) ^ 1, len(v) - 1)],
    "activemask": lambda v: np.ones_like(v),
    "syncthreads": lambda v: v[::-1],
    "syncthreads_count": lambda v: np.full_like(v, (v & 1).sum()),
    "syncthreads_or": lambda v: np.full_like(v, (v == 7).any()),
    "syncthreads_and": lambda v: np.full_like(v, (v < 20).all()),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 17, 32, 48, 128, 1023])
def test_warps_and_blocks(emulation, threads, schedule):
    emulation.configure(*schedule)
    assert set(emulation.module.warp_operations()) == set(WARP)
    for small in (False, True):  # values for which `all` is false and true
        v = np.random.default_rng(threads).integers(0, 20 if small else 30, threads)
        values, out = v.astype(np.int32), np.empty(threads, np.int32)
        for name, formula in WARP.items():
            out[:] = -99
            emulation.module.warp_operation(name, values.ctypes.data, out.ctypes.data, threads)
            np.testing.assert_array_equal(out, np.asarray(formula(v)).astype(np.int64).astype(np.int32), err_msg=name)


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("half", np.uint16),
        ("bfloat16", np.uint16),
        ("half2", np.uint32),
        ("float", np.uint32),
        ("unsigned", np.uint32),
        ("double", np.uint64),
        ("int64", np.uint64),
    ],
)
def test_shuffles_move_every_type_bit_for_bit(emulation, name, dtype):
    v = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 64, dtype=dtype)
    out = np.zeros_like(v)
    emulation.module.shuffle_type(name, v.ctypes.data, out.ctypes.data, 64)
    np.testing.assert_array_equal(out, v[np.arange(64) ^ 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_thread_of_a_three_dimensional_grid_runs_once(emulation, schedule):
    emulation.configure(*schedule)
    grid, block = (3, 2, 2), (5, 3, 4)
    out = np.full((*grid[::-1], *block[::-1], 6), 99, np.uint32)
    emulation.reset()
    emulation.module.indices(grid, block, out.ctypes.data)
    for position in np.ndindex(*out.shape[:-1]):
        bz, by, bx, tz, ty, tx = position
        assert tuple(out[position]) == (bx, by, bz, tx, ty, tz)
    assert (emulation.counters()["blocks"], emulation.counters()["threads"]) == (12, 720)


# ---- one thread: name -> the result from arrays of 32-bit words


def floats(formula):
    return lambda a, b, c: formula(a.view(np.float32), b.view(np.float32), c.view(np.float32))


def close(formula):
    """A result that the C library rounds as it likes: two units in the last place."""

    def check(a, b, c, out):
        expected = formula(a.view(np.float32).astype(np.float64), b.view(np.float32).astype(np.float64))
        np.testing.assert_allclose(out.view(np.float32), expected.astype(np.float32), rtol=2**-22)

    check.is_check = True
    return check


def long(a, b):
    return [int(x) << 32 | int(y) for x, y in zip(a, b, strict=True)]


def signed(x):
    return x.astype(np.int32)


def lowest_bit(x: int) -> int:
    return (x & -x).bit_length()


def byte_perm(a, b, c):
    def one(x, y, selector):
        source = (int(y) << 32 | int(x)).to_bytes(8, "little")
        chosen = []
        for i in range(4):
            nibble = int(selector) >> 4 * i & 15
            byte = source[nibble & 7]
            chosen.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(chosen), "little")

    return [one(x, y, s) for x, y, s in zip(a, b, c, strict=True)]


def shifted(left: bool, clamped: bool):
    def one(low, high, shift):
        shift = min(int(shift) % 64, 32) if clamped else int(shift) % 32
        pair = int(high) << 32 | int(low)
        return (pair << shift) >> 32 & 0xFFFFFFFF if left else pair >> shift & 0xFFFFFFFF

    return lambda a, b, c: [one(*x) for x in zip(a, b, c, strict=True)]


def dp4a(a, b, c):
    bytes_of = lambda x: x.view(np.int8).reshape(-1, 4).astype(np.int32)  # noqa: E731
    return (bytes_of(a) * bytes_of(b)).sum(1) + signed(c >> 8)


def converted(rounded, low, high):
    """Out of range saturates, NaN gives 0."""
    whole = lambda a, b, c: np.clip(np.nan_to_num(rounded(a.astype(np.float64)), nan=0.0), low, high)  # noqa: E731
    return lambda a, b, c: floats(whole)(a, b, c).astype(np.int64)


def fused(a, b, c):
    return a.astype(np.float64) * b + c  # exact, for operands of like size


def halves(formula):
    def of_words(a, b, c):
        low = lambda x: (x & 0xFFFF).astype(np.uint16).view(np.float16)  # noqa: E731
        return formula(low(a), low(b), low(c)).astype(np.float16).view(np.uint16)

    return of_words


def rounded_to_bfloat16(x):
    word = x.astype(np.float32).view(np.uint32)
    return ((word + 0x7FFF + (word >> 16 & 1)) >> 16).astype(np.uint16)


def bfloat16s(formula):
    def of_words(a, b, c):
        low = lambda x: ((x & 0xFFFF) << 16).view(np.float32)  # noqa: E731
        return rounded_to_bfloat16(formula(low(a), low(b), low(c)))

    return of_words


def pairs(of_words):
    return lambda a, b, c: (
        of_words(a, b, c).astype(np.uint32) | of_words(a >> 16, b >> 16, c >> 16).astype(np.uint32) << 16
    )


INT, UNSIGNED = (-(2**31), 2**31 - 1), (0, 2**32 - 1)
SCALAR = {
    "popc": lambda a, b, c: [int(x).bit_count() for x in a],
    "popcll": lambda a, b, c: [x.bit_count() for x in long(a, b)],
    "clz": lambda a, b, c: [32 - int(x).bit_length() for x in a],
    "clzll": lambda a, b, c: [64 - x.bit_length() for x in long(a, b)],
    "ffs": lambda a, b, c: [lowest_bit(int(x)) for x in a],
    "ffsll": lambda a, b, c: [lowest_bit(x) for x in long(a, b)],
    "brev": lambda a, b, c: [int(f"{x:032b}"[::-1], 2) for x in a],
    "byte_perm": byte_perm,
    "funnelshift_l": shifted(left=True, clamped=False),
    "funnelshift_r": shifted(left=False, clamped=False),
    "funnelshift_lc": shifted(left=True, clamped=True),
    "funnelshift_rc": shifted(left=False, clamped=True),
    "umulhi": lambda a, b, c: a.astype(np.uint64) * b >> np.uint64(32),
    "mulhi": lambda a, b, c: signed(a).astype(np.int64) * signed(b) >> 32,
    "dp4a": dp4a,
    "min_unsigned": lambda a, b, c: np.minimum(a, b),
    "max_int": lambda a, b, c: np.maximum(signed(a), signed(b)),
    "float2int_rn": converted(np.rint, *INT),
    "float2int_rz": converted(np.trunc, *INT),
    "float2int_rd": converted(np.floor, *INT),
    "float2int_ru": converted(np.ceil, *INT),
    "float2uint_rn": converted(np.rint, *UNSIGNED),
    "float2uint_rz": converted(np.trunc, *UNSIGNED),
    "int2float_rn": lambda a, b, c: signed(a).astype(np.float32),
    "uint2float_rn": lambda a, b, c: a.astype(np.float32),
    "int_as_float": lambda a, b, c: a,
    "ldg": lambda a, b, c: a,
    "ldcs_stcs": lambda a, b, c: a,
    "fadd_rn": floats(lambda a, b, c: a + b),
    "fsub_rn": floats(lambda a, b, c: a - b),
    "fmul_rn": floats(lambda a, b, c: a * b),
    "fdiv_rn": floats(lambda a, b, c: a / b),
    "fdividef": floats(lambda a, b, c: a / b),
    "frcp_rn": floats(lambda a, b, c: np.float32(1) / a),
    "fsqrt_rn": floats(lambda a, b, c: np.sqrt(a)),
    "multiply_then_add": floats(lambda a, b, c: a * b + c),  # two roundings, in numpy too
    "saturatef": floats(lambda a, b, c: np.nan_to_num(np.clip(a, 0, 1), nan=0.0)),
    "min_float": floats(lambda a, b, c: np.fmin(a, b)),
    "max_float": floats(lambda a, b, c: np.fmax(a, b)),
    "rsqrtf": close(lambda a, b: 1 / np.sqrt(a)),
    "expf": close(lambda a, b: np.exp(a)),
    "exp10f": close(lambda a, b: 10**a),
    "logf": close(lambda a, b: np.log(a)),
    "log2f": close(lambda a, b: np.log2(a)),
    "powf": close(lambda a, b: a**b),
}
# These get operands of like size, for which float64 holds the exact result.
FUSED = {
    "fmaf_rn": floats(lambda a, b, c: fused(a, b, c).astype(np.float32)),
    "hfma_half": halves(fused),
    "hfma_bfloat16": bfloat16s(fused),
    "hfma2_half": pairs(halves(fused)),
    "hfma2_bfloat16": pairs(bfloat16s(fused)),
}


def run_scalar(emulation, name, formula, a, b, c):
    out = np.full(len(a), 0xDEADBEEF, np.uint32)
    emulation.module.scalar_operation(name, *(x.ctypes.data for x in (a, b, c, out)), len(a))
    if getattr(formula, "is_check", False):
        return formula(a, b, c, out)
    expected = np.asarray(formula(a, b, c))
    if expected.dtype == np.float32:
        return np.testing.assert_array_equal(out.view(np.float32), expected, err_msg=name)  # a NaN equals a NaN
    return np.testing.assert_array_equal(out, expected.astype(np.int64).astype(np.uint32), err_msg=name)


# By type: the bits of 1.0, and those that may vary: sign, mantissa, the low bit of the exponent. Twice for a pair.
LIKE_SIZE = {
    "rn": (0x3F800000, 0x80FFFFFF),
    "half": (0x3C003C00, 0x87FF87FF),
    "bfloat16": (0x3F803F80, 0x80FF80FF),
}
EDGES = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000, 0x7F800000, 0x7FC00000, 0x4F000000], np.uint32)


@pytest.mark.parametrize("name", [*SCALAR, *FUSED])
@np.errstate(all="ignore")
def test_functions_of_one_thread(emulation, name):
    assert set(emulation.module.scalar_operations()) == set(SCALAR) | set(FUSED)
    random = np.random.default_rng(0)
    if name in FUSED:
        one, vary = LIKE_SIZE[name.split("_")[1]]
        a, b, c = ((random.integers(0, 2**32, 400, dtype=np.uint32) & vary) ^ one for _ in range(3))
        return run_scalar(emulation, name, FUSED[name], a, b, c)
    words = [np.concatenate([EDGES, random.integers(0, 2**32, 391, dtype=np.uint32)]) for _ in range(3)]
    words[1] = np.roll(words[1], 3)
    if not getattr(SCALAR[name], "is_check", False):
        run_scalar(emulation, name, SCALAR[name], *words)
    moderate = [random.uniform(0.1, 9, 400).astype(np.float32).view(np.uint32) for _ in range(3)]
    return run_scalar(emulation, name, SCALAR[name], *moderate)


# ---- memory


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics(emulation, schedule):
    emulation.configure(*schedule)
    names = set(emulation.module.atomic_operations())
    v = np.random.default_rng(0).integers(0, 100, 96).astype(np.uint32)
    old, total, start = np.empty_like(v), np.empty(1, np.uint32), 50

    def run(name):
        total[:] = start
        emulation.module.atomic_operation(name, *(x.ctypes.data for x in (v, old, total)), len(v))
        names.remove(name)
        return int(total[0])

    assert run("Add") == start + v.sum()
    assert sorted(old)[0] == start
    assert run("CAS") == start + v.sum()
    assert run("Sub") == (start - int(v.sum())) % 2**32
    assert run("Min") == min(start, v.min())
    assert run("Max") == max(start, v.max())
    assert run("And") == start & np.bitwise_and.reduce(v)
    assert run("Or") == start | np.bitwise_or.reduce(v)
    assert run("Xor") == start ^ np.bitwise_xor.reduce(v)
    assert sorted([run("Exch"), *old]) == sorted([start, *v])
    start = 2
    assert run("Inc") == (2 + 96) % 5  # wraps past 4
    assert sorted(set(old.tolist())) == [0, 1, 2, 3, 4]
    assert run("Dec") == (2 - 96) % 5
    assert not names


@pytest.mark.parametrize(
    "name, dtype", [("int", np.int32), ("float", np.float32), ("double", np.float64), ("uint64", np.uint64)]
)
def test_atomic_add_in_shared_and_global_memory(emulation, name, dtype):
    v, total = np.arange(77, dtype=dtype), np.ones(1, dtype)
    emulation.module.atomic_add(name, v.ctypes.data, total.ctypes.data, 77)
    assert total[0] == 1 + 2 * v.sum()  # two blocks


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cp_async", ["lazy", "eager"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies_arrive_at_their_wait(emulation, size, cp_async, schedule):
    emulation.configure(*schedule, cp_async=cp_async)
    n, valid = 33 * size, size // 2
    v, out = np.random.default_rng(0).integers(1, 255, 2 * n).astype(np.uint8), np.zeros((3, n), np.uint8)
    arguments = size, valid, v.ctypes.data, out.ctypes.data, 33
    if emulation is loaded("race") and cp_async == "lazy":  # the kernel looks too early, to see that nothing is there
        with pytest.raises(
            RuntimeError, match=r"memory.cu:\d+: reads shared memory that the cp.async of .* still to fill"
        ):
            emulation.module.copy_groups(*arguments)
        return
    emulation.module.copy_groups(*arguments)
    first = v[:n].reshape(-1, size).copy()
    first[:, valid:] = 0  # bytes past the valid ones
    np.testing.assert_array_equal(out[0], first.ravel())
    np.testing.assert_array_equal(out[1], v[n:] if cp_async == "eager" else np.full(n, 0xFF))
    np.testing.assert_array_equal(out[2], v[n:])


# ---- tensor cores; the layouts are those of the PTX ISA, element by element

GROUP, IN_GROUP = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4


def a_layout():
    i = np.arange(8)
    return np.where((i < 2) | (i >= 4) & (i < 6), GROUP, GROUP + 8), IN_GROUP * 2 + i % 2 + np.where(i < 4, 0, 8)


def b_layout():
    i = np.arange(4)
    return IN_GROUP * 2 + i % 2 + np.where(i < 2, 0, 8), GROUP + 0 * i


def d_layout():
    i = np.arange(4)
    return np.where(i < 2, GROUP, GROUP + 8), IN_GROUP * 2 + i % 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma(emulation, dtype, schedule):
    emulation.configure(*schedule)
    random = np.random.default_rng(0)
    # Eighths: products and sums are exact, so is every rounding.
    a, b, d = (random.integers(-16, 16, shape).astype(np.float32) / 8 for shape in ((16, 16), (16, 8), (16, 8)))
    to_bits = (lambda x: x.astype(np.float16).view(np.uint16)) if dtype == "float16" else rounded_to_bfloat16
    a_fragments, b_fragments = to_bits(a[a_layout()]), to_bits(b[b_layout()])
    out = np.ascontiguousarray(d[d_layout()])
    emulation.reset()
    emulation.module.mma(dtype == "bfloat16", a_fragments.ctypes.data, b_fragments.ctypes.data, out.ctypes.data)
    np.testing.assert_array_equal(out, (d + a @ b)[d_layout()])
    assert emulation.counters()["mma"] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(emulation, matrices, transposed, schedule):
    emulation.configure(*schedule)
    rows = np.random.default_rng(0).integers(0, 2**16, (matrices, 8, 8), dtype=np.uint16)
    out = np.zeros((32, matrices, 2), np.uint16)
    emulation.module.load_matrices(matrices, transposed, rows.ctypes.data, 16, out.ctypes.data)
    loaded = rows.transpose(0, 2, 1) if transposed else rows
    for i in range(matrices):
        np.testing.assert_array_equal(out[:, i], loaded[i][GROUP, IN_GROUP * 2 + np.arange(2)])


@pytest.mark.parametrize("stride, conflicts", [(16, 0), (144, 0), (32, 4), (64, 6), (128, 7)])
def test_bank_conflicts_of_ldmatrix_are_counted(emulation, stride, conflicts):
    rows, out = np.zeros((4, 8, 8), np.uint16), np.zeros((32, 4), np.uint32)
    emulation.reset()
    emulation.module.load_matrices(4, False, rows.ctypes.data, stride, out.ctypes.data)
    assert emulation.counters()["ldmatrix_conflicts"] == 4 * conflicts


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ldmatrix_and_mma_make_a_product(emulation, schedule):
    emulation.configure(*schedule)
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 8, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    out = np.zeros((16, 8), np.float32)
    emulation.module.multiply(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    np.testing.assert_array_equal(out, a.astype(np.float32) @ b.T.astype(np.float32))
