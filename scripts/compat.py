"""The integration tests over the range of dependencies that pyproject.toml allows (`make compat`).

Each row of ENVIRONMENTS is a virtual environment of its own under .compat, resolved by pip and made anew when the row
or the versions it shares with the main environment change. Only torch, with its CUDA packages, is borrowed from the
environment that runs this. The table at the end is red where a test fails, or where a file runs fewer tests (skipped
ones do not count) than in the main environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".compat"

INTEGRATION = ("tests/integrations", "tests/nn/test_adapter_files.py", "tests/nn/test_prefix.py")
# In .ci/run, over the main environment and the oldest one. test_kernels_in_models.py and test_classifier.py are left
# out: they take three quarters of the time, and what they add over `make test` are kernels and shapes, not versions.
QUICK = tuple(
    f"tests/integrations/test_{name}.py"
    for name in (
        "accelerate",
        "adapter_management",
        "ia3_of_peft",
        "loss",
        "peft_dora",
        "prefix_tuning",
        "prompt_tuning",
    )
)
# Compiles all kernels for all architectures, half an hour; Triton 3.6.0's interpreter does not know numpy 2.4.
GATES = tuple(
    f"tests/test_machine_code.py::test_{name}[triton]"
    for name in ("every_kernel_compiles_for_every_architecture", "no_kernel_spills", "shared_memory_fits")
)

# The same versions in every environment as in the main one.
SHARED = ("numpy", "pytest", "pytest-xdist", "hypothesis", "pybind11", "ninja", "setuptools")


@dataclass(frozen=True)
class Environment:
    """`pins` are installed beside SHARED; none means the main environment."""

    name: str
    why: str
    pins: tuple[str, ...] = ()
    tests: tuple[str, ...] = INTEGRATION
    quick: bool = False

    def requirements(self) -> list[str]:
        pinned = {re.split("[=<>]", pin)[0] for pin in self.pins}
        shared = [f"{name}=={metadata.version(name)}" for name in (*SHARED, "triton") if name not in pinned]
        return [*shared, *self.pins, *own_requirements_of_torch()]


MAIN = Environment("main", "requirements.lock: the newest", quick=True)
ENVIRONMENTS = (
    MAIN,
    Environment(
        "oldest",
        "the lower bounds of pyproject.toml; axolotl pins this transformers and peft",
        ("transformers==5.16.1", "peft==0.20.0", "bitsandbytes==0.49.0", "accelerate", "safetensors"),
        quick=True,
    ),
    Environment(
        "past-key-values",
        "the last transformers that calls the cache past_key_values, with the newest peft",
        ("transformers==5.23.0", "peft==0.21.2", "bitsandbytes==0.50.2", "accelerate", "safetensors"),
    ),
    Environment("triton-oldest", "the lower bound: every kernel compiles", ("triton==3.6.0",), GATES),
    Environment("triton-newest", "newer than torch's own: every kernel compiles", ("triton==3.9.0",), GATES),
)


@dataclass
class Result:
    """`ran` counts the tests of each file that passed or failed; `error` says why the tests did not end."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    ran: Counter[str] = field(default_factory=Counter)
    error: str = ""


def is_borrowed(package: str) -> bool:
    return package == "torch" or package.startswith(("nvidia-", "cuda-"))


def own_requirements_of_torch() -> list[str]:
    """What torch needs of other projects. Its Triton is left out: each environment names its own."""
    needed = [line for line in metadata.requires("torch") or [] if "extra ==" not in line]
    names = {line: re.match(r"[\w.-]+", line)[0].lower() for line in needed}
    return [line for line, name in names.items() if not is_borrowed(name) and name not in ("triton", "setuptools")]


def borrow(site_packages: Path, folder: Path) -> None:
    """Links torch into `folder` and puts that on the path of `site_packages`; nothing else is seen."""
    folder.mkdir()
    for distribution in metadata.distributions():
        if is_borrowed(distribution.metadata["Name"].lower()):
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                link = folder / top
                if not link.exists():
                    link.symlink_to(Path(distribution.locate_file(top)).resolve())
    (site_packages / "borrowed.pth").write_text(f"{folder}\n")


