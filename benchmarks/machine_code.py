"""The machine code of every kernel for every architecture, compiled without a GPU and kept in build/machine_code.

    cuda_kernels(ROOT / "csrc/nf4_merge.cu")   each instance that nvcc compiles, for CUDA_ARCHS
    triton_kernels("nf4", "90a")               each specialization that the launches of launches.py ask for

Both return `Kernel`s. What the compilers wrote is kept under a name that contains the hash of all that went in, so a
change is seen and nothing else is compiled twice; several processes may ask at once.

    python -m benchmarks.machine_code          compiles all and writes RECORD, a row a kernel (`make gates`)

RECORD is committed. `stale` says which sources have changed since, and `compile_sample` compiles a part of it anew.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from math import prod
from pathlib import Path

from benchmarks import launches, sass

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "machine_code"
RECORD = ROOT / "benchmarks" / "machine_code.csv"
_CORES = len(os.sched_getaffinity(0))
SETUP = runpy.run_path(str(ROOT / "setup.py"))  # the flags that users compile with

CUDA_ARCHS = tuple(SETUP["DEFAULT_ARCHS"].split(";"))
# One of each kind of matrix instruction: mma.sync, wgmma, tcgen05, and mma.sync again on the consumer Blackwell.
TRITON_ARCHS = ("80", "90a", "100a", "120a")


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture. Registers and stack are a thread's, shared memory is a CTA's."""

    language: str  # cuda | triton
    file: str
    name: str  # nf4_dequantize_kernel<__nv_bfloat16, true>, or a Triton kernel and what it was specialized on
    arch: str
    threads: int  # of a CTA; CUDA: by __launch_bounds__
    registers: int
    shared_bytes: int  # static and dynamic
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    cases: tuple[str, ...]  # Triton: the cases of launches.py that run it
    symbol: str
    binary: Path

    @property
    def function(self) -> str:
        """The name of the function in the source."""
        return re.match(r"\w+", self.name)[0]

    def sass(self) -> str:
        """The disassembly, one instruction a line."""
        return _disassembly(self.binary, self.arch)[self.symbol]


def cuda_files() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cu"))


def cuda_kernels(source: Path, archs: tuple[str, ...] = CUDA_ARCHS) -> list[Kernel]:
    """Every kernel instance of `source` for each of `archs`, by one run of nvcc with the flags of setup.py.

    Raises RuntimeError without nvcc, when a file does not compile, and for a kernel that says nothing of its threads or
    its dynamic shared memory.
    """
    nvcc = SETUP["find_nvcc"]()
    if nvcc is None:
        raise RuntimeError("nvcc is not installed: put it on PATH or set CUDA_HOME to a CUDA toolkit")
    command = [nvcc, *SETUP["NVCC_FLAGS"], *SETUP["gencode_flags"](list(archs)), "-Xptxas=-v", "-fatbin", str(source)]

    def compile_into(folder: Path) -> None:
        run = subprocess.run([*command, "-o", str(folder / "module.fatbin")], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"nvcc could not compile {source.name}:\n{run.stderr}")
        (folder / "ptxas.log").write_text(run.stderr)

    folder = _kept(source.stem, _cuda_sources(source), [*command[1:-1], nvcc_version()], compile_into)

    binary = folder / "module.fatbin"
    usages = _parse_ptxas((folder / "ptxas.log").read_text())
    if not usages:  # launchers only
        return []
    names = _demangled([usage["symbol"] for usage in usages])
    entries = _ptx_entries(binary)
    kernels = []
    for usage in usages:
        name = names[usage["symbol"]]
        threads, dynamic = entries[usage["symbol"]]
        if threads is None:
            raise RuntimeError(f"{source.name}: {name} needs __launch_bounds__: they limit its registers")
        if dynamic:
            usage["shared_bytes"] += dynamic_shared_bytes(name)
        kernels.append(
            Kernel(language="cuda", file=source.name, name=name, threads=threads, binary=binary, cases=(), **usage)
        )
    return kernels


