"""What a person gets from `pip install`: the package, its Triton kernels under fastpeft, and nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path, path: Path | str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a clean copy of the tree, without the native module."""
    folder = tmp_path_factory.mktemp("wheel")
    clean = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, folder / "tree", ignore=clean)
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run = subprocess.run(
        pip, cwd=folder / "tree", env={**os.environ, "FASTPEFT_BUILD_CUDA": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return next(folder.glob("fastpeft-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fastpeft", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastpeft").rglob("*.py")}
    sources |= {f"fastpeft/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert sources <= set(names)


def test_wheel_without_native_module_fits_any_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_installed_package_imports_away_from_the_repository(installed, tmp_path):
    code = (
        "import fastpeft, fastpeft.triton_kernels\n"
        "from fastpeft import _native\n"
        "print(fastpeft.__file__, fastpeft.triton_kernels.__file__, fastpeft.__version__, _native.cuda, sep='\\n')\n"
        "print(_native.why_absent)\n"
    )
    run = python(code, tmp_path, installed)
    assert run.returncode == 0, run.stderr
    package, kernels, version, cuda, why = run.stdout.splitlines()
    assert Path(package) == installed / "fastpeft/__init__.py"
    assert Path(kernels) == installed / "fastpeft/triton_kernels/__init__.py"
    assert version in next(installed.glob("*.dist-info")).name
    assert cuda == "None"
    assert "FASTPEFT_BUILD_CUDA=1" in why


def test_top_level_triton_kernels_is_not_installed(installed, tmp_path):
    run = python("import triton_kernels", tmp_path, installed)
    assert "ModuleNotFoundError: No module named 'triton_kernels'" in run.stderr


def test_top_level_import_from_the_repository_says_what_to_import():
    run = python("import triton_kernels", ROOT)
    assert "ImportError: import fastpeft.triton_kernels, not triton_kernels" in run.stderr


def test_a_broken_native_module_is_told_apart_from_a_missing_one(installed, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "fastpeft/_cuda.so").write_bytes(b"not a shared library")
    run = python("from fastpeft import _native; print(_native.cuda, _native.why_absent)", tmp_path, site)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("None the native module is built but does not load (")


def test_build_mode_outside_the_allowed_ones_is_refused():
    env = {**os.environ, "FASTPEFT_BUILD_CUDA": "yes"}
    run = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "allowed are auto, 0 and 1" in run.stderr
