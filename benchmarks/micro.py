"""The command line of an op's benchmark: python -m benchmarks.<op> [--suite quick] [--device cuda] [--out CSV]"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, append_csv, clocks, describe
from benchmarks.harness import SMOKE, TIMINGS, Absent, Case, Device, WrongResult, ceilings, measure
from benchmarks.shapes import DEVICES, SUITES

Cases = Callable[[str, torch.device], Iterator[Case]]


def require_backend(call: Callable[[], object]) -> None:
    """Turns the refusal of a backend that was asked for by name into Absent."""
    try:
        with torch.no_grad():
            call()
    except ValueError as refusal:
        if "backend" not in str(refusal):
            raise
        raise Absent(str(refusal)) from refusal


def add_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=out, metavar="CSV")


def main(op: str, cases: Cases, argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=f"Times {op} against its baselines, parity checked first.")
    add_arguments(parser, RESULTS / f"{op}.csv")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="fastpeft and the sides that begin so; names unsloth "
                        "too, which is left out otherwise since it patches the other packages")  # fmt: skip
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = Device(torch.device(args.device))
    timing = SMOKE if args.suite == "smoke" else TIMINGS[args.device]
    environment = describe(device.device)
    ceiling = ceilings(device, timing)
    print(f"{op} on {environment['device']}, commit {environment['commit']}: copy {ceiling.copy_bytes_per_s / 1e9:.4g} "
          f"GB/s, bf16 matrix product {ceiling.matmul_ops_per_s / 1e12:.4g} TFLOP/s")  # fmt: skip
    failed = []
    for case in cases(args.suite, device.device):
        case = _chosen(case, args.only)
        try:
            rows = measure(case, device, timing, ceiling)
        except Exception as error:
            failed.append(case.title)
            reason = f"wrong result: {error}" if isinstance(error, WrongResult) else traceback.format_exc()
            print(f"\nNOT TIMED: {case.title}: {reason}", flush=True)
            continue
        finally:
            torch.compiler.reset()  # torch.compile gives up on a function of too many shapes
            if device.is_cuda:
                torch.cuda.empty_cache()
        state = clocks(device.device)
        for row in rows:
            append_csv(args.out, environment | state | {"op": op, "suite": args.suite} | row)
        _show(case, rows)
    if failed:
        sys.exit(f"{len(failed)} cases were not timed: {'; '.join(failed)}")


def _chosen(case: Case, only: list[str] | None) -> Case:
    ours, *others = case.sides
    if only is None:
        kept = [side for side in others if side.name != "unsloth"]
    else:
        kept = [side for side in others if side.name.startswith(tuple(only))]
    return Case(case.labels, case.inputs, [ours, *kept], case.formula, case.cost)


def _show(case: Case, rows: list[dict]) -> None:
    print(f"\n{case.title}")
    for row in rows:
        if row["ms_p50"] == "":
            print(f"  {row['side']:<32} {row['note']}")
            continue
        note = f"  ({row['note']})" if row["note"] else ""
        print(f"  {row['side']:<32} {row['ms_p50']:>9.4g} ms  {row['ms_p20']:.4g} to {row['ms_p80']:.4g}"
              f"   {row['fraction']:>4.0%} of the roofline   fastpeft is {row['ratio']:.2f} times as fast"
              f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}){note}")  # fmt: skip
    sys.stdout.flush()
