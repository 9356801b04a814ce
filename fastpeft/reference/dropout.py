"""The dropout mask of every backend: a hash of (seed, row, column), so that backward makes it again from the seed."""

from __future__ import annotations

import torch
from torch import Tensor

# Multipliers of MurmurHash3's 32-bit finalizer (Appleby, public domain) and of Weyl's sequence (2**32 / golden ratio).
_MIX_1, _MIX_2, _WEYL = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _shift_xor_(h: Tensor, bits: int) -> Tensor:
    # int32 shifts drag the sign along: the and makes the shift logical.
    return h.bitwise_xor_((h >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _mix_(h: Tensor) -> Tensor:
    _shift_xor_(h, 16).mul_(_signed(_MIX_1))
    _shift_xor_(h, 13).mul_(_signed(_MIX_2))
    return h


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """`keep[m, k] = hash(seed, m, k) >= p * 2**32`; [rows, columns] bool, True with probability 1 - p.

    seed: 0-d int64 tensor; the mask is made on its device, without a synchronisation. One word of hash per element,
    rows mixed on their own first, so that no product of sizes has to fit 32 bits.
    """
    row = torch.arange(rows, dtype=torch.int64, device=seed.device).mul_(_WEYL).add_(seed).to(torch.int32)
    column = torch.arange(columns, dtype=torch.int64, device=seed.device).mul_(_WEYL).to(torch.int32)
    row = _shift_xor_(_mix_(row), 16)
    hashed = _mix_(row.unsqueeze(1) ^ column)
    # The words are signed here: [-2**31, 2**31) is the range of the hash. The last xor-shift is left out, since only
    # the order of magnitude counts, which the high bits decide.
    return hashed >= min(round(p * 2**32), 2**32 - 1) - 2**31