def triton_kernels(op: str, arch: str, cases: tuple[str, ...] = ()) -> list[Kernel]:
    """Every specialization of the kernels of triton_kernels/<op>.py that the launches of launches.py ask for.

    cases: only these. A process of its own compiles them, since this one may run Triton's interpreter. Raises
    RuntimeError when it fails, and for a case that there is not.
    """

    def compile_into(folder: Path) -> None:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_ALWAYS_COMPILE": "1",  # what comes out of Triton's own cache has no log of ptxas
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "benchmarks.launches", op, arch, str(folder), *cases]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"the Triton kernels of {op} do not compile for sm_{arch}:\n{run.stdout}{run.stderr}")
        shutil.rmtree(folder / "triton")

    options = [version("triton"), version("torch"), *cases]
    folder = _kept(f"{op}-triton-{arch}", _triton_sources(op), options, compile_into)
    kernels = []
    for kept in json.loads((folder / "kernels.json").read_text()):
        (usage,) = _parse_ptxas(kept["log"])
        usage["shared_bytes"] += kept["shared_bytes"]
        usage["arch"] = arch
        kernels.append(
            Kernel(
                language="triton",
                file=f"{op}.py",
                name=kept["name"],
                threads=kept["threads"],
                cases=tuple(kept["cases"]),
                binary=folder / kept["binary"],
                **usage,
            )
        )
    return kernels


@cache
def nvcc_version() -> str:
    """As "13.0.48"; "" where nvcc is not installed."""
    nvcc = SETUP["find_nvcc"]()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else ""


# The record


# What a kernel multiplies and moves with: its matrix products, its accesses of 8 bytes and more, and two that look up.
NOTABLE = r"(HMMA|HGMMA|UTCHMMA|LDSM|LDGSTS|(LDG|STG|LDS)\..*(64|128)|SHFL|PRMT)"
SEPARATOR = "; "  # between cases


def row(kernel: Kernel) -> dict[str, str]:
    """What RECORD has of a kernel. opcodes: those that match NOTABLE, each once. code: a hash of all, in their order.
    sources: a hash of the text of all files that the kernel is compiled from, and of the flags."""
    opcodes = [instruction.opcode for instruction in sass.instructions(kernel.sass())]
    values = {
        "language": kernel.language,
        "file": kernel.file,
        "name": kernel.name,
        "cases": SEPARATOR.join(kernel.cases),
        "arch": kernel.arch,
        "threads": kernel.threads,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
        "stack_bytes": kernel.stack_bytes,
        "spill_store_bytes": kernel.spill_store_bytes,
        "spill_load_bytes": kernel.spill_load_bytes,
        "instructions": len(opcodes),
        "opcodes": " ".join(sorted({opcode for opcode in opcodes if re.match(NOTABLE, opcode)})),
        "code": hashlib.sha256("\n".join(opcodes).encode()).hexdigest()[:8],
        "compiler": compiler(kernel.language),
        "sources": sources_hash(kernel.language, kernel.file),
    }
    return {name: str(value) for name, value in values.items()}


def compiler(language: str) -> str:
    return f"nvcc {nvcc_version()}" if language == "cuda" else f"triton {version('triton')}"


def sources_hash(language: str, file: str) -> str:
    if language == "cuda":
        return _digest(_cuda_sources(ROOT / "csrc" / file), SETUP["NVCC_FLAGS"])
    return _digest(_triton_sources(file.removesuffix(".py")), [])


def key(row: dict[str, str]) -> tuple[str, ...]:
    """What is one of a kind in RECORD."""
    return tuple(row[name] for name in ("language", "file", "name", "arch"))


def rows_of(kernels: list[Kernel]) -> list[dict[str, str]]:
    with ThreadPoolExecutor(_CORES) as pool:  # a process disassembles each binary
        return list(pool.map(row, kernels))


