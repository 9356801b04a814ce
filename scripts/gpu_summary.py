"""The one page of scripts/gpu_check.sh, from the files that its stages left: python scripts/gpu_summary.py OUT"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.environment import describe
from benchmarks.run import summary

_MOST_FAILURES = 15  # the log has the rest


def stages(out: Path) -> list[str]:
    lines = ["| stage | result | seconds | limit |", "|---|---|---|---|"]
    for line in (out / "stages.tsv").read_text().splitlines():
        name, status, seconds, limit = line.split("\t")
        # 124 and 137 are what timeout says.
        result = {"0": "passed", "124": "ran out of time", "137": "ran out of time"}.get(status, f"FAILED ({status})")
        lines.append(f"| {name} | {result} | {seconds} | {limit} |")
    return lines


def tests(out: Path) -> list[str]:
    try:
        cases = list(ElementTree.parse(out / "junit.xml").iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return [f"No test report: {error}"]
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    lines = [f"{len(cases)} tests, {len(failures)} failed, {skipped} skipped."]
    for case in failures[:_MOST_FAILURES]:
        reason = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = (reason.get("message") or "").strip().splitlines()
        lines.append(f"- `{case.get('classname')}::{case.get('name')}`: {(message or [''])[0][:160]}")
    if len(failures) > _MOST_FAILURES:
        lines.append(f"- and {len(failures) - _MOST_FAILURES} more")
    return lines


def sanitizer(out: Path) -> list[str]:
    lines = []
    for tool in ("memcheck", "racecheck"):
        log = out / f"{tool}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        found = re.findall(r"^=+ (.* SUMMARY:.*)", text, re.M) + re.findall(r"^\d+ (?:passed|failed).*", text, re.M)
        lines.append(f"- {tool}: {'; '.join(found) or 'no report'}")
    return lines


def main() -> None:
    out = Path(sys.argv[1])
    device = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parts = [
        ["# GPU check", "", *(f"- {name}: {value}" for name, value in device.items())],
        stages(out),
        ["## Tests", "", *tests(out)],
        ["## compute-sanitizer", "", *sanitizer(out)],
        ["## Benchmarks", "", "```", summary(out) or "No results.", "```"],
    ]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main()
