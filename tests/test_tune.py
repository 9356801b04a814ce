"""benchmarks/tune.py without a GPU: what it would time is right, and how it chooses."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.triton_kernels import lora_linear as kernels
from fastpeft.triton_kernels import tiles
from fastpeft.triton_kernels.tiles import TILES, Tile

from benchmarks import tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in Triton's interpreter
TINY = {"tiny": (40, 72)}
A, B, C = Tile(16, 64, 64, 4, 2), Tile(16, 128, 64, 4, 2), Tile(16, 256, 64, 4, 2)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "CUDA GPU" in err


def test_it_lists_buckets_and_candidates(capsys):
    assert tune.main(["--list", "--op", "lora_linear_dx"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = [entry for entry in TILES if entry.startswith("lora_linear_dx")]
    assert sum(line.startswith("lora_linear_dx") for line in lines) == sum(len(TILES[entry]) for entry in entries)
    assert f"    {Tile(32, 256, 128, 8, 4)}" in lines
    with pytest.raises(SystemExit):
        tune.main(["--op", "lora_up_up"])


@pytest.mark.parametrize("entry", TILES)
def test_what_is_timed_is_right(entry):
    tune.Problem(entry, 20, 40, 72, DEVICE).check()


def test_wrong_results_stop_it(monkeypatch):
    monkeypatch.setattr(kernels, "lora_down", lambda x, A, seed, p, xa: xa.fill_(1))
    with pytest.raises(AssertionError, match="largest error"):
        tune.Problem("lora_down", 20, 40, 72, DEVICE).check()


def test_the_fastest_over_all_layers_wins():
    times = {A: [10.0, 100.0], B: [12.0, 50.0], C: [8.0, 120.0]}
    best, part = tune.best_tile(A, times)
    assert best == B and part == pytest.approx(math.sqrt(1.2 * 0.5))
    assert tune.best_tile(A, {A: [10.0], B: [9.9]}) == (A, 1.0)  # not worth a change


def test_it_tries_every_candidate_and_changes_what_was_asked_for(monkeypatch, capsys):
    """The timer is told which tile is in use by the table, as the launchers are."""
    from triton.runtime.errors import OutOfResources

    entry, before = "lora_linear_fwd nf4_ragged", dict(TILES)
    monkeypatch.setattr(tune, "candidates", lambda *_: [A, B, C])
    monkeypatch.setattr(tune, "tokens", lambda *_: 17)

    def timer(copies):
        assert isinstance(copies[0], tune.Problem)
        ((_, tile),) = tiles.TILES[entry]
        if tile == C:
            raise OutOfResources(300000, 232448, "shared memory")
        return {A: 3.0, B: 2.0}.get(tile, 4.0)

    table = tune.tune([entry], TINY, DEVICE, timer)
    assert table == {**before, entry: ((math.inf, B),)}
    assert before == TILES
    assert "4.0 -> 2.0 us; 3 tiles ran" in capsys.readouterr().err


def test_what_it_prints_is_the_table():
    text = tune.text_of(TILES)
    assert text in Path(tiles.__file__).read_text()
    namespace = {"Tile": Tile, "inf": math.inf}
    exec(text, namespace)
    assert namespace["TILES"] == TILES
