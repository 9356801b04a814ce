"""prefix_attention on a GPU: torch's flash attention beside the prefix, graphs, streams, compile, sizes past 2^31."""

import pytest
import torch

from fastpeft import ops
from fastpeft.ops import prefix_attention_eager as eager
from tests.ops.test_prefix_attention import BF16, FP16, FP32, check, leaf, problem
from tests.ops.test_prefix_attention_backends import TRITON

pytestmark = pytest.mark.gpu

DOCUMENTS = torch.tensor([0, 100, 100, 333, 700], dtype=torch.int32)
# name: sizes of the problem, options, which backend, whether gradients are wanted
STEPS = {
    "flash": ({"S": 700}, {}, "triton", True),
    "flash, documents": ({"S": 700, "B": 1}, {"cu_seqlens": DOCUMENTS}, "triton", True),
    "one kernel": ({"S": 700}, {"window": 100}, "triton", True),
    "decode": ({"S": 1, "T": 700}, {}, "cuda", False),
}
EACH = pytest.mark.parametrize("kind", STEPS)


def step_of(kind):
    """The leaves and a function of no arguments that gives the output, and the gradients where they are wanted."""
    sizes, options, backend, training = STEPS[kind]
    sizes = {"B": 2, "H": 4, "Hkv": 2, "D": 64, "P": 20, "dtype": BF16, "master": FP32} | sizes
    *inputs, dout = (t.cuda() for t in problem(**sizes))
    inputs = [leaf(t).requires_grad_(training) for t in inputs]
    options = {name: o.cuda() if isinstance(o, torch.Tensor) else o for name, o in options.items()}

    def step():
        out = ops.prefix_attention(*inputs, **options, backend=backend)
        return (out, *torch.autograd.grad(out, inputs, dout)) if training else (out,)

    return inputs, step


@TRITON
@pytest.mark.parametrize("D", (64, 80, 128, 256))
@pytest.mark.parametrize("options", ({}, {"causal": False}, {"cu_seqlens": DOCUMENTS}), ids=str)
def test_parity_beside_torch_flash(backend, options, D):
    if backend.device == "cpu":
        pytest.skip("a GPU chooses this form by itself")
    for dtype in (BF16, FP16):
        tensors = problem(1 if "cu_seqlens" in options else 2, 8, 2, 700, D=D, P=65, dtype=dtype, master=FP32)
        q, k = tensors[0].cuda(), tensors[1].cuda()
        assert eager.flash_serves(q, k, options.get("cu_seqlens"), None, eager.Form(True, 1.0, None, None))
        check(tensors, backend, **options)


@EACH
def test_graph_capture_replays_on_new_inputs(kind):
    inputs, step = step_of(kind)
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
        for t in inputs:
            t.copy_(torch.randn_like(t))
    graph.replay()
    replayed = [t.clone() for t in captured]
    for got, expected in zip(replayed, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)  # torch's flash backward adds with atomics


@EACH
def test_it_never_synchronises(kind):
    _, step = step_of(kind)
    step()  # compiles Triton's kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ("one kernel", "decode"))
def test_side_streams_do_not_share_workspaces(kind):
    steps = [step_of(kind)[1] for _ in range(6)]
    expected = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        results = []
        for i, step in enumerate(steps):
            with torch.cuda.stream(streams[i % 2]):
                results.append(step())
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            assert all(map(torch.equal, result, right))


@pytest.mark.parametrize("window", (None, 100))
def test_compile(window):
    tensors = [t.cuda() for t in problem(2, 4, 2, 300, D=64, P=20, dtype=BF16, master=FP32)]

    def function(*inputs):
        return ops.prefix_attention(*inputs, window=window, backend="triton").relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        inputs = [leaf(t) for t in tensors[:5]]
        out = f(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, tensors[5])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_more_than_two_to_the_31_elements():
    """The last sequence alone has the same bits. q and out take 4.4 GB each."""
    B, H, S, D, P = 9, 64, 32768, 128, 20
    q = torch.randn(B, S, H, D, device="cuda", dtype=BF16).transpose(1, 2)
    k = torch.randn(B, S, 1, D, device="cuda", dtype=BF16).transpose(1, 2)
    prefix = torch.randn(2, 1, P, D, device="cuda", dtype=BF16)
    options = {"window": 64, "backend": "triton"}
    out = ops.prefix_attention(q, k, k, *prefix, **options)
    assert q.numel() > 2**31
    assert torch.equal(out[-1:], ops.prefix_attention(q[-1:], k[-1:], k[-1:], *prefix, **options))
