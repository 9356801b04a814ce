"""Launch configurations, as data: nothing is tuned while a user waits.

`python -m benchmarks.tune` times other tiles of lora_linear on a GPU and prints TILES anew. Not timed yet: chosen for
few instructions an element, no spills and at most 99 kB of shared memory, as compiled for sm_80 to sm_120.
"""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Tile:
    """A program makes `rows` x `columns` of the output and sums `depth` products a step, `stages` steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Launcher and kind of weight -> (up to M tokens, tile), ascending. Kinds of NF4, see `weight_kind` in lora_linear.py.
TILES: dict[str, tuple[tuple[float, Tile], ...]] = {
    "lora_linear_fwd nf4": (
        (16, Tile(16, 128, 64, 4, 4)),
        (32, Tile(32, 128, 64, 4, 4)),
        (64, Tile(64, 128, 64, 4, 3)),
        (inf, Tile(128, 128, 64, 8, 3)),
    ),
    "lora_linear_fwd nf4_ragged": ((inf, Tile(64, 64, 64, 8, 3)),),
    "lora_linear_fwd dense": (
        (16, Tile(16, 128, 64, 4, 4)),
        (32, Tile(32, 128, 64, 4, 4)),
        (64, Tile(64, 128, 64, 4, 4)),
        (inf, Tile(128, 128, 64, 8, 3)),
    ),
    "lora_linear_dx nf4": (
        (16, Tile(16, 128, 64, 4, 4)),
        (32, Tile(32, 128, 64, 4, 4)),
        (64, Tile(64, 128, 64, 4, 3)),
        (inf, Tile(128, 128, 64, 8, 3)),
    ),
    "lora_linear_dx nf4_ragged": ((inf, Tile(64, 64, 64, 8, 3)),),
    "lora_linear_dx dense": (
        (16, Tile(16, 128, 64, 4, 4)),
        (32, Tile(32, 128, 64, 4, 4)),
        (64, Tile(64, 128, 64, 4, 4)),
        (inf, Tile(128, 128, 64, 8, 3)),
    ),
    "lora_down": (
        (16, Tile(16, 64, 64, 4, 4)),
        (32, Tile(32, 64, 64, 4, 4)),
        (inf, Tile(128, 64, 64, 8, 3)),
    ),
    "lora_down_grad": ((inf, Tile(64, 128, 64, 8, 3)),),
    "lora_up_grad": ((inf, Tile(32, 256, 64, 8, 2)),),
}


def tile_of(launcher, M):
    return next(tile for most, tile in TILES[launcher] if most >= M)


# Launcher -> (up to head size D, tile), ascending. A program has `rows` queries (dkv: keys), the columns are those of a
# head, and a step takes `depth` keys (dkv: queries). "few": up to 16 queries of a sequence.
ATTENTION_TILES: dict[str, tuple[tuple[int, Tile], ...]] = {
    "prefix_attention_fwd": (
        (64, Tile(128, 64, 32, 8, 2)),
        (128, Tile(64, 128, 64, 8, 2)),
        (256, Tile(64, 256, 32, 8, 2)),
    ),
    "prefix_attention_fwd few": (
        (64, Tile(16, 64, 64, 4, 3)),
        (128, Tile(16, 128, 64, 4, 2)),
        (256, Tile(16, 256, 32, 4, 2)),
    ),
    "prefix_attention_dq": (
        (64, Tile(128, 64, 32, 8, 2)),
        (128, Tile(64, 128, 32, 8, 2)),
        (256, Tile(64, 256, 16, 8, 2)),
    ),
    "prefix_attention_dkv": (
        (64, Tile(128, 64, 32, 8, 2)),
        (128, Tile(64, 128, 16, 8, 2)),
        (256, Tile(32, 256, 32, 8, 2)),
    ),
}


def attention_tile_of(launcher, D):
    return next(tile for most, tile in ATTENTION_TILES[launcher] if most >= D)
