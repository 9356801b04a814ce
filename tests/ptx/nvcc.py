"""CUDA C++ -> PTX, with the project's own compiler flags."""

from __future__ import annotations

import functools
import hashlib
import os
import runpy
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.locked import locked

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "ptx"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
ARCHS = SETUP["DEFAULT_ARCHS"].split(";")

# A test for each architecture: in `make test` the oldest, the newest, and of the others a sample.
each_arch = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[pytest.mark.sampled] * (arch not in (ARCHS[0], ARCHS[-1]))) for arch in ARCHS]
)
needs_nvcc = pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="nvcc is not installed (PATH, CUDA_HOME)")


def ptx_of(source: Path | str, arch: str, includes: Iterable[Path] = (CSRC,)) -> str:
    """The PTX of a .cu file, or of a source text, for an architecture such as "90a"."""
    includes = list(includes)
    headers = sorted(path for folder in includes for path in folder.glob("*.*h"))
    flags = [*SETUP["NVCC_FLAGS"], f"-arch=sm_{arch}", "-ptx"]
    text = source.read_text() if isinstance(source, Path) else source
    key = [str(source), text, *flags, nvcc_version(), *(f"{path.name}\n{path.read_text()}" for path in headers)]

    def build(folder: Path) -> None:
        file = source
        if isinstance(source, str):
            file = folder / "text.cu"
            file.write_text(source)
        includes_flags = [f"-I{include}" for include in includes]
        run_compiler([SETUP["find_nvcc"](), *flags, *includes_flags, file, "-o", folder / "out"])

    return cached(f"{source.stem if isinstance(source, Path) else 'text'}-{arch}.ptx", key, build).read_text()


def cached(name: str, key: Iterable[str], build) -> Path:
    """BUILD/<hash of key>-name, made by `build(folder)` as folder/"out" unless it is there. Of several processes one
    builds and the others wait."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    path = BUILD / f"{digest}-{name}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / f"{digest}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                build(Path(folder))
                os.replace(Path(folder) / "out", path)
    return path


def run_compiler(command: list) -> None:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}")


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([SETUP["find_nvcc"](), "--version"], capture_output=True, text=True, check=True).stdout
