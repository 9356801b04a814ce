"""dora_norm: against float64, where the expansion of the square cancels, and in bounded memory."""

import subprocess
import sys

import pytest
import torch

from fastpeft import ops, use_backend
from fastpeft.ops.dora_norm import _BLOCK
from fastpeft.reference.dora import dora_norm as reference
from tests.parity import assert_parity

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def problem(N, K, R, dtype=FP32, master=FP32, weight="dense", nested=True, blocksize=64):
    W, A, B = torch.randn(N, K) / K**0.5, torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5
    W = ops.nf4_quantize(W.to(dtype), blocksize, nested) if weight == "nf4" else W.to(dtype)
    return W, A.to(master), B.to(master)


def check(W, A, B, scaling=1.7):
    norm = ops.dora_norm(W, A, B, scaling)
    assert norm.dtype == FP32 and not norm.requires_grad
    exact = reference(W.double() if isinstance(W, torch.Tensor) else W, A.double(), B.double(), scaling)
    assert_parity(norm, reference(W, A, B, scaling), exact)
    return norm


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("dtype,master", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32)])
def test_parity_over_types(weight, dtype, master):
    W, A, B = problem(65, 136, 13, dtype, master, weight)
    check(W, A.requires_grad_(), B.requires_grad_())


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("N,K,R", [(1, 1, 1), (3, 3, 7), (31, 40, 4), (65, 72, 384), (24, 4160, 8), (5, 2**18 + 64, 2)])
def test_parity_over_sizes(weight, N, K, R):
    check(*problem(N, K, R, weight=weight))


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("blocksize", (32, 64, 4096))
@pytest.mark.parametrize("K", (1000, 1001, 1024))
def test_four_bit_blocks_that_cross_rows_and_row_blocks(nested, blocksize, K):
    """N is more than one block of rows, and not a multiple of it; quantization blocks end in the middle of rows."""
    N = _BLOCK // K + 7
    check(*problem(N, K, 3, weight="nf4", nested=nested, blocksize=blocksize))


def test_views_and_empty():
    wide = torch.randn(2, 90, 141)
    check(wide[1, ::2, 3::2], *problem(45, 69, 4)[1:])
    check(torch.randn(69, 45).t(), *problem(45, 69, 4)[1:])
    A, B = torch.randn(69, 4).t(), torch.randn(4, 45).t()
    check(torch.randn(45, 69), A, B)
    assert ops.dora_norm(torch.empty(0, 8), torch.randn(2, 8), torch.empty(0, 2), 1.0).shape == (0,)
    assert torch.equal(ops.dora_norm(torch.empty(3, 0), torch.empty(2, 0), torch.randn(3, 2), 1.0), torch.zeros(3))


@pytest.mark.parametrize("d", (1e-1, 1e-3, 1e-5))
def test_an_update_close_to_minus_the_weight_keeps_its_digits(d):
    """W + s B A = d W, to float32: the expansion of the square is wrong by a quarter, or gives zeros, there."""
    N, K = 24, 96
    A, B = torch.randn(N, K, dtype=FP64) / K**0.5, (torch.eye(N) * (d - 1)).double()
    W, A, B = A.float(), A.float(), B.float()
    exact = reference(W.double(), A.double(), B.double(), 1.0)
    assert ((ops.dora_norm(W, A, B, 1.0) - exact) / exact).abs().max() < 2e-7 / d

    def expanded(W, A, B):
        cross, own = 2 * (B * (W @ A.t())).sum(1), ((B @ (A @ A.t())) * B).sum(1)
        return (W.square().sum(1) + cross + own).clamp_min(0).sqrt()

    if d <= 1e-3:
        assert ((expanded(W, A, B) - exact) / exact).abs().max() > 1e-2


@pytest.mark.parametrize("scaling", (1e6, 1e-8, 0.0, -2.0))
def test_extreme_scalings(scaling):
    check(*problem(33, 64, 4), scaling)
    check(*problem(33, 64, 4, BF16, weight="nf4"), scaling)


def test_scaling_may_be_a_tensor():
    W, A, B = problem(33, 64, 4)
    assert torch.equal(ops.dora_norm(W, A, B, torch.tensor(1.7)), ops.dora_norm(W, A, B * 1.7, 1.0))


