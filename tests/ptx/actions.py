"""What an instruction is once it is bound to its operands, and masks of lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .formats import LANES

ALL = np.ones(LANES, bool)  # compared by identity: the common case needs no merging
ALL.flags.writeable = False
LANE_NUMBERS = np.arange(LANES)


def mask(lanes: ndarray) -> ndarray | None:
    """A mask as the machine wants it: ALL itself if every lane is in it, None if none is."""
    return ALL if lanes.all() else lanes if lanes.any() else None


Read = Callable[..., ndarray]  # (warp) -> a value for each lane
Write = Callable[..., None]  # (warp, lanes, a value for each lane)
# (warp, lanes that execute) -> lanes that must execute it together; those of them that still live are waited for.
Team = Callable[..., ndarray]


@dataclass(frozen=True)
class Compute:
    run: Callable[..., None]  # (warp, lanes)
    team: Team | None = None


@dataclass(frozen=True)
class Barrier:
    threads: Read | None  # how many of the block take part; None: all
    team: Team = lambda warp, lanes: ALL


@dataclass(frozen=True)
class Branch:
    target: int
    team = None


@dataclass(frozen=True)
class Exit:
    team = None


Action = Compute | Barrier | Branch | Exit
