"""The backends of a parity test: eager, Triton and CUDA on CPU tensors, and natively where a GPU is.

On a CPU, Triton kernels run in Triton's interpreter and CUDA kernels in the emulation of tests/cuda_emulation; both go
through the same Python as on a GPU. FASTPEFT_EMULATION chooses the build of the emulation: plain (default), race, asan,
or the path of a module that is built already.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from fastpeft import _native
from tests import executed
from tests.cuda_emulation import MODES, Emulation, build

_HOW = {"eager": "eager", "triton": "triton-interpreted", "cuda": "cuda-emulated"}
_ORDERS = ("forward", "reverse", "random")


@dataclass(frozen=True)
class Backend:
    """`name` is what `backend=` takes, `device` where the tensors of the test live."""

    name: str
    device: str

    def __str__(self) -> str:
        return _HOW[self.name] if self.device == "cpu" else f"{self.name}-gpu"


def over(*names: str):
    """Parametrizes a test's `backend`: each of `names` on the CPU, and on a GPU (marked gpu)."""
    cpu = [pytest.param(Backend(name, "cpu"), id=str(Backend(name, "cpu"))) for name in names]
    gpu = [Backend(name, "cuda") for name in names]
    return pytest.mark.parametrize(
        "backend", cpu + [pytest.param(b, id=str(b), marks=pytest.mark.gpu) for b in gpu], indirect=True
    )


@cache
def emulation() -> Emulation:
    wanted = os.environ.get("FASTPEFT_EMULATION", "plain")
    return Emulation(build.module(wanted) if wanted in MODES else Path(wanted))


@pytest.fixture
def backend(request, monkeypatch, _seeded):
    """Makes the backend able to run, and poisons what it allocates: torch.empty gives NaN and largest integers."""
    chosen = request.param
    torch.use_deterministic_algorithms(True)
    try:
        if str(chosen) == "cuda-emulated":
            emulated = emulation()
            seed = torch.initial_seed()
            emulated.configure(order=_ORDERS[seed % len(_ORDERS)], seed=seed % 2**32)
            monkeypatch.setattr(_native, "cuda", emulated.module)
            monkeypatch.setattr(_native, "why_absent", None)
            with executed.emulated(emulated):
                yield chosen
        elif str(chosen) == "triton-interpreted":
            with executed.interpreted():
                yield chosen
        else:
            yield chosen
    finally:
        torch.use_deterministic_algorithms(False)
