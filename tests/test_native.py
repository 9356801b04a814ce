"""The native module, as far as a machine without a GPU can tell: it builds, imports without a driver, and fails there
with an error, not a crash. What its machine code must be like stands in test_machine_code.py."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.locked import locked

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))

needs_nvcc = pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="nvcc is not installed (PATH, CUDA_HOME)")


@pytest.fixture(scope="module")
def native_module(tmp_path_factory) -> Path:
    """Built once a run: of several processes of pytest-xdist one builds, and the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the run's; each process has a folder in it
    with locked(folder / "native.lock"):
        if not (folder / "native-built").exists():
            build_native(folder / "native")
            (folder / "native-built").touch()
    return next((folder / "native" / "fastpeft").glob("_cuda*.so"))


def build_native(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}", f"--build-temp={folder / 'objects'}"],
        cwd=ROOT,
        env={**os.environ, "FASTPEFT_BUILD_CUDA": "1", "FASTPEFT_CUDA_ARCHS": "80"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def run_with_module(native_module: Path, code: str) -> str:
    """stdout of `code` in a process without a GPU, in which `cuda` is the module that was just built."""
    load = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('_cuda', {str(native_module)!r})\n"
        "cuda = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cuda)\n"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}  # a machine with a GPU answers as one without
    run = subprocess.run([sys.executable, "-c", load + code], env=hidden, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_nvcc
def test_device_count_and_versions_answer_without_a_gpu(native_module):
    out = run_with_module(native_module, "print(*cuda.device_count()); print(cuda.versions()['archs'])")
    (count, code, name), (archs,) = (line.split() for line in out.splitlines())
    assert count == "0"
    assert int(code) != 0
    assert name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")
    assert archs == "80"


LAUNCH = "cuda.nf4_dequantize(cuda.Nf4Storage.plain(16, 16, {blocksize}), 16, cuda.DType.bf16, {numel}, 0)\n"
REPORT = "try:\n    {launch}except RuntimeError as error:\n    print(error)\n"


@needs_nvcc
def test_a_launch_without_a_gpu_raises_and_names_the_op(native_module):
    out = run_with_module(native_module, REPORT.format(launch=LAUNCH.format(blocksize=64, numel=64)))
    assert re.match(r"nf4_dequantize: cudaError(InsufficientDriver|NoDevice) \(", out)


@needs_nvcc
@pytest.mark.parametrize("blocksize", [0, 16, 96])
def test_a_blocksize_that_is_none_is_refused_before_the_launch(native_module, blocksize):
    out = run_with_module(native_module, REPORT.format(launch=LAUNCH.format(blocksize=blocksize, numel=64)))
    assert out.startswith("nf4_dequantize: cudaErrorInvalidValue")


@needs_nvcc
def test_an_empty_weight_launches_nothing(native_module):
    assert run_with_module(native_module, LAUNCH.format(blocksize=64, numel=0)) == ""


def test_a_missing_toolkit_is_an_error_where_the_module_is_demanded(tmp_path):
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "FASTPEFT_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "needs nvcc" in run.stderr
