"""Triton kernels as Triton compiles them, executed.

pytest does not collect this file: test_triton.py runs it in a process in which Triton's interpreter is off. By hand:
TRITON_INTERPRET=0 pytest --noconftest tests/ptx/compiled_triton.py"""

import pytest
import torch
import triton
import triton.language as tl
from fastpeft.triton_kernels import nf4

from fastpeft.reference import nf4 as formula
from tests.ops.test_lora_triton import check as check_lora_linear

from .parse import PtxError
from .triton_driver import Driver

SM_80 = Driver(80)
OTHERS = [Driver(90), Driver(100), Driver(120)]


@pytest.fixture(autouse=True)
def sm_80():
    torch.manual_seed(0)
    SM_80.use()


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + tl.load(y + i, i < n), i < n)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * n + i, i < n, other=-float("inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * n + i, (value / tl.sum(value, 0)).to(out.dtype.element_ty), i < n)


@triton.jit
def matmul_kernel(a, b, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + start + k, (m[:, None] < M) & (start + k < K), other=0)
        right = tl.load(b + (start + k)[:, None] * N + n, ((start + k)[:, None] < K) & (n < N), other=0)
        total = tl.dot(left, right, total, input_precision="tf32")
    tl.store(out + m[:, None] * N + n, total.to(out.dtype.element_ty), (m[:, None] < M) & (n < N))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("n", (1, 1000, 1024))
def test_add(n, dtype):
    x, y, out = torch.randn(n).to(dtype), torch.randn(n).to(dtype), torch.full((n,), torch.nan, dtype=dtype)
    add_kernel[(triton.cdiv(n, 512),)](x, y, out, n, BLOCK=512)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("n", (7, 256, 1000))
def test_softmax(n):
    check_softmax(n)


def check_softmax(n):
    x, out = torch.randn(3, n), torch.full((3, n), torch.nan)
    softmax_kernel[(3,)](x, out, n, BLOCK=triton.next_power_of_2(n))
    assert torch.allclose(out, x.softmax(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("stages", (1, 3))
def test_matmul(dtype, stages):
    M, N, K = 48, 64, 144
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    out = torch.full((M, N), torch.nan)
    compiled = matmul_kernel[(2, 2)](a, b, out, M, N, K, BM=32, BN=32, BK=32, num_stages=stages, num_warps=2)
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() < (1e-4 if dtype != torch.float32 else 5e-2)  # tf32 has 11 digits
    assert "mma.sync" in compiled.asm["ptx"] and ("cp.async" in compiled.asm["ptx"]) == (stages > 1)


def test_an_access_out_of_bounds_is_an_error():
    x = torch.randn(100)
    with pytest.raises(PtxError, match=r"bytes at offset 400 of a buffer of 400 bytes(?s:.*)compiled_triton.py:\d+"):
        add_kernel[(1,)](x, x, torch.zeros(100), 101, BLOCK=128)


def test_a_missing_barrier_is_an_error():
    Driver(80, edit=lambda ptx: ptx.replace("bar.sync", "bar.warp.sync -1; //")).use()
    x = torch.randn(1, 200)
    with pytest.raises(PtxError, match="race: "):
        softmax_kernel[(1,)](x, torch.zeros(1, 200), 200, BLOCK=256)


# ---- triton_kernels/nf4.py

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same(actual, expected):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    return torch.equal(actual.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4(dtype):
    check_nf4(9000, 64, dtype)


@pytest.mark.parametrize("numel, blocksize", ((1, 64), (2048, 32), (9001, 4096)))
def test_nf4_of_other_sizes(numel, blocksize):
    check_nf4(numel, blocksize, torch.bfloat16)


@pytest.mark.parametrize("driver", OTHERS, ids=lambda driver: f"sm_{driver.arch}")
def test_other_architectures(driver):
    driver.use()
    check_softmax(500)
    check_nf4(2100, 64, torch.bfloat16)


def check_nf4(numel, blocksize, dtype):
    weight = torch.randn(numel).to(dtype)
    expected, expected_absmax = formula.nf4_quantize(weight, blocksize)
    packed, absmax = torch.full_like(expected, 0xA5), torch.full_like(expected_absmax, torch.nan)
    nf4.nf4_quantize(weight, blocksize, packed, absmax)
    assert same(packed, expected) and same(absmax, expected_absmax)

    index = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:numel].int()
    values = formula.nf4_values(packed.device)[index]
    out = torch.full((numel,), torch.nan, dtype=dtype)
    nf4.nf4_dequantize(packed, absmax, None, None, None, blocksize, out)
    assert same(out, (values * absmax.repeat_interleave(blocksize)[:numel]).to(dtype))

    code, offset = formula.absmax_code(packed.device), absmax.mean()
    expected_u8, expected_scale = formula.quantize_absmax(absmax, offset, code)
    absmax_u8, scale = torch.full_like(expected_u8, 0xA5), torch.full_like(expected_scale, torch.nan)
    nf4.nf4_quantize_absmax(absmax, offset, code, absmax_u8, scale)
    assert same(absmax_u8, expected_u8) and same(scale, expected_scale)

    nf4.nf4_dequantize(packed, absmax_u8, code, scale, offset, blocksize, out)
    nested = formula.dequantize_absmax(absmax_u8, code, scale, offset)
    assert same(out, (values * nested.repeat_interleave(blocksize)[:numel]).to(dtype))


# ---- triton_kernels/lora_linear.py


@pytest.mark.parametrize("M, blocksize", ((20, 64), (40, 0)))
def test_lora_linear(M, blocksize):
    check_lora_linear("cpu", M, 40, 72, 8, torch.bfloat16, torch.float32, blocksize, nested=True, p=0.5, bias=True)
