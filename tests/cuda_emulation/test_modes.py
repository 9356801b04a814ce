"""The tests of the ops pass in the other builds too: with the race checker, and with the sanitizers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import build

pytestmark = [pytest.mark.slow, pytest.mark.sampled]

ROOT = Path(__file__).parents[2]
# Those whose fixture `backend` (tests/backends.py) has the CUDA kernels.
FILES = [
    path.name
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    if re.search(r'\bover\([^)]*"cuda"', path.read_text())
]


@pytest.mark.parametrize("mode", ("race", "asan"))
@pytest.mark.parametrize("file", FILES)
def test_ops_pass_in_mode(file, mode):
    build.module(mode)
    environment = {**os.environ, "FASTPEFT_EMULATION": mode}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    if mode == "asan":
        environment |= build.asan_environment()
    tests = [f"tests/ops/{file}", "-k", "cuda-emulated"]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
