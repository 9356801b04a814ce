"""Greedy decoding of a peft model with and without `fastpeft.accelerate`, taking turns in one process.

    python -m benchmarks.decode --method qlora [--model Llama-3-8B --batch 1]

`generate` of transformers with its own cache, random weights, no end token. Tokens a second count new tokens, and the
time of the prompt is in them. The logits of both sides are compared before anything is timed. On a CPU with AVX512-BF16
bitsandbytes would rewrite 4-bit weights for inference, once and for good: that path cannot take turns and is off here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.environment import RESULTS, append_csv, clocks, describe
from benchmarks.harness import Device
from benchmarks.models import METHODS, SIDES, build, fused, other
from benchmarks.step import add_model_arguments, in_pairs, ratio_text, shape_of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="lora")
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=7, help="timed generations a side")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.csv", metavar="CSV")
    return parser.parse_args(argv)


@torch.no_grad()
def check_logits(model: nn.Module, tokens: torch.Tensor) -> None:
    """Stops the benchmark where the two sides do not compute the same: 16 bits through all layers agree to percents."""
    logits = {}
    for side, prepare in SIDES.items():
        prepare(model)
        logits[side] = model(input_ids=tokens).logits.double()
    error = ((logits["peft"] - logits["fastpeft"]).norm() / logits["peft"].norm()).item()
    if not error <= 0.05:
        raise SystemExit(f"no parity: relative difference of the logits {error:.3f}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = Device(torch.device(args.device))
    shape = shape_of(args)
    model = build(shape, args.method, args.rank, dtype=args.dtype, device=args.device).eval()
    tokens = torch.randint(0, shape.vocab, (args.batch, args.prompt), device=args.device)
    check_logits(model, tokens)
    lengths = {"min_new_tokens": args.new, "max_new_tokens": args.new, "pad_token_id": 0, "do_sample": False}

    @torch.no_grad()
    def generate() -> None:
        model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **lengths)

    pairs = in_pairs(model, generate, device, args.repeats, args.seconds)
    row = describe(device.device) | clocks(device.device) | {
        "model": args.model,
        "method": args.method,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "batch": args.batch,
        "prompt": args.prompt,
        "new": args.new,
        "rank": args.rank,
        "dtype": args.dtype,
        "fused": fused(model),
        **pairs.columns(args.batch * args.new),
    }  # fmt: skip
    append_csv(args.out, row)
    print(f"{row['device']}: {args.method}, {shape.layers} layers of {shape.hidden}, decoding {args.batch}x{args.new} "
          f"tokens, {args.dtype}; {row['fused']}")  # fmt: skip
    ours = f"fastpeft {row['fastpeft_tokens_per_s']}"
    print(f"{other(args.method)} {row['peft_tokens_per_s']} tokens/s, {ours}: {ratio_text(row)}")


if __name__ == "__main__":
    main()
