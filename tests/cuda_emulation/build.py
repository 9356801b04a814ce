"""Compiles csrc/ with g++ into a Python module whose kernels run on the CPU.

Objects and modules are kept in build/emulation under a hash of all that they are made of, so a second call compiles
nothing, and after a change of one .cu only that is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.locked import locked

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "emulation"
KEEP_DAYS = 7  # in the cache, after the last use
HEADERS = (".h", ".cuh", ".hpp")

COMMON = [
    "-std=c++20",  # std::source_location
    "-fPIC",
    "-fvisibility=hidden",  # every module has an engine of its own
    "-fno-strict-aliasing",  # kernels read uint4 from float arrays, as nvcc allows
    "-ffp-contract=off",
    "-DCUDA_EMULATION",
]
HOST = ["-O0", "-w"]  # bindings: compile time is all that counts
ENGINE = ["-O2", "-g", "-Wall", "-Wextra"]
KERNEL = [
    "-g1",  # lines for messages; with variables, templates take twice the time to compile
    "-Wall",
    "-Wno-unknown-pragmas",  # unroll
    "-fno-ipa-icf",  # two kernels with the same code stay two
    "-fno-sanitize-recover=all",
    "-fsanitize-coverage=trace-pc",  # engine/scheduler.cpp: where threads lose their turn
    "-ftrivial-auto-var-init=pattern",  # registers start as garbage, too
    # Tests need not be told "may be used uninitialized" by the optimizer of another target.
    "-Wno-maybe-uninitialized",
]
# How kernels are compiled, and which part of the engine answers the compiler's checks.
MODES = {
    "plain": (["-O2", "-fsanitize=alignment,null,bounds,shift,integer-divide-by-zero"], []),
    "race": (
        [
            "-O1",
            "-fsanitize=thread,alignment,null",
            "--param=tsan-instrument-func-entry-exit=0",
            "--param=tsan-distinguish-volatile=1",
            "-fno-threadsafe-statics",  # else a launcher's static calls for more of the runtime
        ],
        ["race.cpp"],
    ),
    "asan": (
        [
            "-O1",
            "-fsanitize=address,undefined",
            "-fno-sanitize=vptr",  # needs libubsan
            "--param=asan-instrumentation-with-call-threshold=1000000",  # always inline: our __asan_report_* is called
        ],
        ["asan.cpp"],
    ),
    "debug": (["-O0", "-g3", "-fsanitize=alignment,bounds"], []),
}


def module(mode: str = "plain", csrc: Path = ROOT / "csrc") -> Path:
    """The Python module `_cuda` of the folder `csrc`, built if it is not there.

    mode: plain, race (unsynchronized accesses are errors), asan (accesses outside of an allocation, undefined
        behaviour; the process must preload libasan: `asan_environment`) or debug (not optimized, for gdb)
    Raises RuntimeError with the compiler's words if that fails.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(MODES)}")
    csrc = Path(csrc).resolve()
    kernel_flags, checkers = MODES[mode]
    cuda = [f"-I{HERE / 'include'}", *cuda_include_flags()]
    # The tests of the emulation have folders of kernels that use the headers of csrc; a copy of csrc has its own.
    folders = [csrc] if (csrc / "common.cuh").exists() else [csrc, ROOT / "csrc"]
    include = [*(f"-I{folder}" for folder in folders), *cuda]
    python = [f"-I{_pybind11_include()}", f"-I{sysconfig.get_path('include')}", '-DFASTPEFT_CUDA_ARCHS="emulation"']
    kernels, host = sorted(csrc.glob("*.cu")), sorted(csrc.glob("*.cpp"))
    engine = [HERE / "engine" / name for name in sorted(_engine_files()) + checkers]
    engine_headers = _hash_of(_headers_in(HERE))
    headers = _hash_of(_headers_in(*folders, HERE / "include"))
    # The engine comes first: of an inline function that several objects hold the linker takes the first, and the engine
    # must not run one that is instrumented.
    jobs = [
        *((source, engine_headers, [*COMMON, *ENGINE, *cuda]) for source in engine),
        *((source, headers, [*COMMON, *KERNEL, *kernel_flags, *include]) for source in kernels),
        *((source, headers, [*COMMON, *HOST, *include, *python]) for source in host),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    key = _hash(path.name for path in objects)
    return _made(
        CACHE / f"{mode}-{key}" / "_cuda.so",
        lambda out: _run(["g++", "-shared", "-Wl,-z,now", *map(str, objects), "-o", str(out), "-ldl"], ROOT),
    )


def asan_environment() -> dict[str, str]:
    """What a process needs in its environment to load a module of the asan mode."""

    def library(name: str) -> str:
        return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()

    # libasan looks for the C++ library when it starts, and Python brings none.
    preload = f"{library('libasan.so')} {library('libstdc++.so')}"
    return {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}  # Python never frees all it allocates


def cuda_include_flags() -> list[str]:
    """-isystem flags for NVIDIA's headers: those of nvcc's toolkit, or else of the packages from PyPI."""
    folders = _toolkit_include() or _packaged_include()
    if not folders:
        raise RuntimeError(
            "the emulation of CUDA needs NVIDIA's headers: install a CUDA toolkit (nvcc on PATH or under CUDA_HOME), "
            "or `pip install cuda-toolkit[cccl,crt,cudart]`"
        )
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


@functools.cache
def _toolkit_include() -> list[Path]:
    nvcc = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
    if nvcc is None:
        return []
    # nvcc may be a wrapper elsewhere; it says itself where its toolkit is, even if the file does not exist.
    said = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, flags=re.MULTILINE)
    include = Path(top.group(1)) / "include" if top else None
    return [include, include / "cccl"] if include and (include / "cuda_fp16.h").exists() else []


