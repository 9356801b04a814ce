"""How an op is measured: its result is checked first, then all sides take turns in one process.

A case is one shape of one op. Its sides compute the same thing in different ways; the first is fastpeft's own choice.

- Parity comes first: a fresh random input, every side against the formula in float64. A wrong result stops the case
  before anything is timed.
- Cold caches: a side works through several sets of inputs, together larger than the last cache, so that every call
  finds its weights in memory.
- On a GPU a side's calls are captured in a CUDA graph and the replays timed with events: device time, without Python.
  A side that cannot be captured is timed as it is called, and so, a second time, is fastpeft beside it.
- Turns: every round times every side once, in an order that is reversed from round to round. A ratio is formed within
  a round, so that a clock that falls, or a neighbour on the machine, meets both of its sides.
- Ceilings, a large copy and a large matrix product, are measured in the same process. The fraction of the roofline is
  the time that the case's bytes or operations (whichever takes longer) would need at the ceilings over its own time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.costs import Cost

Outputs = dict[str, Tensor]
Call = Callable[[], Any]

# A graph that is replayed back to back leaves a gap of some microseconds between replays: graphs are made this long.
_GRAPH_MS = 0.5


class Absent(Exception):
    """Why a side cannot run here: a package that is not installed, a backend that the op does not have."""


class WrongResult(Exception):
    """A side computed something else than the formula."""


def gradients(call: Callable[[], Tensor], dy: Tensor | None, **leaves: Tensor) -> Outputs:
    """y = call(), and with dy the gradients of `leaves`, as d<name>; without dy a forward that keeps nothing."""
    if dy is None:
        with torch.no_grad():
            return {"y": call()}
    y = call()
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}}


@dataclass(frozen=True)
class Side:
    """`prepare(inputs)` does what happens once (packing weights, building modules) and returns the call to time.

    exact: what it should give, for a side whose work differs on purpose (no adapter, another 4-bit format); its name
    must say so. peer: somebody else's package, whose failures are reported and do not stop the case.
    """

    name: str
    prepare: Callable[[Any], Callable[[], Outputs]]
    exact: Callable[[Any], Outputs] | None = None
    peer: bool = False


@dataclass(frozen=True)
class Case:
    """labels: the columns that name it. inputs: a fresh random set on the device. sides: fastpeft's choice first.

    formula(inputs, dtype): the plain formula, in the inputs' own dtypes (None) or in float64.
    """

    labels: dict[str, str | int]
    inputs: Callable[[], Any]
    sides: Sequence[Side]
    formula: Callable[[Any, torch.dtype | None], Outputs]
    cost: Cost

    @property
    def title(self) -> str:
        labels = ((name, value) for name, value in self.labels.items() if value != "")
        return ", ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in labels)


@dataclass(frozen=True)
class Ceilings:
    copy_bytes_per_s: float
    matmul_ops_per_s: float

    def floor_ms(self, cost: Cost) -> float:
        """The time that nothing can beat: memory and tensor cores each work for the whole of it, at best."""
        return 1e3 * max(cost.bytes / self.copy_bytes_per_s, cost.tensor_core_ops / self.matmul_ops_per_s)


@dataclass(frozen=True)
class Run:
    """What is timed at once: `call` calls the op `count` times."""

    call: Call
    count: int


@dataclass(frozen=True)
class Timing:
    """rounds: turns of each side. sample_ms: how long one turn lasts at least; calls are repeated to fill it.

    sets: the most sets of inputs; the weights of a small layer would need thousands to fill a cache.
    """

    rounds: int
    sample_ms: float
    sets: int


# 25 rounds of 2 ms are 50 ms a side on a GPU; a CPU has fewer cores to be disturbed on, and its clock is coarser.
TIMINGS = {"cuda": Timing(25, 2.0, 256), "cpu": Timing(9, 20.0, 64)}
SMOKE = Timing(3, 0.5, 2)


@dataclass(frozen=True)
class Device:
    """Everything that differs between a GPU and a CPU when time is taken."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def cache_bytes(self) -> int:
        """Size of the last cache before memory: the GPU's L2, or the CPU's largest."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.device).L2_cache_size
        units = {"K": 2**10, "M": 2**20}
        found = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        sizes = [int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units]
        return max(sizes, default=32 * 2**20)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def elapsed_ms(self, call: Call, repeats: int) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        call()  # untimed: the device is busy with it while the host queues what is timed
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def captured(self, run: Run) -> Run:
        """`run`, which was called before, as the replay of a CUDA graph, several times over where it is short.

        Raises RuntimeError where it cannot be captured: it waits for the device, for example.
        """
        replay = self._capture(run.call, 1)
        passes = max(1, round(_GRAPH_MS / max(self.elapsed_ms(replay, 1), 1e-3)))
        return Run(replay if passes == 1 else self._capture(run.call, passes), run.count * passes)

    def _capture(self, call: Call, passes: int) -> Call:
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        # What a library sets up once for a stream must not happen in the capture; and a call that waits for the device
        # must not spoil one: PyTorch's allocator does not recover from that.
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        current.wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(passes):
                call()
        return graph.replay


def quantile(values: Sequence[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def in_turns(runs: dict[str, Run], device: Device, timing: Timing) -> dict[str, list[float]]:
    """Milliseconds of one call of the op, a value a round, for each side."""
    repeats = {}
    for name, run in runs.items():
        run.call()
        once = device.elapsed_ms(run.call, 1)
        repeats[name] = max(1, round(timing.sample_ms / max(once, 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    gc.disable()
    try:
        for index in range(timing.rounds):
            for name in names if index % 2 == 0 else reversed(names):
                run, times = runs[name], repeats[name]
                samples[name].append(device.elapsed_ms(run.call, times) / (times * run.count))
    finally:
        gc.enable()
    return samples


# Of square matrices: on a CPU a product that stays in the caches can be faster than a larger one.
_MATMUL_SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024)}


def ceilings(device: Device, timing: Timing) -> Ceilings:
    """Measured now: a copy between two buffers (bytes read plus written) and bf16 matrix products, on random data.

    The fastest round of the best size counts: a ceiling is what was reached once, not what is usual.
    """
    source = torch.randn(2**29 if device.is_cuda else 2**25, device=device.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    runs = {"copy": Run(lambda: target.copy_(source), 1)}
    sizes = _MATMUL_SIZES["cuda" if device.is_cuda else "cpu"]
    for size in sizes:
        a, b, c = (torch.randn(size, size, device=device.device, dtype=torch.bfloat16) for _ in range(3))
        runs[f"matmul {size}"] = Run(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), 1)
    ms = {name: min(values) for name, values in in_turns(runs, device, timing).items()}
    return Ceilings(2e3 * source.nbytes / ms["copy"], max(2e3 * size**3 / ms[f"matmul {size}"] for size in sizes))


def check(case: Case) -> tuple[list[Side], dict[str, str]]:
    """Runs every side once on a fresh input. Returns those that can run here, and why the others cannot.

    Raises WrongResult: an error against float64 above twice that of the plain formula in the same dtypes, plus one
    unit in the last place; or, where bytes are due, more than one in a thousand that differ (a tie may round either
    way).
    """
    inputs = case.inputs()
    exact, plain = case.formula(inputs, torch.float64), case.formula(inputs, None)
    able, notes = [], {}
    for side in case.sides:
        try:
            outputs = side.prepare(inputs)()
            wanted = exact if side.exact is None else side.exact(inputs)
            for name, output in outputs.items():
                _compare(f"{case.title}: {side.name}: {name}", output, wanted[name], plain[name], exact[name])
            able.append(side)
        except (Absent, torch.OutOfMemoryError) as reason:
            notes[side.name] = f"absent: {str(reason).splitlines()[0]}"
        except Exception as error:
            if not side.peer:
                raise
            notes[side.name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not able or able[0] is not case.sides[0]:
        raise RuntimeError(f"{case.title}: {case.sides[0].name} cannot run here: {notes[case.sides[0].name]}")
    return able, notes


def _compare(what: str, output: Tensor, wanted: Tensor, plain: Tensor, exact: Tensor) -> None:
    if output.shape != wanted.shape:
        raise WrongResult(f"{what} is {tuple(output.shape)}, wanted {tuple(wanted.shape)}")
    if not output.is_floating_point():
        differing = (output != wanted).double().mean().item()
        if not differing <= 1e-3:
            raise WrongResult(f"{what}: {differing:.1%} of the bytes differ")
        return
    error = _relative_error(output, wanted)
    allowed = 2 * _relative_error(plain, exact) + torch.finfo(plain.dtype).eps
    if not error <= allowed:  # a NaN is not
        raise WrongResult(f"{what}: relative error {error:.2e}, allowed {allowed:.2e}")


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def measure(case: Case, device: Device, timing: Timing, ceiling: Ceilings) -> list[dict]:
    """The rows of a case, one a side, absent ones too. Raises WrongResult before anything is timed."""
    sides, notes = check(case)
    # Twice the cache, so that a set is long gone when its turn comes again; at least two.
    sets = min(max(2, -(-2 * device.cache_bytes // case.cost.read_bytes)), timing.sets)
    inputs = [case.inputs() for _ in range(sets)]  # fresh ones again, so that nothing depends on what was checked
    runs = {side.name: _one_after_the_other([side.prepare(each) for each in inputs]) for side in sides}
    groups = _by_timer(runs, device, notes) if device.is_cuda else {"clock": runs}
    ours = case.sides[0].name
    rows = {}
    for timer, group in groups.items():
        samples = in_turns(group, device, timing)
        for name, ms in samples.items():
            if name == ours and name in rows:
                continue  # its second timing is there for the ratios of the others
            ratios = [value / own for value, own in zip(ms, samples[ours], strict=True)]
            fraction = ceiling.floor_ms(case.cost) / quantile(ms, 0.5)
            rows[name] = _times(timer, ms, ratios) | {"fraction": _round(fraction)}
    shared = {"bytes": case.cost.bytes, "operations": case.cost.tensor_core_ops, "sets": sets}
    shared |= {"copy_gb_per_s": _round(ceiling.copy_bytes_per_s / 1e9)}
    shared |= {"matmul_tflop_per_s": _round(ceiling.matmul_ops_per_s / 1e12)}
    absent = dict.fromkeys(COLUMNS, "")
    return [
        {**case.labels, "side": side.name, **rows.get(side.name, absent), **shared, "note": notes.get(side.name, "")}
        for side in case.sides
    ]


COLUMNS = ("timer", "ms_p20", "ms_p50", "ms_p80", "ratio", "ratio_p20", "ratio_p80", "fraction")


def _times(timer: str, ms: list[float], ratios: list[float]) -> dict:
    quantiles = {f"ms_p{q}": _round(quantile(ms, q / 100)) for q in (20, 50, 80)}
    return {
        "timer": timer,
        **quantiles,
        "ratio": _round(quantile(ratios, 0.5)),
        "ratio_p20": _round(quantile(ratios, 0.2)),
        "ratio_p80": _round(quantile(ratios, 0.8)),
    }


def _round(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _one_after_the_other(calls: list[Call]) -> Run:
    def call() -> None:
        for each in calls:
            each()

    return Run(call, len(calls))


def _by_timer(runs: dict[str, Run], device: Device, notes: dict[str, str]) -> dict[str, dict[str, Run]]:
    """Timer -> side -> run: graphs where capture works; fastpeft beside the others, called as they are."""
    graphs, rest = {}, {}
    for name, run in runs.items():
        run.call()  # compiles, tunes, allocates
        try:
            graphs[name] = device.captured(run)
        except RuntimeError as error:
            notes[name] = f"no CUDA graph: {str(error).splitlines()[0]}"
            rest[name] = run
            device.synchronize()
    ours = next(iter(runs))
    if ours in rest:
        return {"events": runs}
    return {"graph": graphs} | ({"events": {ours: runs[ours]} | rest} if rest else {})