def python_of(environment: Environment) -> Path:
    """The interpreter of the environment, which is made if it is not there as it should be.

    Raises:
        subprocess.CalledProcessError: pip cannot resolve it, and has said why.
    """
    if environment is MAIN:
        return Path(sys.executable)
    folder = FOLDER / environment.name
    python, stamp = folder / "bin/python", folder / "made_of.json"
    made_of = [sys.version, metadata.version("torch"), sysconfig.get_path("purelib"), *environment.requirements()]
    if not stamp.exists() or json.loads(stamp.read_text()) != made_of:
        print(f"{environment.name}: making {folder.relative_to(ROOT)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        variables = {"base": str(folder), "platbase": str(folder)}
        borrow(Path(sysconfig.get_path("purelib", "venv", vars=variables)), folder / "borrowed")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *environment.requirements()], check=True)
        stamp.write_text(json.dumps(made_of))
    return python


def versions(python: Path, packages: tuple[str, ...]) -> str:
    """Asked of the environment itself."""
    code = "import sys; from importlib import metadata\nfor p in sys.argv[1:]: print(p, metadata.version(p))"
    run = subprocess.run([python, "-c", code, *packages], cwd=FOLDER, check=True, text=True, stdout=subprocess.PIPE)
    return ", ".join(run.stdout.splitlines())


def read(report: ElementTree.Element) -> Result:
    """A Result out of pytest's junit.xml."""
    result = Result()
    for case in report.iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            result.failed += 1
        elif "skipped" in outcomes:
            result.skipped += 1
            continue
        else:
            result.passed += 1
        result.ran[case.get("classname")] += 1
    return result


def run_tests(python: Path, tests: tuple[str, ...], name: str) -> Result:
    """Runs them in the repository, with pytest's own output on the terminal."""
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", "--tb=short"]
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    env["FASTPEFT_GATES"] = "all"
    status = subprocess.run([*command, f"--junitxml={report}", *tests], cwd=ROOT, env=env).returncode
    result = read(ElementTree.parse(report).getroot()) if report.exists() else Result()
    if status not in (0, 1) or (status == 1 and not result.failed):
        result.error = f"pytest ended with {status}"
    return result


def faults(result: Result, main: Mapping[str, int]) -> list[str]:
    """Why a row is red. `main` counts the tests that ran in the main environment, by file."""
    found = [result.error] if result.error else []
    if result.failed:
        found.append(f"{result.failed} failed")
    if not result.passed:
        found.append("no test passed")
    fewer = {file: count for file, count in main.items() if result.ran[file] < count}
    return found + [f"{file}: {result.ran[file]} ran, {count} in main" for file, count in sorted(fewer.items())]


def table(rows: list[tuple[str, str, Result, list[str]]]) -> str:
    lines = [("environment", "passed", "skipped", "failed", "", "versions")]
    for name, installed, result, wrong in rows:
        counts = (str(result.passed), str(result.skipped), str(result.failed))
        lines.append((name, *counts, "RED" if wrong else "green", installed))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + [f"{name}: {fault}" for name, *_, wrong in rows for fault in wrong])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main and the oldest environment, over fewer files")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[e.name for e in ENVIRONMENTS])
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)

    rows, ran_in_main = [], {}
    for environment in ENVIRONMENTS:
        if environment is not MAIN and arguments.only and environment.name not in arguments.only:
            continue  # the main environment always runs: the others are compared with it
        if arguments.quick and not environment.quick:
            continue
        print(f"\n{environment.name}: {environment.why}", flush=True)
        named = [re.split("[=<>]", pin)[0] for pin in environment.pins] or ["transformers", "peft", "bitsandbytes"]
        try:
            python = python_of(environment)
            installed = versions(python, ("torch", "triton", "numpy", *[name for name in named if name != "triton"]))
            tests = QUICK if arguments.quick else environment.tests
            result = run_tests(python, tests, environment.name)
        except subprocess.CalledProcessError as error:
            installed, result = "not made", Result(error=str(error))
        if environment is MAIN:
            ran_in_main = result.ran
        comparable = ran_in_main if environment.tests == MAIN.tests else {}
        rows.append((environment.name, installed, result, faults(result, comparable)))
    print(f"\n{table(rows)}")
    return int(any(wrong for *_, wrong in rows))


if __name__ == "__main__":
    sys.exit(main())