def write_record(kernels: list[Kernel], path: Path) -> None:
    rows = sorted(rows_of(kernels), key=key)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_record(path: Path = RECORD) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stale(rows: list[dict[str, str]]) -> list[str]:
    """The files of `rows` whose sources have changed since, and the Triton ops that `rows` do not have."""
    recorded = {("triton", f"{op}.py"): set() for op in launches.TRITON}
    for row in rows:
        recorded.setdefault((row["language"], row["file"]), set()).add(row["sources"])
    return [" ".join(file) for file, hashes in sorted(recorded.items()) if hashes != {sources_hash(*file)}]


def compile_sample(rows: list[dict[str, str]], share: float, chance: random.Random) -> list[Kernel]:
    """A random `share` of the Triton kernels of `rows`, and of the CUDA files with an architecture; these only where
    nvcc is."""
    triton = [row for row in rows if row["language"] == "triton"]
    cases = defaultdict(set)
    for chosen in chance.sample(triton, round(share * len(triton))):
        cases[chosen["file"].removesuffix(".py"), chosen["arch"]].add(chosen["cases"].split(SEPARATOR)[0])
    jobs = [partial(triton_kernels, op, arch, tuple(sorted(some))) for (op, arch), some in cases.items()]
    cuda = sorted({(row["file"], row["arch"]) for row in rows if row["language"] == "cuda"})
    if SETUP["find_nvcc"]():
        chosen = chance.sample(cuda, round(share * len(cuda)))
        jobs += [partial(cuda_kernels, ROOT / "csrc" / file, (arch,)) for file, arch in chosen]
    return in_parallel(jobs)


def dynamic_shared_bytes(kernel: str) -> int:
    """What the launcher of a kernel instance asks for; RuntimeError where launches.py does not say."""
    for pattern, size in launches.CUDA_DYNAMIC_SHARED_BYTES.items():
        if re.fullmatch(pattern, kernel):
            return size
    raise RuntimeError(f"{kernel} uses dynamic shared memory: write into benchmarks/launches.py how much it asks for")


def compile_all(archs: tuple[str, ...] = CUDA_ARCHS) -> list[Kernel]:
    """Every CUDA kernel for `archs`, and every Triton kernel for those of them that are in TRITON_ARCHS; the CUDA
    kernels only where nvcc is. As many compilers run at a time as there are cores."""
    jobs = [partial(triton_kernels, op, arch) for op in launches.TRITON for arch in archs if arch in TRITON_ARCHS]
    if SETUP["find_nvcc"]():
        jobs += [partial(cuda_kernels, source, archs) for source in cuda_files()]
    return in_parallel(jobs)


def in_parallel(jobs: list[Callable[[], list[Kernel]]]) -> list[Kernel]:
    with ThreadPoolExecutor(_CORES) as pool:
        return [kernel for kernels in pool.map(lambda job: job(), jobs) for kernel in kernels]


