"""lora_linear on a GPU: graph capture, streams, devices, compile, sizes past 2^31, and that it never synchronises."""

import pytest
import torch

from fastpeft import ops
from tests.ops.test_lora_linear import BF16, FP32, problem

pytestmark = pytest.mark.gpu

KERNELS = pytest.mark.parametrize("backend", ("triton", "cuda"))
SIZES = pytest.mark.parametrize("M", (1, 33, 700))  # the kernel for few tokens, the fused product, cuBLAS


def leaves(*tensors):
    return [t.detach().clone().requires_grad_(True) for t in tensors]


@KERNELS
@SIZES
def test_graph_capture_replays_on_new_inputs(backend, M):
    x, W, A, B, bias, dy = problem((M, 256), 192, 16, BF16, FP32, "nf4", bias=True, device="cuda")
    x, A, B = leaves(x, A, B)
    seed = torch.tensor(3, device="cuda")

    def step():
        y = ops.lora_linear(x, W, A, B, 1.5, bias, dropout_p=0.2, seed=seed, backend=backend)
        return y, *torch.autograd.grad(y, (x, A, B), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (x, A, B, dy):
            t.copy_(torch.randn_like(t))
        seed.fill_(11)
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@KERNELS
@SIZES
def test_inference_graph(backend, M):
    x, W, A, B, _, _ = problem((M, 256), 192, 16, BF16, FP32, "nf4", device="cuda")
    with torch.no_grad():
        ops.lora_linear(x, W, A, B, 1.5, backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.lora_linear(x, W, A, B, 1.5, backend=backend)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, ops.lora_linear(x, W, A, B, 1.5, backend=backend))


@KERNELS
def test_side_streams_do_not_share_workspaces(backend):
    problems = [problem((700, 512), 384, 16, BF16, FP32, "nf4", device="cuda") for _ in range(6)]
    expected = [ops.lora_linear(x, W, A, B, 1.5, backend=backend) for x, W, A, B, _, _ in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        results = []
        for i, (x, W, A, B, _, _) in enumerate(problems):
            with torch.cuda.stream(streams[i % 2]):
                results.append(ops.lora_linear(x, W, A, B, 1.5, backend=backend))
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            assert torch.equal(result, right)


@KERNELS
@SIZES
def test_it_never_synchronises(backend, M):
    x, W, A, B, _, dy = problem((M, 256), 192, 16, BF16, FP32, "nf4", device="cuda")
    x, A, B = leaves(x, A, B)
    scaling = torch.tensor(1.5, device="cuda")

    def step():
        ops.lora_linear(x, W, A, B, scaling, dropout_p=0.2, backend=backend).backward(dy)

    step()  # compiles Triton's kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@KERNELS
@SIZES
def test_compile(backend, M):
    x, W, A, B, bias, dy = problem((M, 256), 192, 16, BF16, FP32, "nf4", bias=True, device="cuda")

    def function(x, A, B):
        return ops.lora_linear(x, W, A, B, 1.5, bias, dropout_p=0.2, seed=5, backend=backend).relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        inputs = leaves(x, A, B)
        y = f(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, dy)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@KERNELS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_is_used(backend):
    x, W, A, B, _, _ = problem((33, 256), 192, 16, BF16, FP32, "nf4", device="cuda:0")
    expected = ops.lora_linear(x, W, A, B, 1.5, backend=backend)
    with torch.cuda.device(0):
        elsewhere = ops.lora_linear(*(t.to("cuda:1") for t in (x, W, A, B)), 1.5, backend=backend)
    assert elsewhere.device == torch.device("cuda:1") and torch.equal(elsewhere.cpu(), expected.cpu())


@KERNELS
def test_sizes_past_2_to_the_31(backend):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free memory")
    M, K, N, R = 540_000, 4096, 16, 8  # x has 2.2e9 elements
    x = torch.randn(M, K, dtype=BF16, device="cuda").requires_grad_(True)
    dy = torch.randn(M, N, dtype=BF16, device="cuda")
    _, W, A, B, _, _ = problem((1, K), N, R, BF16, FP32, device="cuda")
    A, B = leaves(A, B)
    y = ops.lora_linear(x, W, A, B, 1.5, backend=backend)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (A, B)]
    for first in range(0, M, 60_000):
        part = slice(first, first + 60_000)
        x_part = x[part].detach().requires_grad_(True)
        y_part = ops.lora_linear(x_part, W, A, B, 1.5, backend="eager")
        dx_part, *grads = torch.autograd.grad(y_part, (x_part, A, B), dy[part])
        for actual, plain in ((y[part], y_part), (dx[part], dx_part)):
            assert (actual - plain).float().norm() < 0.01 * plain.float().norm()
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    for actual, total in ((dA, sums[0]), (dB, sums[1])):
        assert (actual - total).norm() < 0.01 * total.norm()
