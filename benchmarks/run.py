"""Runs benchmarks one after the other, each in a process of its own, and prints a table.

    python -m benchmarks.run [--ops lora_linear nf4 step ...] [--suite smoke|quick|full] [--device D] [--out DIR]

Every benchmark is a module that writes DIR/<name>.csv; the results of an earlier run in DIR are kept and added to. A
benchmark that fails is named at the end, and the others run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, read_csv
from benchmarks.models import METHODS
from benchmarks.shapes import DEVICES, SUITES


def _modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


_HERE = Path(__file__).parent
# An op has the same name everywhere: those that have a benchmark and a formula.
OPS = sorted(_modules(_HERE) & _modules(_HERE.parent / "fastpeft" / "reference"))
_FIRST = ["lora_linear", "step", "nf4", "decode", "memory"]  # what matters most, in case time runs out
EVERY = _FIRST + [op for op in OPS if op not in _FIRST]

Commands = list[list[str]]


def _of_ops(op: str, suite: str) -> Commands:
    command = [op, "--suite", suite]
    if op == "lora_linear" and suite == "full" and find_spec("unsloth") is not None:
        return [command, [*command, "--only", "unsloth"]]  # it patches what the others are measured against
    return [command]


def _end_to_end(name: str, suite: str, device: str) -> Commands:
    """One command a method and model."""
    if suite == "smoke":
        few = {"step": ["--repeats", "2"], "decode": ["--repeats", "2", "--new", "2"], "memory": []}[name]
        small = ["--model", "smoke"] + (["--batch", "1", "--seq", "16"] if name != "decode" else [])
        return [[name, "--method", "lora", *small, *few]]
    methods = [method for method in METHODS if method[0] != "q" or find_spec("bitsandbytes") is not None]
    if device == "cpu":
        # Half a minute a method: a third of the layers, or DoRA of stock peft would fill it with three pairs.
        third = ["--layers", "10", "--batch", "1", "--seconds", "15"]
        few = {"step": third, "decode": ["--seconds", "15", "--new", "8"], "memory": []}
        return [[name, "--method", method, *few[name]] for method in methods]
    llama = ["--model", "Llama-3-8B"]
    if name == "memory":
        chosen = methods if suite == "full" else [method for method in methods if method.endswith("lora")]
        return [[name, "--method", method, *llama, "--batch", "1", "--seq", "2048"] for method in chosen]
    if name == "decode":
        quick = [["qlora", *llama, "--seconds", "10"]]
        full = [[method, *model, "--batch", batch] for method in methods for model in (llama, []) for batch in "18"]
        return [[name, "--method", *rest] for rest in (quick if suite == "quick" else full) if rest[0] in methods]
    sized = [*llama, "--batch", "4", "--seq", "2048", "--checkpointing", "--seconds", "20"]
    small = ["--batch", "8", "--seq", "1024", "--seconds", "10"]
    quick = [["qlora", *sized]] if "qlora" in methods else [["lora", *sized]]
    # peft refuses prefix tuning with checkpointing: a shorter batch without it.
    unchecked = [*llama, "--batch", "1", "--seq", "2048", "--seconds", "20"]
    full = [[method, *(unchecked if method == "prefix" else sized)] for method in methods]
    full += [[method, *small] for method in methods]
    return [[name, "--method", *rest] for rest in (quick if suite == "quick" else full) if rest[0] in methods]


def commands(names: list[str], suite: str, device: str) -> Commands:
    """Arguments after `python -m benchmarks.`, in the order in which they run."""
    found = []
    for name in names:
        found += _of_ops(name, suite) if name in OPS else _end_to_end(name, suite, device)
    return found


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def summary(folder: Path, since: str = "") -> str:
    """The end-to-end results that were written at `since` (an ISO date) or later, and fastpeft's rows of the ops."""
    parts = []
    for name, unit in (("step", "ms"), ("decode", "tokens_per_s")):
        rows = _new_rows(folder / f"{name}.csv", since)
        if rows:
            header = [name, "method", "layers", "tokens", f"peft {unit}", f"fastpeft {unit}", "ratio", "p20 to p80",
                      "processor", "fused"]  # fmt: skip
            parts.append(_table([header, *(_pairs_line(row, unit) for row in rows)]))
    rows = _new_rows(folder / "memory.csv", since)
    if rows:
        columns = [f"{side}_{what}_bytes_per_layer" for what in ("saved", "peak") for side in ("peft", "fastpeft")]
        header = ["MiB a layer", "method", "tokens", "saved: peft", "fastpeft", "peak: peft", "fastpeft"]
        lines = [[row["model"], row["method"], row["tokens"], *(f"{int(row[c]) / 2**20:.2f}" for c in columns)]
                 for row in rows]  # fmt: skip
        parts.append(_table([header, *lines]))
    for op in OPS:
        rows = [row for row in _new_rows(folder / f"{op}.csv", since) if row["ms_p50"]]
        if rows:
            keys = list(rows[0])
            labels = keys[keys.index("suite") + 1 : keys.index("side")]
            header = [*labels, "side", "ms", "roofline", "fastpeft's lead", "p20 to p80"]
            lines = [
                [*(row[label] for label in labels), row["side"], row["ms_p50"], f"{float(row['fraction']):.0%}",
                 row["ratio"], f"{row['ratio_p20']} to {row['ratio_p80']}"]
                for row in rows
            ]  # fmt: skip
            parts.append(f"{op}\n" + _table([header, *lines]))
    return "\n\n".join(parts)


def _pairs_line(row: dict[str, str], unit: str) -> list[str]:
    tokens = row.get("tokens") or f"{row['batch']}x{row['new']}"
    times = [row[f"{side}_{unit}"] for side in ("peft", "fastpeft")]
    fused = row["fused"].partition(" adapter")[0]
    spread = f"{row['ratio_p20']} to {row['ratio_p80']}"
    return [
        row["model"],
        row["method"],
        row["layers"],
        tokens,
        *times,
        row["ratio"],
        spread,
        row["processor_ratio"],
        fused,
    ]


def _new_rows(path: Path, since: str) -> list[dict[str, str]]:
    return [row for row in read_csv(path) if row["date"] >= since] if path.exists() else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=EVERY, default=EVERY, metavar="NAME", help=", ".join(EVERY))
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(argv)
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    failed = []
    for name, *arguments in commands(args.ops, args.suite, args.device):
        print(f"\n== {name} {' '.join(arguments)}", flush=True)
        out = ["--device", args.device, "--out", str(args.out / f"{name}.csv")]
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments, *out]).returncode != 0:
            failed.append(f"{name} {' '.join(arguments)}")
    print(f"\n{summary(args.out, since)}")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
