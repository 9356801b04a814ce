"""The sizes that benchmarks run at. `[N, K]` of linear layers are out and in features; M is tokens."""

from __future__ import annotations

SUITES = ("smoke", "quick", "full")  # smoke: whether everything runs; quick: minutes; full: every shape
DEVICES = ("cuda", "cpu")

# model -> layer -> [N, K]
LINEARS = {
    "Llama-3-8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Qwen2.5-7B": {"q, o": (3584, 3584), "k, v": (512, 3584), "gate, up": (18944, 3584), "down": (3584, 18944)},
    "SmolLM2-1.7B": {"q, k, v, o": (2048, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)},
    "SmolLM2-135M": {"down": (576, 1536)},
    "smoke": {"odd": (65, 192)},  # a row ends within a block of absmax; N is no multiple of anything
}

DECODE_M = (1, 2, 4, 8, 16, 32, 64, 128)
TRAINING_M = (512, 2048, 8192, 16384)
RANKS = (8, 16, 64)
