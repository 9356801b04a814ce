"""Mutants of csrc/: copies with one barrier or one wait taken out, or with a wait that waits for one group less."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"

# What orders memory or threads. The votes among them (__syncthreads_or) have a value that is used: they stay.
_SITES = re.compile(r"__syncthreads\(\);|__syncwarp\([^)]*\);|wait_for_dependency\(\);|cp_async_wait<([^<>]+)>\(\);")
# Definitions of what the sites call.
_WRAPPERS = ("ptx.cuh",)


@dataclass(frozen=True)
class Mutant:
    """`source` with the characters from `start` to `end` replaced by `text`."""

    source: Path
    start: int
    end: int
    text: str

    def __str__(self) -> str:
        code = self.source.read_text()
        line = code.count("\n", 0, self.start) + 1
        old = code[self.start : self.end].rstrip(";")
        return f"{self.source.name}:{line}:{old}" + (f" to {self.text.rstrip(';')}" if self.text != ";" else "")

    def write(self, folder: Path) -> Path:
        """A copy of csrc/ in `folder`, spoiled; returns it."""
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        code = self.source.read_text()
        (csrc / self.source.name).write_text(code[: self.start] + self.text + code[self.end :])
        return csrc


def mutants() -> list[Mutant]:
    """Every mutant of every file of csrc/; comments are left alone."""
    sources = sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cuh") and path.name not in _WRAPPERS)
    return [mutant for source in sources for mutant in _mutants_of(source)]


def _mutants_of(source: Path) -> list[Mutant]:
    found = []
    for site in _SITES.finditer(_without_comments(source.read_text())):
        found.append(Mutant(source, *site.span(), ";"))
        if site[1] is not None:
            found.append(Mutant(source, *site.span(), f"cp_async_wait<{site[1]} + 1>();"))
    return found


def _without_comments(code: str) -> str:
    """`code` with blanks where comments are: places stay what they are."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: " " * len(comment[0]), code, flags=re.DOTALL)
