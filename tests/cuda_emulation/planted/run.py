"""Runs every planted bug and its healthy twin: `python -m tests.cuda_emulation.planted.run MODULE` prints JSON.

{name: {"healthy": outcomes, "buggy": outcomes}}, the outcomes by schedule: an error's message, or whether the result is
that of the healthy kernel in forward order ("right", "wrong"). A process of its own, since some bugs may crash it and
since libasan must be loaded first.
"""

import json
import os
import sys

import numpy as np

from tests.cuda_emulation import Emulation

N = 128  # elements, kThreads in planted.h
SCHEDULES = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]
EXACT = "libasan" in os.environ.get("LD_PRELOAD", "")


def array(value) -> np.ndarray:
    """N floats, aligned to 16 bytes; with room around them for bugs, unless ASan is to see those."""
    whole = np.empty(N if EXACT else 3 * N, np.float32)
    inner = whole if EXACT else whole[N : 2 * N]
    assert inner.ctypes.data % 16 == 0
    whole[:] = 0
    inner[:] = value
    return inner


def run(emulation: Emulation, name: str, buggy: bool, schedule) -> np.ndarray | str:
    emulation.configure(*schedule)
    given, out = array(np.arange(1, N + 1)), array(0)
    try:
        emulation.module.run(name, buggy, given.ctypes.data, out.ctypes.data, N)
    except RuntimeError as error:
        return str(error)
    return out.copy()


def main(module: str) -> None:
    emulation = Emulation(module)
    report = {}
    for name in emulation.module.names():
        expected = run(emulation, name, False, SCHEDULES[0])
        report[name] = {}
        for kind, buggy in (("healthy", False), ("buggy", True)):
            outcomes = report[name][kind] = {}
            for schedule in SCHEDULES:
                result = run(emulation, name, buggy, schedule)
                if not isinstance(result, str):
                    result = "right" if np.array_equal(result, expected) else "wrong"
                outcomes["-".join(map(str, schedule))] = result
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
