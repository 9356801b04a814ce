"""The kernels of dora_norm by their launchers: the norms of the rows of W + scaling * B A, in float32.

The oracle is the formula in float64; "plain" is the formula in float32, whatever the dtype of the adapters is.
"""

from dataclasses import replace

import pytest
import torch
from fastpeft.triton_kernels import dora_norm as triton_dora_norm

from fastpeft import NF4Weight, _native, ops, quant
from fastpeft.reference import nf4 as formula
from tests import backends
from tests.backends import over
from tests.parity import assert_parity

KERNELS = over("triton", "cuda")
HALVES = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
each_adapter = pytest.mark.parametrize("adapter", NAMES, ids=NAMES.get)
each_absmax = pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
GUARD = 64  # elements around what a kernel may write


def launch(weight, A, B, scaling, backend, factor=None):
    """weight: [N, K] bf16|fp16 or an NF4Weight. factor: None, or a tensor that multiplies scaling."""
    weight, A, B = (tensor.to(backend.device) for tensor in (weight, A, B))
    factor = None if factor is None else factor.to(backend.device)
    N = B.shape[0]
    around = torch.full((N + 2 * GUARD,), 3.0, device=backend.device)
    norm = around[GUARD : GUARD + N]
    by = launch_triton if backend.name == "triton" else launch_cuda
    by(weight, A, B, scaling, factor, norm)
    assert (around[:GUARD] == 3).all() and (around[GUARD + N :] == 3).all()
    return norm.cpu()


