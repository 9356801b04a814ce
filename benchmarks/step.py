"""The training step of a peft model with and without `fastpeft.accelerate`, taking turns in one process.

    python -m benchmarks.step --method qlora [--model Llama-3-8B --batch 4 --seq 2048 --checkpointing]

A step is forward with loss and backward, `--accumulation` times, then AdamW and zero_grad. The default is the shape of
SmolLM2-135M with random weights and 2 x 256 tokens. Loss and gradients of both sides are compared before anything is
timed. The order of the sides is reversed from pair to pair, and a ratio is formed within a pair. On a CPU there is a
ratio of processor time too: where others compute on the same machine, the wall clock measures them as well.

With `--frozen` the same dense model without an adapter takes its turn too, stock and in a model of its own. Its
embeddings ask for a gradient, so that it is computed through all layers as with an adapter: what the other two take
longer is the price of the adapter.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.environment import RESULTS, append_csv, clocks, describe
from benchmarks.harness import Device, quantile
from benchmarks.models import DTYPES, METHODS, SHAPES, SIDES, build, check_gradients, frozen, fused, other
from benchmarks.shapes import DEVICES

_FEWEST_PAIRS = 3
FROZEN = "frozen"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="lora")
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--accumulation", type=int, default=1, help="forwards and backwards of a step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each decoder layer in backward")
    parser.add_argument("--frozen", action="store_true", help="time the model without an adapter too")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps a side")
    parser.add_argument("--seconds", type=float, help=f"stop after so long, with {_FEWEST_PAIRS} pairs or more")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv", metavar="CSV")
    return parser.parse_args(argv)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=SHAPES, default="SmolLM2-135M", help="whose shape; weights are random")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--hidden", type=int, help="instead of the model's: a multiple of 192, whose heads of 64 share "
                        "keys by threes")  # fmt: skip
    parser.add_argument("--vocab", type=int, help="instead of the model's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the base model")


def shape_of(args: argparse.Namespace):
    shape = SHAPES[args.model]
    if args.hidden:
        heads = args.hidden // 64
        shape = dataclasses.replace(shape, hidden=args.hidden, intermediate=args.hidden * 8 // 3, heads=heads,
                                    kv_heads=heads // 3)  # fmt: skip
    return dataclasses.replace(shape, layers=args.layers or shape.layers, vocab=args.vocab or shape.vocab)


class Step:
    """One optimizer, one batch; calling it runs a step."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor, accumulation: int):
        self.model, self.tokens, self.accumulation = model, tokens, accumulation
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The Trainer's default. A frozen model has nothing to optimize.
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True) if parameters else None

    def __call__(self) -> None:
        for _ in range(self.accumulation):
            self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Of each of SIDES: seconds and processor seconds of a run, a value a pair, and the peak of allocated bytes. Of
    the frozen model, where there is one, seconds.

    On a CPU the peak is unknown (None); on a GPU processor time is the host's, and says nothing.
    """

    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]
    peak_bytes: dict[str, int | None]

    def columns(self, tokens: int) -> dict:
        """Of a CSV row. tokens: of one run."""
        median = {side: quantile(values, 0.5) for side, values in self.seconds.items()}
        pairs = _ratios(self.seconds)
        on_cpu = None in self.peak_bytes.values()
        of_frozen = {side: "" for side in SIDES}
        if FROZEN in self.seconds:
            of_frozen = {side: round(quantile(_ratios(self.seconds, side, FROZEN), 0.5), 3) for side in SIDES}
        return {
            "repeats": len(pairs),
            **{f"{side}_ms": round(1e3 * median[side], 1) for side in SIDES},
            "ratio": round(quantile(pairs, 0.5), 3),
            "ratio_p20": round(quantile(pairs, 0.2), 3),
            "ratio_p80": round(quantile(pairs, 0.8), 3),
            "processor_ratio": round(quantile(_ratios(self.processor), 0.5), 3) if on_cpu else "",
            "frozen_ms": round(1e3 * median[FROZEN], 1) if FROZEN in median else "",
            **{f"{side}_to_frozen": of_frozen[side] for side in SIDES},
            **{f"{side}_tokens_per_s": round(tokens / median[side], 1) for side in SIDES},
            **{f"{side}_peak_bytes": "" if on_cpu else self.peak_bytes[side] for side in SIDES},
        }


def _ratios(times: dict[str, list[float]], over: str = "peft", under: str = "fastpeft") -> list[float]:
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def ratio_text(row: dict) -> str:
    processor = f", of processor time {row['processor_ratio']}" if row["processor_ratio"] != "" else ""
    return (f"{row['ratio']} times as fast (p20 to p80 of {row['repeats']} pairs: {row['ratio_p20']} to "
            f"{row['ratio_p80']}{processor})")  # fmt: skip


def in_pairs(
    model: nn.Module,
    run: Callable[[], object],
    device: Device,
    repeats: int,
    seconds: float | None = None,
    frozen: Callable[[], object] | None = None,
) -> Pairs:
    """Runs `run` with each of SIDES of `model` in turn, and `frozen` beside them."""
    runs = {side: (prepare, run) for side, prepare in SIDES.items()}
    if frozen is not None:
        runs[FROZEN] = (lambda model: None, frozen)
    times: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(SIDES)
    for name, (prepare, timed) in runs.items():
        prepare(model)
        timed()  # warms caches and allocators up
        if device.is_cuda and name in SIDES:
            torch.cuda.reset_peak_memory_stats(device.device)
            timed()
            device.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated(device.device)
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        for index in range(repeats):
            if seconds is not None and index >= _FEWEST_PAIRS and time.perf_counter() - began > seconds:
                break
            for name in list(runs) if index % 2 == 0 else reversed(runs):
                prepare, timed = runs[name]
                prepare(model)
                device.synchronize()
                start, start_processor = time.perf_counter(), time.process_time()
                timed()
                device.synchronize()
                times[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
    finally:
        gc.enable()
    return Pairs(times, processor, peaks)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = Device(torch.device(args.device))
    shape = shape_of(args)
    model = build(shape, args.method, args.rank, args.dropout, args.dtype, args.device)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokens = torch.randint(0, shape.vocab, (args.batch, args.seq), device=args.device)
    check_gradients(model, tokens)
    beside = None
    if args.frozen:
        beside = Step(frozen(shape, args.dtype, args.device, args.checkpointing), tokens, args.accumulation)
    pairs = in_pairs(model, Step(model, tokens, args.accumulation), device, args.repeats, args.seconds, beside)
    row = describe(device.device) | clocks(device.device) | {
        "model": args.model,
        "method": args.method,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "tokens": f"{args.batch}x{args.seq}",
        "rank": args.rank,
        "dropout": args.dropout,
        "dtype": args.dtype,
        "accumulation": args.accumulation,
        "checkpointing": str(args.checkpointing).lower(),
        "fused": fused(model),
        **pairs.columns(args.batch * args.seq * args.accumulation),
    }  # fmt: skip
    append_csv(args.out, row)
    print(f"{row['device']}: {args.method}, {shape.layers} layers of {shape.hidden}, {row['tokens']} tokens, "
          f"{args.dtype}, rank {args.rank}, dropout {args.dropout}; {row['fused']}")  # fmt: skip
    print(f"{other(args.method)} {row['peft_ms']} ms, fastpeft {row['fastpeft_ms']} ms: {ratio_text(row)}")
    if args.frozen:
        print(f"the model without an adapter {row['frozen_ms']} ms: {other(args.method)} {row['peft_to_frozen']} times "
              f"that, fastpeft {row['fastpeft_to_frozen']} times")  # fmt: skip


if __name__ == "__main__":
    main()
