"""Triton kernels executed as compiled, see compiled_triton.py.

Triton decides at its import whether it interprets kernels or compiles them. The tests of tests/ops want the former,
hence a process for the latter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .nvcc import BUILD, ROOT

pytest.importorskip("triton")

pytestmark = pytest.mark.slow


def test_compiled_triton_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(BUILD / "triton")}
    file = Path(__file__).with_name("compiled_triton.py")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", file]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
