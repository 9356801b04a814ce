"""The kernels of lora_linear and dora_linear, as nvcc compiles them, through their own launchers. Few shapes: this is
about the instructions that no C++ compiler of a host sees; tests/ops/test_lora_kernels.py has the rest."""

import pytest
import torch

from fastpeft.reference import nf4 as formula
from fastpeft.reference.dropout import keep_mask
from tests.parity import assert_parity

from .memory import Memory
from .nvcc import needs_nvcc
from .test_csrc import DTYPES, native, output, random_weight, storage

pytestmark = [needs_nvcc, pytest.mark.slow]

SCALE = 1.7


def call(csrc, memory, name, dtype, sizes, **arguments):
    """Tensors become addresses of `memory`, None becomes 0; the workspace is made here."""
    for key, value in arguments.items():
        if key != "nf4" and (value is None or isinstance(value, torch.Tensor)):
            arguments[key] = memory.pointer(value)
        elif isinstance(value, torch.dtype):
            arguments[key] = getattr(csrc.cuda.DType, DTYPES[value])
    workspace_bytes = getattr(csrc.cuda, f"{name}_workspace_bytes", None)
    if workspace_bytes is not None:
        arguments["workspace"] = memory.pointer(output((workspace_bytes(**sizes),), torch.uint8))
    return csrc.run(memory, name, dtype=getattr(csrc.cuda.DType, DTYPES[dtype]), **sizes, **arguments)


def passes(csrc, M, C, R, dtype, master, p):
    """All four passes of training; x and dy are one tensor here. Returns the names of the kernels."""
    x, xa = torch.randn(M, C).to(dtype), torch.randn(M, R).to(dtype)
    A, B, seed = torch.randn(R, C).to(master), torch.randn(C, R).to(master), torch.tensor(5)
    mask = dict(seed=seed if p else None, dropout_p=p, adapter_dtype=master)
    out, d_a, u, d_b = (output(s, t) for s, t in (((M, R), dtype), ((R, C), master), ((M, R), dtype), ((C, R), master)))
    y, dx = x.clone(), x.clone()
    K, N, memory = dict(M=M, K=C, R=R), dict(M=M, N=C, R=R), Memory()
    names = call(csrc, memory, "lora_down", dtype, K, x=x, lora_a=A, xa=out, **mask)
    names += call(csrc, memory, "lora_down_grad", dtype, K, x=x, u=xa, d_a=d_a, scale=SCALE, **mask)
    grads = dict(dy=x, lora_b=B, xa=xa, u=u, d_b=d_b, scale=SCALE, adapter_dtype=master)
    names += call(csrc, memory, "lora_up_grad", dtype, N, **grads)
    adds = ((y, B, False), (dx, A, True))
    for to, factor, transposed in adds:
        arguments = dict(y=to, xa=xa, lora_b=factor, transposed=transposed, scale=SCALE, **mask)
        names += call(csrc, memory, "lora_add", dtype, N, **arguments)

    def formulas(dtype):
        a, b, v, t = A.to(dtype), B.to(dtype), xa.to(dtype), x.to(dtype)
        keep = keep_mask(seed, M, C, p).to(dtype)
        return {
            "xa": (t * keep) @ a.t(),
            "dA": SCALE * (v.t() @ (t * keep)),
            "u": t @ b,
            "dB": SCALE * (t.t() @ v),
            "y": t + SCALE * (v @ b.t()) * keep,
            "dx": t + SCALE * (v @ a) * keep,
        }

    actual = {"xa": out, "dA": d_a, "u": u, "dB": d_b, "y": y, "dx": dx}
    plain, exact = formulas(dtype), formulas(torch.float64)
    for name, result in actual.items():
        assert_parity(result, plain[name].to(result.dtype), exact[name], f"{name} {M, C, R} on sm_{csrc.arch}")
    return names


def passes_of_dora(csrc, M, N, R, dtype, p):
    """The second output of lora_add, dropout's sum and the gradient of the gain."""
    z, xa, B = torch.randn(M, N).to(dtype), torch.randn(M, R).to(dtype), torch.randn(N, R).to(dtype)
    gain, bias, seed = torch.rand(N) + 0.5, torch.randn(N).to(dtype), torch.tensor(5)
    whole, y, added, d_gain = z.clone(), *(output((M, N), dtype) for _ in range(2)), output((N,), FP32)
    memory, add = Memory(), dict(lora_b=B, adapter_dtype=dtype, transposed=False, scale=SCALE, seed=None, dropout_p=0.0)
    sizes = dict(M=M, N=N)
    names = call(csrc, memory, "lora_add", dtype, sizes | dict(R=R), y=whole, xa=xa, gain=gain, bias=bias, out=y, **add)
    names += call(
        csrc, memory, "dora_linear_add", dtype, sizes, x=z, gain=gain, offset=z, out=added, seed=seed, dropout_p=p
    )
    names += call(csrc, memory, "dora_linear_gain_grad", dtype, sizes, dy=z, z=z, d_gain=d_gain)

    def formulas(dtype, wide):
        t, g = z.to(dtype), gain.to(wide)
        whole = t + SCALE * (xa.to(dtype) @ B.to(dtype).t())
        keep = keep_mask(seed, M, N, p).to(dtype)
        return {
            "z": whole,
            "y": whole.to(wide) * g + bias.to(wide),
            "added": keep * t.to(wide) * g + t,
            "d_gain": t.to(wide).square().sum(0),
        }

    actual, plain, exact = (
        {"z": whole, "y": y, "added": added, "d_gain": d_gain},
        *(formulas(*dtypes) for dtypes in ((dtype, FP32), (torch.float64, torch.float64))),
    )
    for name, result in actual.items():
        assert_parity(result, plain[name].to(result.dtype), exact[name], f"{name} {M, N, R} on sm_{csrc.arch}")
    return names