def test_float64_stays_float64_and_autocast_does_not_round():
    W, A, B = problem(33, 64, 4)
    exact = ops.dora_norm(W.double(), A.double(), B.double(), 1.7)
    assert exact.dtype == FP64
    with torch.autocast("cpu", BF16):
        assert torch.equal(ops.dora_norm(W, A, B, 1.7), ops.dora_norm(W, A, B, 1.7))
        assert torch.allclose(ops.dora_norm(W, A, B, 1.7).double(), exact, rtol=1e-6, atol=0)


def test_zero_rows_and_rows_that_cancel_are_zero():
    W, A, B = problem(6, 32, 4)
    W[2], B[2] = 0, 0
    B[4], W[4] = torch.tensor([1.0, 0, 0, 0]), -A[0]
    assert (ops.dora_norm(W, A, B, 1.0) == 0).tolist() == [False, False, True, False, True, False]


_MEMORY = """
import sys, torch
from fastpeft import NF4Weight, ops

def status(name):  # in bytes
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

N, K, copies = 4096, 14336, 64
A, B = torch.randn(16, K), torch.randn(N, 16)
part = torch.randn(N // copies, K, dtype=torch.bfloat16)
weight = part.repeat(copies, 1)
if sys.argv[1] == "nf4":
    import bitsandbytes
    part = NF4Weight.quantize(part)
    tensors = {n: getattr(part, n).repeat(copies) for n in ("packed", "absmax", "absmax_scale")}
    nested = dict(absmax_code=part.absmax_code, absmax_offset=part.absmax_offset)
    weight = NF4Weight(shape=(N, K), blocksize=64, dtype=torch.bfloat16, **tensors, **nested)
ops.dora_norm(part, A, B[: N // copies], 1.0)  # what libraries allocate once
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
norm = ops.dora_norm(weight, A, B, 1.0)
print((status("VmHWM") - before) / (2 * N * K), norm.isfinite().all().item())
"""


@pytest.mark.parametrize("weight", ("dense", "nf4"))
def test_peak_memory_of_a_large_layer(weight):
    """4096 x 14336: less than 5% of the bytes of the weight in bf16, measured by the operating system."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, weight], capture_output=True, text=True, check=True)
    share, finite = done.stdout.split()
    assert finite == "True" and float(share) < 0.05


@pytest.mark.parametrize("weight", ("dense", "nf4"))
def test_compile_opcheck_and_meta(weight):
    from fastpeft.ops.lora_linear import _flatten

    W, A, B = problem(33, 64, 4, weight=weight)
    compiled = torch.compile(lambda A, B: ops.dora_norm(W, A, B, 1.5) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(A, B), ops.dora_norm(W, A, B, 1.5) * 2)
    flat = _flatten(W)
    torch.library.opcheck(torch.ops.fastpeft.dora_norm, (*flat[:5], list(flat[5]), flat[6], A, B, 1.5, None))
    if weight == "dense":
        assert ops.dora_norm(*(t.to("meta") for t in (W, A, B)), 1.0).shape == (33,)


def test_backends_by_name_and_bad_input():
    W, A, B = problem(33, 64, 4)
    with use_backend("reference"):
        assert torch.equal(ops.dora_norm(W, A, B, 1.5), reference(W, A, B, 1.5))

    def refused(error, match, *arguments):
        with pytest.raises(error, match=match):
            ops.dora_norm(*arguments)

    refused(TypeError, "weight must be", W[0], A, B, 1.0)
    refused(ValueError, r"\[R, 64\] and \[33, R\]", W, A[:3], B, 1.0)
    refused(ValueError, r"\[R, 64\] and \[33, R\]", W, A, B[:3], 1.0)
    refused(TypeError, "A is torch.int64", W, A.long(), B, 1.0)
    refused(ValueError, "B is on meta", W, A, B.to("meta"), 1.0)
    refused(ValueError, r"scaling is \(4,\)", W, A, B, torch.ones(4))
    refused(TypeError, "scaling is '2'", W, A, B, "2")
