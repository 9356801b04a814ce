"""Tests that take long and are alike, marked `sampled`: `make test` runs a random fifth of them, `make gates` all.

A run that is told which tests to run (by a path, -k or -m) samples nothing, so a failed test can be run by its name.
"""

from __future__ import annotations

import math
import random

import pytest

from tests.executed import is_complete

PART = 1 / 5


def sample(items: list, seed: int) -> tuple[list, list]:
    """(tests to run, tests to leave out), each in the order of `items`."""
    marked = [item for item in items if item.get_closest_marker("sampled")]
    drawn = random.Random(seed).sample(marked, math.ceil(PART * len(marked)))
    left_out = {item.nodeid for item in marked} - {item.nodeid for item in drawn}
    return [item for item in items if item.nodeid not in left_out], [item for item in items if item.nodeid in left_out]


# The hooks below are pytest's; conftest.py imports them. The workers of pytest-xdist have to choose the same tests, and
# do not know how pytest was called: they get the seed, or None, from the process that starts them.


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.sample_seed = config.workerinput["sample_seed"]
    else:
        config.sample_seed = random.randrange(2**32) if is_complete(config) else None


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_configure_node(node):
    node.workerinput["sample_seed"] = node.config.sample_seed


def pytest_report_header(config):
    if config.sample_seed is not None:
        return f"of the tests marked sampled a random {PART:.0%} (seed {config.sample_seed}); `make gates` runs all"
