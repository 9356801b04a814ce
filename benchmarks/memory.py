"""Memory of a training step by method, stock peft and accelerated: python -m benchmarks.memory --method qlora

- saved: bytes that autograd keeps for backward, per decoder layer: every tensor that is saved in forward and is not a
  parameter or buffer of the model, each storage once. Of models of two depths, so that embedding and loss drop out.
- peak: the most bytes that a forward and backward allocate on top of what was allocated before, of the whole (shallow)
  model, gradients of the adapter included. On a GPU the allocator says so; on a CPU the profiler's record of every
  allocation.
"""

from __future__ import annotations

import argparse
import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.environment import RESULTS, append_csv, describe
from benchmarks.harness import Device
from benchmarks.models import METHODS, SIDES, build, check_gradients
from benchmarks.step import add_model_arguments, shape_of

_SHALLOW, _DEEP = 1, 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="lora")
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.csv", metavar="CSV")
    return parser.parse_args(argv)


class _Saved:
    """What stands for a tensor in the graph: it lives as long as autograd keeps the tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(function: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps when `function` has returned, without what belongs to `module`."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = function()
    storages = [kept.tensor.untyped_storage() for kept in saved]
    found = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del result
    return sum(found.values())


def peak_bytes(function: Callable[[], object], device: Device) -> int:
    """The most bytes allocated at once by `function`, on top of what was there before."""
    if device.is_cuda:
        device.synchronize()
        before = torch.cuda.memory_allocated(device.device)
        torch.cuda.reset_peak_memory_stats(device.device)
        function()
        device.synchronize()
        return torch.cuda.max_memory_allocated(device.device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def _measure(args: argparse.Namespace, device: Device, layers: int) -> dict[str, tuple[int, int]]:
    """side -> saved and peak bytes."""
    shape = dataclasses.replace(shape_of(args), layers=layers)
    model = build(shape, args.method, args.rank, args.dropout, args.dtype, args.device)
    tokens = torch.randint(0, shape.vocab, (args.batch, args.seq), device=args.device)
    check_gradients(model, tokens)

    def forward() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    def step() -> None:
        forward().backward()

    results = {}
    for side, prepare in SIDES.items():
        prepare(model)
        saved = saved_bytes(forward, model)
        model.zero_grad(set_to_none=True)
        results[side] = saved, peak_bytes(step, device)
        model.zero_grad(set_to_none=True)
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = Device(torch.device(args.device))
    shallow, deep = (_measure(args, device, layers) for layers in (_SHALLOW, _DEEP))
    columns = {}
    for name, index in (("saved", 0), ("peak", 1)):
        for side in SIDES:
            per_layer = (deep[side][index] - shallow[side][index]) // (_DEEP - _SHALLOW)
            columns[f"{side}_{name}_bytes_per_layer"] = per_layer
    row = describe(device.device) | {
        "model": args.model,
        "method": args.method,
        "hidden": shape_of(args).hidden,
        "tokens": f"{args.batch}x{args.seq}",
        "rank": args.rank,
        "dropout": args.dropout,
        "dtype": args.dtype,
        **columns,
        **{f"{side}_peak_bytes": deep[side][1] for side in SIDES},
        "peak_layers": _DEEP,
    }
    append_csv(args.out, row)
    print(f"{row['device']}: {args.method}, hidden {row['hidden']}, {row['tokens']} tokens, {args.dtype}, a layer")
    for name in ("saved", "peak"):
        peft, ours = (row[f"{side}_{name}_bytes_per_layer"] for side in SIDES)
        print(f"  {name}: peft {peft / 2**20:.2f} MiB, fastpeft {ours / 2**20:.2f} MiB: {ours / peft:.2f} of it")


if __name__ == "__main__":
    main()