def launch_triton(weight, A, B, scaling, factor, norm):
    if isinstance(weight, NF4Weight):
        nested = (weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
        weight = (weight.packed, weight.absmax, *nested, weight.blocksize)
    triton_dora_norm.dora_norm(weight, A, B, scaling, factor, norm)


def launch_cuda(weight, A, B, scaling, factor, norm):
    (N, R), K = B.shape, A.shape[1]
    is_nf4 = isinstance(weight, NF4Weight)
    dtype = torch.bfloat16 if is_nf4 else weight.dtype  # with NF4 and float32 adapters the kernel has no use for it
    workspace_bytes = _native.cuda.dora_norm_workspace_bytes(N, K, R)
    around = torch.full((workspace_bytes + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=norm.device)
    with _native.stream_on(norm.device) as stream:
        _native.cuda.dora_norm(
            weight=0 if is_nf4 else weight.data_ptr(),
            nf4=quant.native_storage(weight) if is_nf4 else None,
            lora_a=A.data_ptr(),
            lora_b=B.data_ptr(),
            adapter_dtype=quant.native_dtype(A.dtype),
            scaling=scaling,
            scaling_tensor=0 if factor is None else factor.data_ptr(),
            norm=norm.data_ptr(),
            workspace=around[GUARD:].data_ptr(),
            dtype=quant.native_dtype(A.dtype if A.dtype in HALVES else dtype),
            N=N,
            K=K,
            R=R,
            stream=stream,
        )
    assert (around[:GUARD] == 0xA5).all() and (around[GUARD + workspace_bytes :] == 0xA5).all()


def direct(weight, A, B, scaling, dtype):
    W = formula.nf4_dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)
    return (W + scaling * (B.to(dtype) @ A.to(dtype))).square().sum(1).sqrt()


def check(weight, A, B, scaling, backend, factor=None):
    actual = launch(weight, A, B, scaling, backend, factor)
    scaling = scaling if factor is None else scaling * factor.item()
    plain, exact = (direct(weight, A, B, scaling, dtype) for dtype in (torch.float32, torch.float64))
    assert_parity(actual, plain, exact)
    return actual


def adapters(N, K, R, dtype):
    """Sizes as in a trained adapter: an update of about a tenth of a weight of variance 1 / K."""
    A, B = torch.randn(R, K), torch.randn(N, R) / (10 * max(R * K, 1) ** 0.5)
    return A.to(dtype), B.to(dtype)


def nf4_problem(N, K, R, adapter, blocksize=64, nested=True):
    return ops.nf4_quantize(torch.randn(N, K) / max(K, 1) ** 0.5, blocksize, nested), *adapters(N, K, R, adapter)


def dense_problem(N, K, R, dtype, adapter):
    return (torch.randn(N, K) / max(K, 1) ** 0.5).to(dtype), *adapters(N, K, R, adapter)


@KERNELS
@each_adapter
@each_absmax
def test_nf4(nested, adapter, backend):
    check(*nf4_problem(70, 192, 16, adapter, nested=nested), 1.7, backend)
    check(*nf4_problem(9, 43, 13, adapter, nested=nested), 1.7, backend)  # no whole vectors


@KERNELS
@pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
@pytest.mark.parametrize("master", (False, True), ids=("rounded", "master"))
def test_dense(master, dtype, backend):
    adapter = torch.float32 if master else dtype
    check(*dense_problem(70, 200, 16, dtype, adapter), 1.7, backend)
    check(*dense_problem(9, 43, 13, dtype, adapter), 1.7, backend)


@KERNELS
@pytest.mark.parametrize("adapter", (torch.bfloat16, torch.float32), ids=NAMES.get)
@pytest.mark.parametrize("R", (0, 1, 4, 17, 64, 100))
def test_ranks(R, adapter, backend):
    """None, one that fills no block of ranks, more than both sizes of W."""
    check(*nf4_problem(35, 96, R, adapter), 1.7, backend)


@KERNELS
@each_absmax
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
def test_blocksizes(blocksize, nested, backend):
    """Blocks that are whole in a row, cross rows, are longer than W, begin within what a thread loads."""
    for shape in ((6, 64), (9, 96), (7, 40), (2, 4128)):
        check(*nf4_problem(*shape, 4, torch.bfloat16, blocksize, nested), 1.7, backend)


@KERNELS
@pytest.mark.parametrize("shape", ((1, 1), (1, 32), (3, 3), (33, 130), (257, 8), (300, 33), (2, 1000)))
def test_shapes(shape, backend):
    check(*nf4_problem(*shape, 5, torch.bfloat16), 1.7, backend)
    check(*dense_problem(*shape, 5, torch.bfloat16, torch.bfloat16), 1.7, backend)


@KERNELS
def test_empty_weights(backend):
    A, B = adapters(0, 64, 4, torch.bfloat16)
    assert launch(torch.randn(0, 64, dtype=torch.bfloat16), A, B, 1.0, backend).shape == (0,)
    A, B = adapters(5, 0, 4, torch.bfloat16)
    assert torch.equal(launch(torch.randn(5, 0, dtype=torch.bfloat16), A, B, 1.0, backend), torch.zeros(5))


@KERNELS
def test_scaling_of_any_size_and_as_a_tensor(backend):
    for scaling in (0.0, -2.5, 1e6, 1e-8):
        for adapter in (torch.bfloat16, torch.float32):
            check(*nf4_problem(20, 96, 8, adapter), scaling, backend)
            check(*nf4_problem(20, 96, 8, adapter), 0.5, backend, torch.tensor(scaling))


def cancelling(N, K, R, weight, adapter, scaling, left):
    """A and B with scaling * B A = -(1 - left) W up to their rounding."""
    A = torch.randn(R, K, dtype=torch.float64)
    W = formula.nf4_dequantize(weight, torch.float64) if isinstance(weight, NF4Weight) else weight.double()
    B = -(1 - left) / scaling * W @ torch.linalg.pinv(A)
    return A.to(adapter), B.to(adapter)


@KERNELS
@pytest.mark.parametrize("left", (1e-1, 1e-3, 1e-5))
@pytest.mark.parametrize("kind", ("nf4", "bf16"))
def test_an_update_that_nearly_cancels_the_weight(kind, left, backend):
    N, K, R, scaling = 24, 32, 48, 1.7
    weight = ops.nf4_quantize(torch.randn(N, K)) if kind == "nf4" else torch.randn(N, K).to(torch.bfloat16)
    A, B = cancelling(N, K, R, weight, torch.float32, scaling, left)
    actual = check(weight, A, B, scaling, backend)

    # This is what the kernels are for: neither shorter adapters nor the expanded square would pass.
    exact = direct(weight, A, B, scaling, torch.float64)
    assert_parity(actual, direct(weight, A, B, scaling, torch.float32), exact)
    W = formula.nf4_dequantize(weight, torch.float32) if kind == "nf4" else weight.float()
    factored = W.square().sum(1) + 2 * scaling * (W * (B @ A)).sum(1) + scaling**2 * (B @ A).square().sum(1)
    rounded = direct(weight, A.bfloat16(), B.bfloat16(), scaling, torch.float32)
    for other in (factored.clamp(min=0).sqrt(), rounded):
        assert (other - exact).abs().max() > 10 * (actual - exact).abs().max()
    for adapter in HALVES if kind == "nf4" else (torch.bfloat16,):
        check(weight, *cancelling(N, K, R, weight, adapter, scaling, left), scaling, backend)


@KERNELS
def test_zero_rows_are_exactly_zero_and_what_is_not_finite_stays_in_its_row(backend):
    for adapter in (torch.bfloat16, torch.float32):
        weight, A, B = dense_problem(12, 72, 8, torch.bfloat16, adapter)
        weight[3], B[3] = 0, 0
        weight[5, 70], weight[7, 1] = torch.inf, torch.nan
        norm = launch(weight, A, B, 1.7, backend)
        assert norm[3] == 0 and norm[5] == torch.inf and norm[7].isnan()
        others = [n for n in range(12) if n not in (5, 7)]
        assert_parity(norm[others], *(direct(weight, A, B, 1.7, d)[others] for d in (torch.float32, torch.float64)))

        weight = ops.nf4_quantize(torch.cat([torch.zeros(1, 64), torch.randn(3, 64)]), double_quant=False)
        A, B = adapters(4, 64, 8, adapter)
        B[0] = 0
        weight.absmax[2] = torch.nan
        norm = launch(weight, A, B, 1.7, backend)
        assert norm[0] == 0 and norm[2].isnan() and norm[[1, 3]].isfinite().all()


@KERNELS
@pytest.mark.parametrize("adapter", (torch.bfloat16, torch.float32), ids=NAMES.get)
def test_tensors_at_any_address(adapter, backend):
    """Codes that begin at an odd byte; absmax, W, A and B that begin inside a vector."""

    def shifted(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()]).to(backend.device)[1:].view(tensor.shape)

    for weight, A, B in (nf4_problem(10, 64, 8, adapter), dense_problem(10, 64, 8, torch.bfloat16, adapter)):
        moved = shifted(weight) if isinstance(weight, torch.Tensor) else replace(
            weight, **{k: shifted(v) for k, v in vars(weight).items() if isinstance(v, torch.Tensor)}
        )  # fmt: skip
        same = launch(weight, A, B, 1.7, backend)
        for arguments in ((moved, A, B), (weight, shifted(A), B), (weight, A, shifted(B))):
            torch.testing.assert_close(launch(*arguments, 1.7, backend), same, rtol=3e-7, atol=0)


@KERNELS
def test_the_same_bits_again(backend):
    """Over several slices of K, whatever the order of the threads is."""
    weight, A, B = nf4_problem(260, 416, 20, torch.bfloat16)
    norms = []
    for order in ("forward", "reverse", "random"):
        if str(backend) == "cuda-emulated":
            backends.emulation().configure(order=order, seed=7)
        norms.append(launch(weight, A, B, 1.7, backend))
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.slow
def test_the_workspace_is_small():
    """Against what a dense copy of W would take."""
    workspace_bytes = backends.emulation().module.dora_norm_workspace_bytes
    for R, share in ((1, 0.02), (16, 0.02), (64, 0.07)):
        assert workspace_bytes(4096, 14336, R) < share * 4096 * 14336 * 2
    assert workspace_bytes(0, 64, 16) == 0
