"""Resolves requirements.lock anew from pyproject.toml and prints what moved (`make upgrade`).

uv resolves for every Python and platform at once and downloads no wheels for it. The file is a list of constraints
(`pip install -c`): it installs nothing by itself, so the CUDA packages in it, which torch's wheel on the package index
asks for, do no harm to a CPU build of torch. It names no index and no build of torch: the machine's pip chooses both.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = (
    "# Made by `make upgrade`, not by hand: what `make` installs. For every Python from 3.10 on, Linux and macOS.\n"
)
LINE = re.compile(r"([a-z0-9-]+)==(\S+)( ; .*)?")


def versions(lock: str) -> dict[str, list[str]]:
    """The versions of each package, several where they depend on the Python or the platform.

    Raises:
        ValueError: a line that is not `name==version ; marker`, such as an index, a path, or a build tag (`+cpu`).
    """
    found: dict[str, list[str]] = {}
    for line in lock.splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None or "+" in match[2]:
            raise ValueError(f"requirements.lock: {line!r} is not 'name==version ; marker' without a build tag")
        found.setdefault(match[1], []).append(match[2])
    return found


def moved(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[str]:
    """One line for each package whose versions differ, `-` where there is none."""
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return [f"{name} {', '.join(old.get(name, '-'))} -> {', '.join(new.get(name, '-'))}" for name in changed]


def resolve(torch: str) -> str:
    command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.10"]
    command += ["--no-python-downloads", "--no-annotate", "--no-header", "--constraints", "-"]
    command += [f"--extra={extra}" for extra in ("hf", "train", "test")]
    run = subprocess.run(command, cwd=ROOT, input=torch, text=True, stdout=subprocess.PIPE)
    if run.returncode:  # uv has said why
        raise SystemExit(run.returncode)
    return HEADER + run.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="the one version that does not move by itself: torch==2.13.0")
    new = resolve(parser.parse_args().torch)
    old = versions(LOCK.read_text()) if LOCK.exists() else {}
    lines = moved(old, versions(new))
    LOCK.write_text(new)
    print("\n".join(lines) or "nothing moved")


if __name__ == "__main__":
    main()
