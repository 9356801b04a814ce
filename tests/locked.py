"""A lock between processes: of the workers of pytest-xdist one builds, and the others wait."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path):
    """Waits until no other process is in a block with this `path`, which is created; it is left there."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
