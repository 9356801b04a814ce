"""The kernels of prefix_attention_decode, as nvcc compiles them, through their own launcher. Few shapes: this is about
the instructions that no C++ compiler of a host sees; tests/ops/test_prefix_attention_kernels.py has the rest."""

import pytest
import torch

from fastpeft.reference.prefix_attention import prefix_attention as reference
from tests.parity import assert_parity

from .memory import Memory
from .nvcc import needs_nvcc
from .test_csrc import native, output
from .test_lora_linear import call

pytestmark = [needs_nvcc, pytest.mark.slow]


def decode(csrc, B, H, L, T, P, D, dtype, softcap=None):
    """One key head; left padding. Returns the names of the kernels."""
    q, k, v = (torch.randn(B, heads, rows, D).to(dtype) for heads, rows in ((H, L), (1, T), (1, T)))
    prefix_k, prefix_v = (torch.randn(1, P, D).to(dtype) for _ in range(2))
    mask = torch.arange(T).expand(B, T) >= torch.arange(B).unsqueeze(1)
    out, lse = output((B, L, H, D), dtype), output((B, H, L), torch.float32)
    names = call(
        csrc,
        Memory(),
        "prefix_attention_decode",
        dtype,
        dict(B=B, H=H, Hkv=1, L=L, T=T, P=P, D=D),
        q=q,
        k=k,
        v=v,
        prefix_k=prefix_k,
        prefix_v=prefix_v,
        mask=mask,
        out=out,
        lse=lse,
        q_stride=q.stride()[:3],
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        causal=True,
        scale=D**-0.5,
        window=T + 3,
        softcap=softcap or 0.0,
    )

    def result(dtype):
        inputs = (t.to(dtype) for t in (q, k, v, prefix_k, prefix_v))
        return reference(*inputs, window=T + 3, softcap=softcap, key_padding_mask=mask)

    assert_parity(out.transpose(1, 2), result(dtype), result(torch.float64), f"out {B, H, L, T, P, D}")
    assert lse.isfinite().all()
    return names


# On 9.0 alone, and every instance for bfloat16: see test_lora_linear.py.


def test_decode():
    csrc, executed = native("90a", "prefix_attention_*.cu"), []
    for D in (64, 96, 128, 256):
        executed += decode(csrc, 2, 2, 1, 70, 20, D, torch.bfloat16)
    assert set(executed) == {name for name in csrc.kernels() if "__half" not in name}
    decode(csrc, 3, 8, 1, 9, 70, 64, torch.float16, softcap=5.0)  # more than 16 rows
