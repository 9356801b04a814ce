"""The training step of a peft model with and without `fastpeft.accelerate`, alternating in one process.

    python -m benchmarks.step --method qlora

A step is forward with loss, backward, AdamW and zero_grad. The default is the shape of SmolLM2-135M with random weights
and 2 x 256 tokens. Loss and gradients of both sides are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
from benchmarks.environment import RESULTS, append_csv, describe
from fastpeft.integrations.bitsandbytes import close_cpu_trap

METHODS = ("lora", "qlora", "dora", "qdora", "prefix")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576, help="a multiple of 192: three heads of 64 share keys")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prefix-tokens", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the base model")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps a side")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> nn.Module:
    """A stock peft model on the device; the base weights are random, the adapters too, so that nothing is zero."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    heads = args.hidden // 64
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        vocab_size=args.vocab,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(args.device, dtype)
    if args.method in ("qlora", "qdora"):
        quantize_linears(model, dtype)
    if args.method == "prefix":
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.prefix_tokens)
        return get_peft_model(model, prefix).train()
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        use_dora=args.method in ("dora", "qdora"),
    )
    model = get_peft_model(model, lora).train()
    close_cpu_trap(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def quantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Every linear of the decoder in NF4 with double quantization, as `load_in_4bit` makes them."""
    import bitsandbytes as bnb

    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            new = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
            model.model.set_submodule(name, new.to(linear.weight.device))
    model.is_loaded_in_4bit = True


class Step:
    """One optimizer, one batch; calling it runs and times a step, in seconds."""

    def __init__(self, model: nn.Module, args: argparse.Namespace):
        self.model = model
        self.device = torch.device(args.device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)  # the Trainer's default
        self.tokens = torch.randint(0, args.vocab, (args.batch, args.seq), device=self.device)

    def gradients(self) -> tuple[float, torch.Tensor]:
        """Loss and gradients, without dropout: the two sides draw different masks."""
        dropouts = [module for module in self.model.modules() if isinstance(module, nn.Dropout)]
        probabilities = [dropout.p for dropout in dropouts]
        for dropout in dropouts:
            dropout.p = 0.0
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        flat = torch.cat([parameter.grad.flatten().float() for parameter in self.parameters])
        self.optimizer.zero_grad()
        for dropout, p in zip(dropouts, probabilities, strict=True):
            dropout.p = p
        return loss.item(), flat

    def __call__(self) -> float:
        start = time.perf_counter()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def check_parity(step: Step) -> None:
    """Stops the benchmark where the two sides do not compute the same.

    Gradients through all layers in 16 bits differ by some percent between any two orders of rounding; a wrong formula
    turns their direction.
    """
    fastpeft.restore(step.model)
    loss, stock = step.gradients()
    fastpeft.accelerate(step.model)
    fused_loss, fused = step.gradients()
    cosine = torch.nn.functional.cosine_similarity(stock, fused, dim=0).item()
    scale = (fused.norm() / stock.norm()).item()
    if abs(loss - fused_loss) > 0.01 * abs(loss) or cosine < 0.99 or abs(scale - 1) > 0.03:
        raise SystemExit(f"no parity: loss {loss:.5f} and {fused_loss:.5f}, gradients cosine {cosine:.5f}, "
                         f"ratio of norms {scale:.4f}")  # fmt: skip


def measure(step: Step, repeats: int) -> tuple[list[float], list[float]]:
    stock, fused = [], []
    gc.collect()
    gc.disable()
    try:
        for index in range(repeats + 2):  # the first two warm caches and allocators up
            fastpeft.restore(step.model)
            stock_s = step()
            fastpeft.accelerate(step.model)
            fused_s = step()
            if index >= 2:
                stock.append(stock_s)
                fused.append(fused_s)
    finally:
        gc.enable()
    return stock, fused


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model = build(args)
    step = Step(model, args)
    check_parity(step)
    stock, fused = measure(step, args.repeats)
    pairs = [a / b for a, b in zip(stock, fused, strict=True)]
    row = describe(step.device) | {
        "method": args.method,
        "layers": args.layers,
        "hidden": args.hidden,
        "tokens": f"{args.batch}x{args.seq}",
        "rank": args.rank,
        "dropout": args.dropout,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "peft_ms": round(1e3 * statistics.median(stock), 1),
        "fastpeft_ms": round(1e3 * statistics.median(fused), 1),
        "ratio": round(statistics.median(stock) / statistics.median(fused), 3),
        "ratio_p20": round(quantile(pairs, 0.2), 3),
        "ratio_p80": round(quantile(pairs, 0.8), 3),
    }
    append_csv(args.out, row)
    print(fastpeft.accelerate(model).summary)
    print(f"{row['device']}: {args.method}, {args.layers} layers of {args.hidden}, {row['tokens']} tokens, "
          f"{args.dtype}, rank {args.rank}, dropout {args.dropout}")  # fmt: skip
    print(f"peft {row['peft_ms']} ms, fastpeft {row['fastpeft_ms']} ms: {row['ratio']} times faster "
          f"(p20..p80 of pairs {row['ratio_p20']}..{row['ratio_p80']}, {args.repeats} pairs)")  # fmt: skip


if __name__ == "__main__":
    main()
