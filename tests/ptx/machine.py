"""Runs a kernel: warps of 32 threads, each thread with its own place in the program.

The warps of a block run one after the other, each as far as the next bar.sync; the blocks of a grid likewise. Within a
warp the threads at the lowest instruction run first, so that branches meet again behind an `if` or a loop.
"""

from __future__ import annotations

import ctypes
import struct

import numpy as np
from numpy import ndarray

from .actions import ALL, LANE_NUMBERS, Action, Barrier, Branch, Exit, mask
from .formats import LANES, unsigned
from .kernel import Kernel
from .memory import Bytes, Fault, Globals, Local, Memory, Spaces, Threads
from .parse import PtxError, Variable, parse
from .shared import AsyncCopies, Shared

# A loop that does not end would hang the test. The largest kernels of the tests run a tenth of this in a warp.
MAX_STEPS = 1_000_000


def load(text: str, name: str) -> Kernel:
    """The kernel of a PTX program whose name, mangled or not, contains `name`."""
    module = parse(text)
    return Kernel(module, module.find(name))


def launch(kernel: Kernel, memory: Memory, grid: tuple, block: tuple, arguments: list, dynamic_shared: int = 0) -> None:
    """Runs a whole grid.

    grid, block: 1 to 3 extents. arguments: for each parameter an int (a pointer too), a float, or a struct as bytes or
    ctypes.Structure. dynamic_shared: bytes. Raises PtxError at what no correct kernel does.
    """
    grid, block = ((*extents, 1, 1)[:3] for extents in (grid, block))
    entry, threads = kernel.entry, block[0] * block[1] * block[2]
    allowed = range(entry.exact_threads or 1, (entry.exact_threads or entry.max_threads or 1024) + 1)
    if threads not in allowed:
        raise PtxError(f"{entry.name}: {threads} threads a block, allowed are {allowed.start} to {allowed.stop - 1}")
    if len(arguments) != len(entry.parameters):
        raise PtxError(f"{entry.name}: {len(arguments)} arguments for {len(entry.parameters)} parameters")

    parameters, constants = Bytes(kernel.layouts["param"]), Bytes(kernel.layouts["const"])
    for parameter, argument in zip(entry.parameters, arguments, strict=True):
        begin = kernel.layouts["param"].address[parameter.name]
        parameters.data[begin : begin + parameter.size] = np.frombuffer(pack(argument, parameter), np.uint8)
    globals = Globals(kernel.layouts["global"])

    with np.errstate(all="ignore"):  # overflow and NaN are part of the job
        for z, y, x in np.ndindex(grid[::-1]):
            shared = Shared(kernel.layouts["shared"], dynamic_shared, warps=-(-threads // LANES))
            warps = [
                Warp(kernel, number, {"ctaid": (x, y, z), "nctaid": grid, "ntid": block})
                for number in range(-(-threads // LANES))
            ]
            for warp in warps:
                local = Local(kernel.layouts["local"])
                warp.spaces = Spaces(memory, shared, local, constants, globals, parameters)
            run_block(warps, shared)


def pack(argument, parameter: Variable) -> bytes:
    if isinstance(argument, float):
        return struct.pack({4: "<f", 8: "<d"}[parameter.size], argument)
    if isinstance(argument, int):
        return (argument % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
    if isinstance(argument, ctypes.Structure):
        argument = bytes(argument)
    if not isinstance(argument, bytes) or len(argument) != parameter.size:
        raise PtxError(f"parameter {parameter.name} has {parameter.size} bytes, the argument is {argument!r}")
    return argument


def run_block(warps: list[Warp], shared: Shared) -> None:
    running = {warp: warp.run() for warp in warps}
    while running:
        for warp, run in list(running.items()):
            if next(run, "ended") == "ended":  # otherwise it waits at a bar.sync
                del running[warp]
        shared.synchronize_block()


_UNWRITTEN = {bits: np.full(LANES, -1).astype(unsigned(bits)) for bits in (1, 8, 16, 32, 64)}
_BIT = 1 << LANE_NUMBERS


class Warp:
    """32 threads: their registers and where they are. `run` is the interpreter's loop."""

    spaces: Spaces

    def __init__(self, kernel: Kernel, number: int, position: dict[str, tuple[int, int, int]]):
        self.kernel, self.number, self.position = kernel, number, position
        block = position["ntid"]
        self.block_threads = block[0] * block[1] * block[2]
        threads = number * LANES + LANE_NUMBERS
        self.threads = Threads(number, threads)
        self.live = mask(threads < self.block_threads)
        # Ones, not zeros: a register that is read before it is written should spoil the result.
        self.registers = [_UNWRITTEN[bits] for bits in kernel.bits]
        self.copies = AsyncCopies()
        self.special = self.special_registers()

    def special_registers(self) -> dict[str, ndarray]:
        block, threads = self.position["ntid"], self.threads.numbers
        tid = (threads % block[0], threads // block[0] % block[1], threads // (block[0] * block[1]))
        places = {"tid": tid, **self.position}
        values = {f"%{name}.{axis}": place[i] for name, place in places.items() for i, axis in enumerate("xyz")}
        values |= {"%laneid": LANE_NUMBERS, "%warpid": self.number, "%nwarpid": -(-self.block_threads // LANES)}
        values |= {"%lanemask_eq": _BIT, "%lanemask_lt": _BIT - 1, "%lanemask_le": 2 * _BIT - 1}
        values |= {"%lanemask_ge": (1 << LANES) - _BIT, "%lanemask_gt": (1 << LANES) - 2 * _BIT}
        return {name: values[name] + np.zeros(LANES, np.int64) for name in self.kernel.special_registers}

    def active(self, lanes: ndarray) -> tuple[ndarray | slice, Threads]:
        """Which rows of a value belong to `lanes`, and which threads these are."""
        if lanes is ALL:
            return slice(None), self.threads
        rows = np.flatnonzero(lanes)
        return rows, Threads(self.number, self.threads.numbers[rows])

    def run(self):
        """A generator: yields at each bar.sync that all threads of the warp have reached."""
        steps = self.kernel.steps
        fronts = {0: self.live}  # instruction -> lanes that execute it next
        parked: dict[int, ndarray] = {}  # instruction -> lanes that wait there for others of their warp
        step = lanes = None

        def arrive(place: int, lanes: ndarray | None) -> None:
            if lanes is not None:
                fronts[place] = mask(fronts[place] | lanes) if place in fronts else lanes

        try:
            for _ in range(MAX_STEPS):
                if not fronts:
                    if not parked:
                        return
                    place = self.released(parked)
                    fronts[place] = parked.pop(place)
                place = min(fronts)
                lanes = fronts.pop(place)
                if place in parked:
                    lanes = mask(lanes | parked.pop(place))
                step = steps[place]
                rest = None  # lanes whose guard says no
                if step.guard is not None:
                    wanted = step.guard(self)
                    lanes, rest = mask(lanes & wanted), mask(lanes & ~wanted)
                if lanes is not None:
                    action = step.action
                    if type(action) is Branch:
                        arrive(action.target, lanes)
                        lanes = None
                    elif type(action) is Exit:
                        self.live = self.live & ~lanes
                        lanes = None
                    elif action.team is not None and self.missing(action, lanes).any():
                        parked[place] = lanes
                        lanes = None
                    elif type(action) is Barrier:
                        if action.threads is not None and (action.threads(self) != self.block_threads).any():
                            raise PtxError("a barrier of a part of the block is not implemented")
                        yield "barrier"
                    else:
                        action.run(self, lanes)
                arrive(place + 1, lanes)
                arrive(place + 1, rest)
            raise PtxError(f"{MAX_STEPS} instructions and no end: a loop that does not stop?")
        except PtxError as error:
            raise PtxError(f"{error}\n  {step.source}\n  {self.whereabouts(error, lanes)}") from None

    def missing(self, action: Action, lanes: ndarray) -> ndarray:
        return action.team(self, lanes) & self.live & ~lanes

    def released(self, parked: dict[int, ndarray]) -> int:
        """Nobody else can run: those go on whose team is complete, because the rest of it has ended."""
        for place, lanes in parked.items():
            if not self.missing(self.kernel.steps[place].action, lanes).any():
                return place
        waits = [
            f"lanes {np.flatnonzero(lanes).tolist()} wait at {self.kernel.steps[place].source} for lanes "
            f"{np.flatnonzero(self.missing(self.kernel.steps[place].action, lanes)).tolist()}"
            for place, lanes in parked.items()
        ]
        raise PtxError("divergent warp: " + "; ".join(waits))

    def whereabouts(self, error: PtxError, lanes: ndarray | None) -> str:
        block = f"{self.kernel.entry.name}, block {self.position['ctaid']}"
        if lanes is None:
            return f"{block}, warp {self.number}"
        lane = np.flatnonzero(lanes)[error.row if isinstance(error, Fault) else 0]
        x, y, _ = self.position["ntid"]
        thread = int(self.threads.numbers[lane])
        return f"{block}, thread {(thread % x, thread // x % y, thread // (x * y))}"
