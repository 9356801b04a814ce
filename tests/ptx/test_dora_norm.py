"""The kernels of dora_norm, as nvcc compiles them for each architecture, through their own launcher."""

import pytest
import torch

from fastpeft.reference import nf4 as formula
from tests.parity import assert_parity

from .memory import Memory
from .nvcc import each_arch, needs_nvcc
from .test_csrc import native, output, random_weight, storage
from .test_lora_linear import call

pytestmark = [needs_nvcc, pytest.mark.slow]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def norm(csrc, shape, R, dtype, adapter, nf4=True, nested=False):
    (N, K), memory, out = shape, Memory(), output(shape[:1], FP32)
    weight = random_weight(shape, 64, nested) if nf4 else torch.randn(shape).to(dtype)
    A, B = torch.randn(R, K).to(adapter), torch.randn(N, R).to(adapter)
    names = call(
        csrc,
        memory,
        "dora_norm",
        dtype,
        dict(N=N, K=K, R=R),
        weight=None if nf4 else weight,
        nf4=storage(csrc, memory, weight) if nf4 else None,
        lora_a=A,
        lora_b=B,
        adapter_dtype=adapter,
        scaling=1.7,
        scaling_tensor=None,
        norm=out,
    )

    def direct(wide):
        W = formula.nf4_dequantize(weight, wide) if nf4 else weight.to(wide)
        return (W + 1.7 * (B.to(wide) @ A.to(wide))).square().sum(1).sqrt()

    assert_parity(out, direct(FP32), direct(torch.float64), f"dora_norm {shape} R={R} on sm_{csrc.arch}")
    return names


@each_arch
def test_every_kernel_on_every_architecture(arch):
    csrc, executed = native(arch, "dora_norm.cu"), []
    for dtype in (BF16, FP16):
        for adapter in (dtype, FP32):
            for weight in (dict(nf4=False), dict(nested=False), dict(nested=True)):
                executed += norm(csrc, (5, 160), 17, dtype, adapter, **weight)
            executed += norm(csrc, (5, 43), 5, dtype, adapter)  # no whole vectors
    assert set(executed) == csrc.kernels()
