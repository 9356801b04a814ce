"""What a figure depends on: device, versions, commit, clocks. Dicts of strings, the first columns of every CSV."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def _output(*command: str) -> str:
    """Standard output; empty where the command fails or does not exist."""
    try:
        result = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> tuple[str, str]:
    """The commit and whether the tree differs from it; FASTPEFT_COMMIT names it where there is no repository."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("FASTPEFT_COMMIT", "unknown")[:12], "unknown"
    changed = _output("git", "status", "--porcelain", "--", "..", ":!results")
    return head, str(bool(changed)).lower()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _nvidia_smi(device: torch.device, *fields: str) -> list[str]:
    """What the driver says of this GPU; empty strings where the tool is missing."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *chosen)
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text else []
    return values if len(values) == len(fields) else [""] * len(fields)


def describe(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = _nvidia_smi(device, "driver_version")[0]
    else:
        name, capability, driver = f"{_cpu_name()}, {torch.get_num_threads()} threads", "", ""
    head, dirty = commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "device": name,
        "capability": capability,
        "driver": driver,
        **{package: _version(package) for package in _PACKAGES},
    }


def clocks(device: torch.device) -> dict[str, str]:
    """MHz of a GPU's multiprocessors and memory now, to be asked right after work; empty on a CPU."""
    sm, memory = _nvidia_smi(device, "clocks.sm", "clocks.mem") if device.type == "cuda" else ("", "")
    return {"sm_mhz": sm, "memory_mhz": memory}


def append_csv(path: Path, row: dict) -> None:
    """Adds `row` to `path`; the header is written with the first row and must be the same ever after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = path.exists()
    if exists:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != list(row):
            raise ValueError(f"{path} has the columns {header}, this row has {list(row)}: move the old file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if not exists:
            writer.writeheader()
        writer.writerow(row)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
