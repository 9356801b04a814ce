"""Times other tiles for triton_kernels/tiles.py on a GPU, and prints the table as it should be.

    python -m benchmarks.tune [--op lora_linear_fwd] [--out FILE]
    python -m benchmarks.tune --list              the candidates; needs no GPU

Every bucket of the table, a launcher and its kind of weight up to so many tokens, is timed at its upper end (512 tokens
for the last of a product, 8192 of a pass) on the layers of static.py, in bf16 and with rank 16. What a candidate writes
is checked against float64 before it is timed. A time is the median over replays of a CUDA graph that walks through as
many copies of the tensors as do not fit into the L2 cache twice. The candidate that takes the smallest part of the
current tile's time, averaged over the layers, replaces it where it saves 2% or more: less may be chance. What does not
fit into a GPU's shared memory is passed over; for other GPUs tests/test_machine_code.py decides.

Prints the Python text of TILES, to be pasted; on standard error, each bucket as it is done.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from types import SimpleNamespace

import torch
from fastpeft.triton_kernels.tiles import TILES, Tile
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.static import SHAPES
from fastpeft import ops
from fastpeft.quant import NF4Weight
from tests.parity import assert_parity

RANK = 16
SCALE = 0.5
WORTHWHILE = 0.98
MIN_TIMED_MS = 25
Buckets = tuple[tuple[float, Tile], ...]


def candidates(entry: str, most: float) -> list[Tile]:
    """Tiles to try in a bucket. Rows are tokens, or ranks of a gradient."""
    token_rows = (int(most),) if most <= 64 else (64, 128)
    if entry.startswith("lora_linear"):
        shapes = product(token_rows, (64, 128, 256), (64, 128))
    elif entry == "lora_down":
        shapes = product(token_rows, (64,), (64, 128))
    else:  # how many ranks a program takes is no matter of speed alone: see lora_linear_passes.py
        shapes = product((TILES[entry][0][1].rows,), (64, 128, 256), (32, 64, 128))
    return [Tile(*shape, warps, stages) for shape in shapes for warps in (4, 8) for stages in (2, 3, 4)]


def tokens(entry: str, most: float) -> int:
    return int(most) if most != inf else 512 if entry.startswith("lora_linear") else 8192


@dataclass(frozen=True)
class Launcher:
    """What an entry of TILES is timed with. Letters are sizes: "MN" is [M, N]. `t` are the tensors of `Problem`."""

    reads: tuple[str, ...]  # the large ones
    outputs: tuple[str, ...]
    formula: Callable[..., tuple[Tensor, ...]]  # t -> outputs
    launch: Callable[..., None]  # module, t, outputs


LAUNCHERS = {
    "lora_linear_fwd": Launcher(
        ("x", "W"),
        ("MN",),
        lambda t: (t.x @ t.W.t() + SCALE * (t.xa @ t.B.t()),),
        lambda kernels, t, y: kernels.lora_linear_fwd(t.x, t.stored, t.xa, t.B, None, SCALE, y),
    ),
    "lora_linear_dx": Launcher(
        ("dy", "W"),
        ("MK",),
        lambda t: (t.dy @ t.W + SCALE * (t.u @ t.A),),
        lambda kernels, t, dx: kernels.lora_linear_dx(t.dy, t.stored, t.u, t.A, SCALE, None, 0.0, dx),
    ),
    "lora_down": Launcher(
        ("x",),
        ("MR",),
        lambda t: (t.x @ t.A.t(),),
        lambda kernels, t, xa: kernels.lora_down(t.x, t.A, None, 0.0, xa),
    ),
    "lora_down_grad": Launcher(
        ("x",),
        ("RK",),
        lambda t: (SCALE * (t.u.t() @ t.x),),
        lambda kernels, t, dA: kernels.lora_down_grad(t.x, t.u, None, 0.0, SCALE, dA),
    ),
    "lora_up_grad": Launcher(
        ("dy",),
        ("MR", "NR"),
        lambda t: (t.dy @ t.B, SCALE * (t.dy.t() @ t.xa)),
        lambda kernels, t, u, dB: kernels.lora_up_grad(t.dy, t.B, t.xa, u, dB, SCALE),
    ),
}


class Problem:
    """A launch of an entry of TILES, with tensors of its own, without bias and dropout."""

    def __init__(self, entry: str, M: int, N: int, K: int, device: str):
        name, _, kind = entry.partition(" ")
        self.launcher = LAUNCHERS[name]
        sizes = {"M": M, "N": N, "K": K - 8 if kind == "nf4_ragged" else K, "R": RANK}

        def random(letters: str) -> Tensor:
            return torch.randn([sizes[letter] for letter in letters], device=device, dtype=torch.bfloat16)

        shapes = {"x": "MK", "dy": "MN", "A": "RK", "B": "NR", "xa": "MR", "u": "MR"}
        self.tensors = SimpleNamespace(**{tensor: random(letters) for tensor, letters in shapes.items()})
        if "W" in self.launcher.reads:
            W = random("NK") / K**0.5
            nf4 = ops.nf4_quantize(W, backend="eager") if kind.startswith("nf4") else None
            self.tensors.W = W if nf4 is None else nf4.dequantize(torch.bfloat16, backend="eager")
            self.tensors.stored = W if nf4 is None else _storage(nf4)
        self.outputs = [random(letters).fill_(torch.nan) for letters in self.launcher.outputs]

    def run(self) -> None:
        from fastpeft.triton_kernels import lora_linear

        self.launcher.launch(lora_linear, self.tensors, *self.outputs)

    def check(self) -> None:
        """Stops where the results are wrong."""
        self.run()
        in_float64 = {k: t.double() for k, t in vars(self.tensors).items() if k != "stored"}
        plain, exact = (self.launcher.formula(t) for t in (self.tensors, SimpleNamespace(**in_float64)))
        for output, *expected in zip(self.outputs, plain, exact, strict=True):
            assert_parity(output, *expected)

    @property
    def bytes(self) -> int:
        """Of the large tensors that a launch reads and writes."""
        tensors = [getattr(self.tensors, "stored" if name == "W" else name) for name in self.launcher.reads]
        flat = [t for tensor in tensors for t in (tensor if isinstance(tensor, tuple) else (tensor,))]
        return sum(t.numel() * t.element_size() for t in [*flat, *self.outputs] if isinstance(t, Tensor))


def _storage(weight: NF4Weight) -> tuple:
    nested = weight.absmax_code, weight.absmax_scale, weight.absmax_offset
    return weight.packed, weight.absmax, *nested, weight.blocksize


def problems(entry: str, M: int, N: int, K: int, device: str) -> list[Problem]:
    """Copies, together more than twice the L2 cache."""
    first = Problem(entry, M, N, K, device)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    return [first, *(Problem(entry, M, N, K, device) for _ in range(2 * l2_bytes // first.bytes))]


@contextmanager
def trying(entry: str, tile: Tile):
    """Every number of tokens takes `tile`."""
    current = TILES[entry]
    TILES[entry] = ((inf, tile),)
    try:
        yield
    finally:
        TILES[entry] = current


def time_us(copies: list[Problem]) -> float:
    """Of one launch, with what it needs out of L2."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            copy.run()
    times_ms = []
    while sum(times_ms) < MIN_TIMED_MS or len(times_ms) < 5:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times_ms) / len(copies)