def _kept(stem: str, files: list[Path], options: list[str], fill: Callable[[Path], None]) -> Path:
    """A folder of KEPT that `fill` has filled from `files` and `options`, now or in an earlier process."""
    folder = KEPT / f"{stem}-{_digest(files, options)}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits and finds the work done
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(dir=KEPT))
            try:
                fill(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _digest(files: list[Path], options: list[str]) -> str:
    digest = hashlib.sha256("\0".join(options).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _closure(file: Path, pattern: str) -> list[Path]:
    """`file` and what it includes or imports, by the `pattern` that finds names of files of its own folder."""
    found, open_ = {file}, [file]
    while open_:
        for name in re.findall(pattern, open_.pop().read_text(), flags=re.MULTILINE):
            other = file.parent / (name if file.suffix == ".cu" else f"{name}.py")
            if other not in found:
                found.add(other)
                open_.append(other)
    return sorted(found)


def _cuda_sources(source: Path) -> list[Path]:
    return _closure(source, r'^\s*#include "(.+?)"')


def _triton_sources(op: str) -> list[Path]:
    return [*_closure(ROOT / "triton_kernels" / f"{op}.py", r"^from \.(\w+) import"), Path(launches.__file__)]


def _parse_ptxas(log: str) -> list[dict]:
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        log,
        flags=re.DOTALL,
    )
    usages = []
    for symbol, arch, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        usages.append(
            {
                "symbol": symbol,
                "arch": arch,
                "registers": int(registers),
                "shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": int(stack),
                "spill_store_bytes": int(stores),
                "spill_load_bytes": int(loads),
            }
        )
    return usages


def _demangled(symbols: list[str]) -> dict[str, str]:
    """Symbol -> the kernel's name with its template arguments, without namespaces and parameters."""
    run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    plain = re.sub(r"\w+::", "", run.stdout.replace("(anonymous namespace)::", ""))
    return {
        symbol: re.search(r"(\w+_kernel(?:<.*?>)?)\(", line)[1]
        for symbol, line in zip(symbols, plain.splitlines(), strict=True)
    }


def _ptx_entries(fatbin: Path) -> dict[str, tuple[int | None, bool]]:
    """Symbol -> (threads of a CTA by __launch_bounds__, whether its dynamic shared memory is used), from the PTX."""
    ptx = _cuobjdump(["-ptx", str(fatbin)], ".entry")
    dynamic = re.findall(r"\.extern \.shared .*? (\w+)\[\]", ptx)
    entries = {}
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        bounds = re.search(r"\.maxntid ([\d, ]+)", entry)
        threads = prod(int(n) for n in bounds[1].split(",")) if bounds else None
        entries[re.match(r"\w+", entry)[0]] = threads, any(re.search(rf"\b{name}\b", entry) for name in dynamic)
    return entries


@cache
def _disassembly(binary: Path, arch: str) -> dict[str, str]:
    """Symbol -> its lines, kept beside the binary: cuobjdump takes half a second a module."""
    kept = binary.with_suffix(f".{arch}.sass")
    if not kept.exists():
        only = ["-arch", f"sm_{arch}"] if binary.suffix == ".fatbin" else []
        text = re.sub(r"[ \t]*/\* 0x[0-9a-f]{16} \*/", "", _cuobjdump(["-sass", *only, str(binary)], "Function :"))
        with tempfile.NamedTemporaryFile("w", dir=binary.parent, delete=False) as unfinished:
            unfinished.write(text)  # without the encoding
        os.replace(unfinished.name, kept)
    symbol_and_code = re.split(r"Function : (\S+)", kept.read_text())[1:]
    return dict(zip(symbol_and_code[::2], symbol_and_code[1::2], strict=True))


def _cuobjdump(arguments: list[str], expected: str) -> str:
    """What cuobjdump prints: the toolkit's, or the one that Triton brings, for either may be too old for the other."""
    home, triton = os.environ.get("CUDA_HOME"), importlib.util.find_spec("triton")
    folders = [os.path.join(home, "bin") if home else None]
    if triton:
        folders.append(os.path.join(os.path.dirname(triton.origin), "backends", "nvidia", "bin"))
    said = "a CUDA toolkit has cuobjdump, and so has Triton on Linux; none was found"
    for folder in folders:
        if tool := shutil.which("cuobjdump", path=folder):
            run = subprocess.run([tool, *arguments], capture_output=True, text=True)
            if run.returncode == 0 and expected in run.stdout:
                return run.stdout
            said = run.stdout + run.stderr
    raise RuntimeError(f"cuobjdump {' '.join(arguments)}: {said}")


def main() -> None:
    if not SETUP["find_nvcc"]():
        raise SystemExit("nvcc is not installed (PATH, CUDA_HOME): the record has the CUDA kernels too")
    write_record(compile_all(), RECORD)
    print(f"{RECORD.relative_to(ROOT)}: {len(read_record())} kernels, {compiler('cuda')}, {compiler('triton')}")


if __name__ == "__main__":
    main()
