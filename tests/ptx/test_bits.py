"""Logic, shifts and fields of bits of the interpreter, against Python's integers."""

import numpy as np
import pytest

from .snippets import execute

pytestmark = pytest.mark.slow

THREADS = 256
RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, (3, THREADS), dtype="u4")
LONGS = RNG.integers(0, 2**64, (2, THREADS), dtype="u8")
# More than any width too: an operand that counts bits is 32 bits wide, whatever is shifted.
COUNTS = RNG.choice(np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31], "u4"), (2, THREADS))


def each(function, *arrays, dtype="u4"):
    return np.array([function(*map(int, row)) for row in zip(*arrays, strict=True)], dtype)


@pytest.mark.parametrize("values, bits", ((WORDS[0].astype("u2"), 16), (WORDS[0], 32), (LONGS[0], 64)))
def test_a_shift_by_the_width_or_more_shifts_everything_out(values, bits):
    counts, dtype = COUNTS[0], f"u{bits // 8}"
    body = f"shl.b{bits} d, a, b; shr.u{bits} e, a, b; shr.s{bits} f, a, b;"
    left, right, signed = execute(body, threads=THREADS, a=values, b=counts, d=dtype, e=dtype, f=dtype)
    assert np.array_equal(left, each(lambda a, n: (a << min(n, bits)) % (1 << bits), values, counts, dtype=dtype))
    assert np.array_equal(right, each(lambda a, n: a >> min(n, bits), values, counts, dtype=dtype))
    extended = values.view(f"i{bits // 8}")
    assert np.array_equal(
        signed, each(lambda a, n: a >> min(n, bits), extended, counts, dtype=f"i{bits // 8}").view(dtype)
    )


@pytest.mark.parametrize("over, limit", (("clamp", lambda n: min(n, 32)), ("wrap", lambda n: n % 32)))
def test_funnel_shift(over, limit):
    a, b = WORDS[:2]
    body = f"shf.l.{over}.b32 d, a, b, c; shf.r.{over}.b32 e, a, b, c;"
    left, right = execute(body, threads=THREADS, a=a, b=b, c=COUNTS[0], d="u4", e="u4")
    assert np.array_equal(left, each(lambda a, b, n: (b << 32 | a) << limit(n) >> 32 & 0xFFFFFFFF, a, b, COUNTS[0]))
    assert np.array_equal(right, each(lambda a, b, n: (b << 32 | a) >> limit(n) & 0xFFFFFFFF, a, b, COUNTS[0]))


@pytest.mark.parametrize("table", (0x00, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B, 0xFF))
def test_lop3(table):
    def bitwise(a, b, c):
        picked = [table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)]
        return sum(bit << i for i, bit in enumerate(picked))

    a, b, c = WORDS[:, :32]
    assert np.array_equal(execute(f"lop3.b32 d, a, b, c, {table};", a=a, b=b, c=c, d="u4"), each(bitwise, a, b, c))


def test_logic_on_words_and_predicates():
    a, b = WORDS[0], WORDS[1]
    body = "and.b32 d, a, b; or.b32 e, a, b; xor.b32 f, d, e; not.b32 f, f;"
    d, e, f = execute(body, threads=THREADS, a=a, b=b, d="u4", e="u4", f="u4")
    assert np.array_equal(d, a & b) and np.array_equal(e, a | b) and np.array_equal(f, ~(a ^ b))
    body = """
        setp.lt.u32 p, a, b; setp.lt.u32 q, a, 2147483648;
        xor.pred r, p, q; or.pred p, p, q; not.pred r, r; and.pred p, p, !r; mov.pred q, p;
        selp.u32 d, 1, 0, q;
    """
    d = execute(body, registers=".reg .pred p, q, r;", threads=THREADS, a=a, b=b, d="u4")
    assert np.array_equal(d, (a < b) ^ (a < 2**31))


def test_prmt_picks_bytes_and_signs():
    a, b, selectors = WORDS

    def permute(a, b, c):
        pool = (b << 32 | a).to_bytes(8, "little")
        picks = [(c >> 4 * i) & 15 for i in range(4)]
        return int.from_bytes([(0xFF if pool[p & 7] & 0x80 else 0) if p & 8 else pool[p & 7] for p in picks], "little")

    actual = execute("prmt.b32 d, a, b, c;", threads=THREADS, a=a, b=b, c=selectors, d="u4")
    assert np.array_equal(actual, each(permute, a, b, selectors))


def bit_field(a: int, position: int, length: int, bits: int, signed: bool) -> int:
    """The definition in the PTX ISA, bit by bit."""
    position, length, top = position & 0xFF, length & 0xFF, bits - 1
    sign = a >> min(position + length - 1, top) & 1 if signed and length else 0
    field = [a >> (position + i) & 1 if i < length and position + i <= top else sign for i in range(bits)]
    return sum(bit << i for i, bit in enumerate(field))


@pytest.mark.parametrize("type", ("u32", "s32", "u64", "s64"))
def test_bfe(type):
    bits = int(type[1:])
    values, dtype = (WORDS[0] if bits == 32 else LONGS[0]), f"u{bits // 8}"
    actual = execute(f"bfe.{type} d, a, b, c;", threads=THREADS, a=values, b=COUNTS[0], c=COUNTS[1], d=dtype)
    wanted = each(lambda a, p, n: bit_field(a, p, n, bits, type[0] == "s"), values, *COUNTS, dtype=dtype)
    assert np.array_equal(actual, wanted)


@pytest.mark.parametrize("bits", (32, 64))
def test_bfi(bits):
    a, b = WORDS[:2] if bits == 32 else LONGS

    def insert(a, b, position, length):
        position, length = position & 0xFF, length & 0xFF
        for i in range(length):
            if position + i < bits:
                b = b & ~(1 << position + i) | (a >> i & 1) << position + i
        return b

    dtype = f"u{bits // 8}"
    body = f"bfi.b{bits} d, a, b, c, e;"
    actual = execute(body, threads=THREADS, a=a, b=b, c=COUNTS[0], e=COUNTS[1], d=dtype)
    assert np.array_equal(actual, each(insert, a, b, *COUNTS, dtype=dtype))


def test_counting_and_reversing():
    a = WORDS[0].copy()
    a[:3] = 0, 1, 2**32 - 1
    body = "popc.b32 d, a; clz.b32 e, a; brev.b32 f, a; bfind.u32 g, a; bfind.s32 h, a; bfind.shiftamt.u32 i, a;"
    d, e, f, g, h, i = execute(body, threads=THREADS, a=a, **dict.fromkeys("defghi", "u4"))
    assert np.array_equal(d, each(int.bit_count, a))
    assert np.array_equal(e, each(lambda x: 32 - x.bit_length(), a))
    assert np.array_equal(f, each(lambda x: int(f"{x:032b}"[::-1], 2), a))
    assert np.array_equal(g, each(lambda x: (x.bit_length() - 1) % 2**32, a))
    assert np.array_equal(h, each(lambda x: ((x if x < 2**31 else ~x & 0xFFFFFFFF).bit_length() - 1) % 2**32, a))
    assert np.array_equal(i, each(lambda x: 32 - x.bit_length() if x else 2**32 - 1, a))
    assert np.array_equal(execute("popc.b64 d, a;", threads=THREADS, a=LONGS[0], d="u4"), each(int.bit_count, LONGS[0]))
