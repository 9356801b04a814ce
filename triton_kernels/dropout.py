"""The dropout mask of every backend, made again from its seed: `fastpeft/reference/dropout.py`, bit for bit."""

import triton
import triton.language as tl

# Of MurmurHash3's 32-bit finalizer, and of Weyl's sequence.
_MIX_1 = tl.constexpr(0x85EBCA6B)
_MIX_2 = tl.constexpr(0xC2B2AE35)
_WEYL = tl.constexpr(0x9E3779B9)


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * _MIX_1
    return (h ^ (h >> 13)) * _MIX_2


@triton.jit
def keep_mask(seed, m, k, threshold):
    """keep[m, k], bool [len(m), len(k)]. seed: int64. m, k: row and column numbers. threshold: `keep_threshold(p)`.

    Eight instructions an element; the hash of a row is a row's, and hoisted out of a loop over columns.
    """
    row = _mix(m.to(tl.uint32) * _WEYL + seed.to(tl.uint32))
    row ^= row >> 16
    column = k.to(tl.uint32) * _WEYL
    return _mix(row[:, None] ^ column[None, :]).to(tl.int32, bitcast=True) >= threshold


def keep_threshold(p):
    """The smallest hash that is kept, as an int32, where p is the probability to drop; 0 <= p < 1."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31