def up_grad(csrc, M, N, R, dtype, wanted):
    """One of the two gradients alone."""
    dy, xa, B = torch.randn(M, N).to(dtype), torch.randn(M, R).to(dtype), torch.randn(N, R).to(dtype)
    outputs = {"u": None, "d_b": None} | {wanted: output((M, R) if wanted == "u" else (N, R), dtype)}
    inputs = dict(dy=dy, lora_b=B, xa=xa, scale=SCALE, adapter_dtype=dtype)
    names = call(csrc, Memory(), "lora_up_grad", dtype, dict(M=M, N=N, R=R), **inputs, **outputs)
    dy64, xa64, B64 = dy.double(), xa.double(), B.double()
    plain = dy @ B if wanted == "u" else SCALE * (dy.t() @ xa)
    exact = dy64 @ B64 if wanted == "u" else SCALE * (dy64.t() @ xa64)
    assert_parity(outputs[wanted], plain, exact, f"{wanted} alone on sm_{csrc.arch}")
    return names


def decode(csrc, M, N, K, R, dtype, master, nested=None, blocksize=64):
    """nested: of the absmax; None for a dense weight."""
    x, A, B, gain, bias = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R), torch.rand(N) + 0.5, torch.randn(N)
    x, A, B, bias = x.to(dtype), A.to(master), B.to(master), bias.to(dtype)
    memory, y = Memory(), output((M, N), dtype)
    weight = torch.randn(N, K).to(dtype) if nested is None else random_weight((N, K), blocksize, nested)
    names = call(
        csrc,
        memory,
        "lora_linear_decode",
        dtype,
        dict(M=M, N=N, K=K, R=R),
        x=x,
        weight=weight if nested is None else None,
        nf4=None if nested is None else storage(csrc, memory, weight),
        lora_a=A,
        lora_b=B,
        adapter_dtype=master,
        scaling=SCALE,
        scaling_tensor=torch.tensor(0.5),
        gain=gain,
        bias=bias,
        y=y,
    )

    def result(dtype):
        W = weight.to(dtype) if nested is None else formula.nf4_dequantize(weight, dtype)
        update = (x.to(dtype) @ A.to(dtype).t()) @ B.to(dtype).t()
        return (x.to(dtype) @ W.t() + SCALE * 0.5 * update) * gain.to(dtype) + bias

    assert_parity(y, result(dtype), result(torch.float64), f"y {M, N, K, R} on sm_{csrc.arch}")
    return names


# On 9.0 alone: it has all the instructions, those that only this architecture and later ones know among them, and
# test_csrc.py runs the matrix instructions on every architecture. Every instance for bfloat16; float16 differs from it
# in the types of instructions.

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def csrc_of_90a():
    return native("90a", "*linear*.cu")


def kernels(csrc, decode):
    names = {name for name in csrc.kernels() if "__half" not in name}
    return {name for name in names if ("decode" in name) == decode}


def test_low_rank_passes():
    csrc, executed = csrc_of_90a(), []
    for R in (9, 24, 72):
        executed += passes(csrc, 20, 72, R, BF16, FP32, p=0.3)
        executed += passes(csrc, 20, 72, R, BF16, BF16, p=0.0)
    executed += passes(csrc, 9, 43, 40, BF16, BF16, p=0.0)  # u and dB apart; no whole vectors
    for wanted in ("u", "d_b"):
        executed += up_grad(csrc, 20, 72, 16, BF16, wanted)
    for N in (72, 43):
        executed += passes_of_dora(csrc, 20, N, 24, BF16, p=0.3)
    assert set(executed) == kernels(csrc, decode=False)
    passes(csrc, 20, 72, 13, FP16, FP16, p=0.3)


def test_decode():
    csrc, executed = csrc_of_90a(), []
    for M in (1, 9, 17, 33):
        executed += decode(csrc, M, 20, 128, 8, BF16, FP32, nested=False)
        executed += decode(csrc, M, 20, 128, 5, BF16, BF16, nested=True)
        executed += decode(csrc, M, 20, 72, 0, BF16, FP32)
    for M in (1, 9):
        executed += decode(csrc, M, 9, 72, 3, BF16, BF16, nested=False, blocksize=32)
        executed += decode(csrc, M, 9, 72, 3, BF16, BF16, nested=True, blocksize=256)
    assert set(executed) == kernels(csrc, decode=True)
    decode(csrc, 3, 20, 192, 16, FP16, FP16, nested=True)
    decode(csrc, 9, 20, 72, 16, FP16, FP32, nested=False)