def times_of(entry: str, tile: Tile, copies_of_layers: list[list[Problem]], timer) -> list[float] | None:
    """For every layer; None for a tile that this GPU cannot run."""
    from triton.runtime.errors import OutOfResources

    with trying(entry, tile):
        try:
            for copies in copies_of_layers:
                copies[0].check()
            return [timer(copies) for copies in copies_of_layers]
        except OutOfResources:
            return None


def best_tile(current: Tile, times: dict[Tile, list[float]]) -> tuple[Tile, float]:
    """The tile to take, and its time as a part of the current one's, averaged over the layers."""
    parts = {
        tile: statistics.geometric_mean([a / b for a, b in zip(found, times[current], strict=True)])
        for tile, found in times.items()
    }
    fastest = min(parts, key=parts.get)
    return (fastest, parts[fastest]) if parts[fastest] <= WORTHWHILE else (current, 1.0)


def tune(entries: list[str], layers: dict[str, tuple[int, int]], device: str, timer=time_us) -> dict[str, Buckets]:
    """TILES with `entries` tuned."""
    table = dict(TILES)
    for entry, buckets in TILES.items():
        if entry not in entries:
            continue
        tuned = []
        for most, current in buckets:
            M = tokens(entry, most)
            copies = [problems(entry, M, *layer, device) for layer in layers.values()]
            times = {}
            for tile in [current, *(t for t in candidates(entry, most) if t != current)]:
                found = times_of(entry, tile, copies, timer)
                if found is not None:
                    times[tile] = found
            best, part = best_tile(current, times)
            tuned.append((most, best))
            microseconds = ", ".join(f"{before:.1f} -> {after:.1f}" for before, after in
                                     zip(times[current], times[best], strict=True))  # fmt: skip
            print(f"{entry}, M = {M}: {current} -> {best}, {part:.3f} of the time ({microseconds} us; "
                  f"{len(times)} tiles ran)", file=sys.stderr, flush=True)  # fmt: skip
        table[entry] = tuple(tuned)
    return table


def text_of(table: dict[str, Buckets]) -> str:
    """The table as tiles.py has it."""
    lines = ["TILES: dict[str, tuple[tuple[float, Tile], ...]] = {"]
    for entry, buckets in table.items():
        cells = [f"({most}, Tile({', '.join(str(v) for v in vars(tile).values())}))" for most, tile in buckets]
        if len(cells) == 1:
            lines.append(f'    "{entry}": ({cells[0]},),')
        else:
            lines += [f'    "{entry}": (', *(f"        {cell}," for cell in cells), "    ),"]
    return "\n".join([*lines, "}", ""])


def _list(entries: list[str]) -> Iterator[str]:
    for entry in entries:
        for most, current in TILES[entry]:
            tiles = candidates(entry, most)
            yield f"{entry}, up to {most} tokens, timed at {tokens(entry, most)}: {current} now, {len(tiles)} to try"
            yield from (f"    {tile}" for tile in tiles)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only entries of TILES that begin like this: lora_linear_fwd, lora_down")
    parser.add_argument("--list", action="store_true", help="print the candidates and time nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there instead")
    options = parser.parse_args(arguments)
    entries = [entry for entry in TILES if entry.startswith(options.op or "")]
    if not entries:
        parser.error(f"no entry begins with {options.op!r}; there are {', '.join(TILES)}")
    if options.list:
        print("\n".join(_list(entries)))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.tune times kernels on a CUDA GPU, and there is none here; --list needs none", file=sys.stderr)
        return 3
    found = describe(torch.device("cuda"))
    source = f"# Timed by benchmarks/tune.py on {found['device']}, torch {found['torch']}, triton {found['triton']}, "
    text = source + found["date"] + "\n" + text_of(tune(entries, SHAPES, "cuda"))
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