def _packaged_include() -> list[Path]:
    for site_packages in map(Path, sys.path):
        for include in sorted(site_packages.glob("nvidia/cu*/include"), reverse=True):
            if (include / "cuda_fp16.h").exists() and (include / "crt").is_dir():
                return [include, include / "cccl"]
    return []


def _pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def _engine_files() -> list[str]:
    optional = {name for _, checkers in MODES.values() for name in checkers}
    return [path.name for path in (HERE / "engine").glob("*.cpp") if path.name not in optional]


def _headers_in(*folders: Path) -> list[Path]:
    # Folder by folder: where they lie must not change the order.
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in HEADERS]


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _hash_of(files: list[Path]) -> str:
    return _hash(part for path in files for part in (path.name, path.read_text()))


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _object(source: Path, headers: str, flags: list[str]) -> Path:
    """Compiles in the folder above the source's, so that errors and debuggers say csrc/x.cu, wherever csrc lies."""
    folder, name = source.parent.parent, f"{source.parent.name}/{source.name}"
    flags = [flag.replace(f"-I{source.parent}", f"-I{source.parent.name}") for flag in flags]
    key = _hash([_compiler(), name, source.read_text(), headers, *flags])
    command = ["g++", *flags, f"-fdebug-prefix-map={folder}=.", "-x", "c++", "-c", name, "-o"]
    return _made(CACHE / "objects" / f"{source.stem}-{key}.o", lambda out: _run([*command, str(out)], folder))


def _run(command: list[str], folder: Path) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
    if run.stderr:
        print(run.stderr, file=sys.stderr)


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by one of all processes that want it; the others wait. Whoever sees it sees it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part")
            make(part)
            part.rename(path)
            _forget_old()
        os.utime(path)
    return path


def _forget_old() -> None:
    """Deletes what no build has asked for in KEEP_DAYS."""
    limit = time.time() - KEEP_DAYS * 24 * 3600
    for path in CACHE.glob("*/*"):
        with suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < limit:
                path.unlink()
