"""What a figure depends on: device, versions, commit. One dict of strings, the first columns of every CSV."""

from __future__ import annotations

import csv
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()


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


def describe(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": str(bool(_git("status", "--porcelain", "--", "..", ":!results"))).lower(),
        "device": name,
        **{package: _version(package) for package in _PACKAGES},
    }


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
