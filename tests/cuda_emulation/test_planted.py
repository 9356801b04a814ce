"""Kernels with a planted bug: the emulation names the bug and its line; without the bug they pass, in every build.

planted/*.cu holds each kernel twice, with and without its bug, and marks the lines to be named. Every build runs all of
them, in several orders of threads, in a process of its own (planted/run.py).
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from . import build

pytestmark = pytest.mark.slow

PLANTED = Path(__file__).parent / "planted"
MODES = ("plain", "race", "asan")
WRONG = "wrong"  # not named, but no test can miss it: the result is wrong, in one of the orders at least

RACE, UNFILLED = "race: ", "is still to fill: a wait or a commit is missing"
OUTSIDE, NO_WAIT = "out of bounds: ", "the thread ends without waiting for this cp.async"
UNWRITTEN = r"reads shared memory.* that the block has not written"


def everywhere(words: str) -> dict[str, str]:
    return dict.fromkeys(MODES, words)


# Bug -> build -> words of the message. A build that is not there need not notice.
TABLE = {
    # synchronization.cu
    "missing_barrier": {"plain": WRONG, "race": RACE},
    "missing_barrier_hidden_by_order": {"plain": WRONG, "race": RACE},
    "tile_refilled_too_early": {"plain": WRONG, "race": RACE},
    "missing_syncwarp": {"plain": WRONG, "race": RACE},
    "syncwarp_for_a_block": {"plain": WRONG, "race": RACE},
    "shuffle_taken_for_a_barrier": {"race": RACE},
    "divergent_barrier": everywhere("divergent barrier: other threads of the block wait at the barrier"),
    "early_exit": everywhere("ended (before|while others wait at) this barrier"),
    "shuffle_meets_barrier": everywhere("deadlock, these threads wait for one another"),
    "lane_outside_its_mask": everywhere("__shfl_xor_sync: the calling lane .* is not in its mask"),
    "masks_that_differ": everywhere("deadlock, .*\n.* with mask 0xfffffffe"),
    "shuffle_of_an_odd_width": everywhere("shuffle: width 24 is not a power of two up to 32"),
    "mma_in_half_a_warp": everywhere("mma.sync needs all 32 lanes of the warp"),
    # memory.cu
    "reads_past_the_end": {"asan": OUTSIDE + "reads 4 bytes at byte 512 of an allocation, which has 512"},
    "vector_past_the_end": {"asan": OUTSIDE + "reads .* at byte 512 of an allocation"},
    "writes_past_the_end": {"asan": OUTSIDE + "writes 4 bytes at byte 512 of an allocation"},
    "writes_before_the_begin": {"asan": OUTSIDE + "writes 4 bytes at 4 before an allocation"},
    "index_that_wraps": everywhere("access to address .*, where there is no memory"),
    "index_out_of_an_array": {mode: r"index 128 out of bounds of 'float \[128\]'" for mode in ("plain", "asan")},
    "shared_memory_overrun": {"asan": OUTSIDE},
    "dynamic_shared_memory_overrun": {"asan": OUTSIDE + "writes 4 bytes at byte 512 of dynamic shared memory"},
    "misaligned_vector": everywhere("misaligned access: an address of type .*float4.* is 12 past a multiple of 16"),
    "misaligned_atomic": everywhere("misaligned atomic"),
    "uninitialised_shared_memory": {"plain": WRONG, "race": UNWRITTEN},
    "shared_memory_of_another_block": {"plain": WRONG, "race": UNWRITTEN},
    "null_pointer": everywhere("access through a null pointer to 'const float'"),
    "shift_by_32": {mode: "shift by a negative or too large count" for mode in ("plain", "asan")},
    "int_that_overflows": {"asan": "signed overflow in a multiplication"},
    "ldmatrix_of_a_misaligned_row": everywhere("ldmatrix: the row address of lane .* is misaligned"),
    "ldmatrix_past_the_end": {"asan": OUTSIDE + "reads 16 bytes"},
    # copies.cu
    "missing_wait": {"plain": NO_WAIT, "asan": NO_WAIT, "race": UNFILLED},
    "wait_after_the_barrier": {"plain": WRONG, "race": UNFILLED},
    "copy_without_a_barrier": {"plain": WRONG, "race": RACE},
    "wait_for_one_group_less": {"plain": WRONG, "race": UNFILLED},
    "group_not_committed": {"plain": WRONG, "race": UNFILLED},
    "copy_outside_of_any_group": {"plain": NO_WAIT, "asan": NO_WAIT, "race": UNFILLED},
    "stage_refilled_too_early": {"plain": WRONG, "race": RACE},
    "misaligned_copy": everywhere("cp.async: misaligned source"),
    "copy_from_past_the_end": {"asan": OUTSIDE + "reads 16 bytes at byte 512 of an allocation"},
    "copy_to_global_memory": {mode: "cp.async: the destination is not in shared memory" for mode in ("plain", "race")},
    # grids.cu
    "two_blocks_write_one_element": {"plain": WRONG, "race": RACE + ".* of another block"},
    "sum_of_blocks_without_atomics": {"race": RACE + ".* of another block"},
    "last_block_without_a_fence": {"race": RACE + ".* of another block"},
    "dependency_without_a_wait": {"race": RACE + ".* that the launch before has written"},
    "wait_for_the_dependency_after_the_barrier": {"race": RACE + ".* that the launch before has written"},
    "waits_for_another_block": everywhere("the thread spins here"),
    "loop_without_an_end": everywhere("the thread spins here"),
    "too_many_threads": everywhere("^cudaErrorInvalidConfiguration$"),
    "too_many_blocks": everywhere("^cudaErrorInvalidConfiguration$"),
    "too_much_shared_memory": everywhere("^cudaErrorInvalidValue$"),
}
# What nothing names: a value that a GPU leaves undefined is poison here, and fails the test that compares results.
POISONED = ("uninitialised_accumulator", "reads_a_lane_that_takes_no_part")
# In reverse order the other block runs first.
DEPENDS_ON_ORDER = ("waits_for_another_block",)


@cache
def report(mode: str) -> dict:
    """What planted/run.py says about all planted bugs in a build."""
    module = build.module(mode, PLANTED)
    environment = {**os.environ, **(build.asan_environment() if mode == "asan" else {})}
    command = [sys.executable, "-m", "tests.cuda_emulation.planted.run", str(module)]
    run = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@cache
def marked_lines() -> dict[str, list[str]]:
    """Kernel -> file:line of its lines that are marked "named"."""
    found: dict[str, list[str]] = {}
    for path in sorted(PLANTED.glob("*.cu")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if kernel := re.search(r"__global__ void (\w+)_kernel\(", line):
                lines = found.setdefault(kernel[1], [])
            if line.endswith("// named"):
                lines.append(f"planted/{path.name}:{number}")
    return found


CASES = [(name, mode) for name, modes in TABLE.items() for mode in modes]


@pytest.mark.parametrize("name, mode", CASES, ids=[f"{name}-{mode}" for name, mode in CASES])
def test_planted_bug_is_named(name, mode):
    words = TABLE[name][mode]
    outcomes = report(mode)[name]["buggy"]
    if words == WRONG:
        assert WRONG in outcomes.values(), outcomes
        return
    for order, message in outcomes.items():
        if name in DEPENDS_ON_ORDER and message == "right":
            continue
        assert re.search(words, message), f"{order}: {message}"
        if message.startswith("cudaError"):
            continue
        lines = marked_lines()[name]
        assert message.split(": ")[0] in lines, f"{order}: {lines} expected: {message}"
        if mode == "race" and words == RACE:  # both accesses
            assert all(line in message for line in lines), f"{order}: {lines} expected: {message}"
        assert re.search(rf"{name}_kernel<true>, block \(\d+,0,0\)", message), message
    assert set(outcomes.values()) != {"right"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POISONED)
def test_planted_poison_spoils_the_result(name, mode):
    assert set(report(mode)[name]["buggy"].values()) == {WRONG}


@pytest.mark.parametrize("mode", MODES)
def test_planted_bugs_have_twins_that_pass(mode):
    ill = {name: outcomes["healthy"] for name, outcomes in report(mode).items()}
    ill = {name: outcomes for name, outcomes in ill.items() if set(outcomes.values()) != {"right"}}
    assert not ill


def test_planted_bugs_are_all_in_the_table():
    assert set(report("plain")) == {*TABLE, *POISONED}
    named = {name for name, modes in TABLE.items() if set(modes.values()) != {WRONG}}
    assert named == set(TABLE), "a bug that no build names belongs to POISONED"
