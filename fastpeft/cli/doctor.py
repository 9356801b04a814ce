"""What is installed, which devices there are, and which backends can run here."""

import math
import os
import platform
from importlib import metadata
from pathlib import Path

from fastpeft import expected

PACKAGES = tuple(expected.COVERED)
# Instruction sets that decide how fast 16-bit and 4-bit work is on a CPU.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "bf16", "sve")


def version(package: str) -> str:
    """Reads the metadata, because importing the package to ask it can take seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "fastpeft":  # run from a source tree that is not installed
            import fastpeft

            return fastpeft.__version__
        return "not installed"


def versions() -> dict[str, str]:
    return {"fastpeft": version("fastpeft"), "python": platform.python_version()} | {p: version(p) for p in PACKAGES}


def cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():  # only Linux has it
        return []
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return [flag for flag in CPU_FLAGS if flag in present]
    return []


def devices() -> list[str]:
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        gpus.append(f"cuda:{i} {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if gpus:
        return gpus
    flags = ", ".join(cpu_flags()) or "no known flags"
    return [f"cpu {platform.machine()} ({flags}), {torch.get_num_threads()} threads of {os.cpu_count()} processors"]


def doctor() -> dict:
    """Returns versions: {name: version}, native: reason it is absent or None, devices: [text],
    backends: {name: reason it cannot run here or None}, choices: {op: rows of its decision table}."""
    from fastpeft import _native, backend
    from fastpeft.ops import TABLES

    return {
        "versions": versions(),
        "native": None if _native.cuda is not None else (_native.why_absent or "absent"),
        "devices": devices(),
        "backends": backend.availability(),
        "choices": TABLES,
    }


def choices(op: str, rows):
    """What an op chooses by itself on a GPU: the first row that holds and can run."""
    from rich.table import Table

    result = Table(title=f"{op} on a GPU", title_justify="left")
    for name in ("tokens", "weight", "training", "x", "capability", "backend", "reason", "source"):
        result.add_column(name, overflow="fold")
    for row in rows:
        dtypes = "any" if row.dtypes is None else ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        result.add_row(
            "any" if row.tokens == math.inf else f"up to {row.tokens}",
            row.storage or "any",
            {None: "any", True: "yes", False: "no"}[row.training],
            dtypes,
            "any" if row.capability == (0, 0) else "{}.{} on".format(*row.capability),
            row.backend,
            row.reason,
            row.source,
        )
    return result


def covered(package: str, version: str) -> str:
    """The range of a package's releases that the tests have run with, beside its version."""
    if package not in expected.COVERED or version == "not installed":
        return ""
    outside = "; this one is outside" if expected.uncovered({package: version}) else ""
    return " (tested: {} to {}{})".format(*expected.COVERED[package], outside)


def table(found: dict):
    from rich.markup import escape
    from rich.table import Table

    result = Table(title="fastpeft doctor", show_header=False, title_justify="left")
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, text in found["versions"].items():
        result.add_row(name, text + covered(name, text))
    result.add_section()
    result.add_row("native module", escape(found["native"] and f"absent: {found['native']}" or "present"))
    for text in found["devices"]:
        result.add_row("device", escape(text))
    result.add_section()
    for name, reason in found["backends"].items():
        result.add_row(f"backend {name}", "[green]runs here[/]" if reason is None else f"no: {escape(reason)}")
    return result


def command() -> None:
    """Show versions, devices, which backends can run here (and why not), and what each op chooses on a GPU."""
    from rich.console import Console

    found = doctor()
    console = Console()
    console.print(table(found))
    for op, rows in found["choices"].items():
        console.print(choices(op, rows))
