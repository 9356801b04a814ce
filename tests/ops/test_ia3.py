"""ia3_linear: outputs and gradients against float64 over the backends, and what autograd and compile ask of an op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import ops
from fastpeft.ops import products
from fastpeft.reference.ia3 import ia3_linear as reference
from tests.backends import over
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS = over("eager", "triton")
PLACES = pytest.mark.parametrize("feedforward", (False, True))


def problem(shape, N, dtype, master, feedforward, weight="dense", bias=False, device="cpu"):
    """x, weight, l, bias, dy: random; every fifth value of l is zero, some are negative."""
    K = shape[-1]
    x, W, dy = torch.randn(shape), torch.randn(N, K) / K**0.5, torch.randn(*shape[:-1], N)
    ia3_l = 1 + torch.randn(K if feedforward else N)
    ia3_l[::5] = 0
    W = ops.nf4_quantize(W.to(dtype), backend="eager") if weight == "nf4" else W.to(dtype)
    tensors = x.to(dtype), W, ia3_l.to(master), torch.randn(N).to(dtype) if bias else None, dy.to(dtype)
    return tuple(None if t is None else t.to(device) for t in tensors)


def run(function, x, weight, ia3_l, bias, dy, dtype=None, **options):
    """Output and gradients by name; with `dtype` everything is computed in it."""
    x, ia3_l = leaf(x, dtype), leaf(ia3_l, dtype)
    bias = None if bias is None else leaf(bias, dtype)
    if isinstance(weight, torch.Tensor):
        weight = leaf(weight, dtype)
    y = function(x, weight, ia3_l, bias, **options)
    y.backward(dy.to(y.dtype))
    tensors = {"x": x, "l": ia3_l, "bias": bias, "weight": weight if isinstance(weight, torch.Tensor) else None}
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in tensors.items() if t is not None}


def check(arguments, backend=None, **options):
    """Parity of output and gradients, of the output without gradients, and all of it again, bit for bit."""
    name = None if backend is None else backend.name
    plain, exact = run(reference, *arguments, **options), run(reference, *arguments, dtype=FP64, **options)
    actual = run(ops.ia3_linear, *arguments, backend=name, **options)
    assert actual.keys() == plain.keys()
    for key in actual:
        assert_parity(actual[key], plain[key], exact[key], key)
    again = run(ops.ia3_linear, *arguments, backend=name, **options)
    assert all(torch.equal(actual[key], again[key]) for key in actual)
    with torch.no_grad():
        assert torch.equal(ops.ia3_linear(*arguments[:4], backend=name, **options), actual["y"])


@PLACES
@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("dtype,master", [(BF16, FP32), (BF16, BF16), (FP16, FP32)])
@pytest.mark.parametrize("M", (0, 1, 63, 130))
@BACKENDS
def test_parity(backend, M, dtype, master, weight, feedforward):
    options = dict(weight=weight, bias=M != 63, device=backend.device)
    check(problem((M, 200), 65, dtype, master, feedforward, **options), backend, feedforward=feedforward)


@PLACES
@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("M", (0, 1, 129))
def test_parity_in_float32(M, weight, feedforward):
    check(problem((M, 192), 65, FP32, FP32, feedforward, weight, bias=True), feedforward=feedforward)


@PLACES
@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 3, 5, 72)])
@BACKENDS
def test_parity_over_dimensions_and_views(backend, shape, feedforward):
    arguments = problem(shape, 31, BF16, FP32, feedforward, bias=True, device=backend.device)
    check(arguments, backend, feedforward=feedforward)
    if len(shape) == 2:
        x, W, ia3_l, bias, dy = arguments
        views = [
            (torch.randn(5, 145, device=backend.device).to(BF16)[:, 1::2], W, ia3_l, bias, dy),
            (x, W.t().contiguous().t(), ia3_l, bias, dy),  # Conv1D keeps [K, N]
            (x, W, ia3_l.repeat_interleave(2)[::2], bias, dy.t().contiguous().t()),
            (x, W, ia3_l, bias, torch.ones(1, 1, dtype=BF16, device=backend.device).expand(5, 31)),
        ]
        for view in views:
            check(view, backend, feedforward=feedforward)


@over("triton")
def test_sums_that_programs_share(backend, monkeypatch):
    """Three programs share 130 rows, two tiles each, the last one less."""
    from fastpeft.triton_kernels import ia3 as kernels

    monkeypatch.setattr(kernels, "MOST_SPLITS", 3)
    check(problem((130, 24), 140, BF16, FP32, False, device=backend.device), backend)


@PLACES
@BACKENDS
def test_the_gradient_at_zero_is_that_of_the_formula(backend, feedforward):
    x, W, ia3_l, _, dy = problem((9, 64), 40, BF16, FP32, feedforward, device=backend.device)
    zeros = leaf(torch.zeros_like(ia3_l))
    ops.ia3_linear(x, W, zeros, feedforward=feedforward, backend=backend.name).backward(dy)
    x, W, dy = x.double(), W.double(), dy.double()
    exact = (x * (dy @ W)).sum(0) if feedforward else (dy * (x @ W.t())).sum(0)
    assert (zeros.grad - exact).norm() < 0.01 * exact.norm()


@PLACES
@BACKENDS
def test_only_the_gradients_that_are_asked_for(backend, feedforward):
    arguments = problem((9, 64), 40, BF16, FP32, feedforward, "nf4", bias=True, device=backend.device)
    everything = run(ops.ia3_linear, *arguments, backend=backend.name, feedforward=feedforward)
    x, W, ia3_l, bias, dy = arguments
    for wanted in ("x", "l", "b", "xb", "lb"):
        leaves = {name: leaf(t) if name in wanted else t for name, t in (("x", x), ("l", ia3_l), ("b", bias))}
        options = dict(feedforward=feedforward, backend=backend.name)
        ops.ia3_linear(leaves["x"], W, leaves["l"], leaves["b"], **options).backward(dy)
        for name, key in (("x", "dx"), ("l", "dl"), ("b", "dbias")):
            assert (leaves[name].grad is None) == (name not in wanted)
            assert name not in wanted or torch.equal(leaves[name].grad, everything[key])


@PLACES
@BACKENDS
def test_saves_one_activation_and_makes_no_float32_copy_of_one(monkeypatch, backend, feedforward):
    monkeypatch.setattr(products, "_TILE", 64)  # where a product of halves widens its factors: by tiles, never all
    x, W, ia3_l, _, dy = problem((96, 256), 192, BF16, FP32, feedforward, "nf4", device=backend.device)
    x, ia3_l = leaf(x), leaf(ia3_l)
    saved, wide = [], []

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            found = result if isinstance(result, tuple | list) else [result]
            wide.extend(t.shape for t in found if isinstance(t, torch.Tensor) and t.dtype == FP32 and t.dim() == 2)
            return result

    with Wide(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.ia3_linear(x, W, ia3_l, feedforward=feedforward, backend=backend.name).backward(dy)
    kept = (96, 256) if feedforward else (96, 192)
    assert sorted((tuple(t.shape), t.dtype) for t in saved) == sorted([(kept, BF16), (tuple(ia3_l.shape), FP32)])
    assert not [shape for shape in wide if shape[0] == 96]


@PLACES
def test_gradcheck_and_use_twice(feedforward):
    x, W, ia3_l, b, _ = problem((3, 4, 6), 6, FP64, FP64, feedforward, bias=True)
    inputs = tuple(leaf(t) for t in (x, W, ia3_l, b))
    assert torch.autograd.gradcheck(lambda *t: ops.ia3_linear(*t, feedforward=feedforward), inputs)
    x, W, ia3_l, b = inputs
    loss = ops.ia3_linear(ops.ia3_linear(x, W, ia3_l, b), W, ia3_l, b, feedforward=feedforward).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    plain = reference(reference(x, W, ia3_l, b), W, ia3_l, b, feedforward=feedforward).square().sum()
    for a, again, c in zip(first, torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert torch.equal(a, again) and torch.allclose(a, c, rtol=1e-10)


@PLACES
@pytest.mark.parametrize("weight", ("dense", "nf4"))
def test_autocast(weight, feedforward):
    x, W, ia3_l, b, dy = problem((7, 64), 32, FP32, FP32, feedforward, weight, bias=True)
    x, ia3_l, b = leaf(x), leaf(ia3_l), leaf(b)
    with torch.autocast("cpu", BF16):
        y = ops.ia3_linear(x, W, ia3_l, b, feedforward=feedforward)
    assert y.dtype == BF16
    y.backward(dy.to(BF16))
    with torch.autocast("cpu", enabled=False):
        expected = run(reference, x, W, ia3_l, b, dy.to(BF16), dtype=FP64, feedforward=feedforward)
    for name, value in {"y": y.detach(), "dx": x.grad, "dl": ia3_l.grad, "dbias": b.grad}.items():
        assert (value - expected[name]).norm() < 0.02 * expected[name].norm(), name


@PLACES
@pytest.mark.parametrize("weight", ("dense", "nf4"))
def test_opcheck_and_compile(weight, feedforward):
    from fastpeft.ops.lora_linear import _flatten

    x, W, ia3_l, b, dy = problem((2, 5, 64), 32, FP32, FP32, feedforward, weight, bias=True)
    *flat, shape, blocksize = _flatten(W)
    arguments = (leaf(x), *flat, list(shape), blocksize, leaf(ia3_l), leaf(b), feedforward, None)
    torch.library.opcheck(torch.ops.fastpeft.ia3_linear, arguments)

    def function(x, ia3_l, b):
        return ops.ia3_linear(x, W, ia3_l, b, feedforward=feedforward).relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(t) for t in (x, ia3_l, b)]
        y = f(*inputs)
        y.backward(dy)
        results.append([y.detach()] + [t.grad for t in inputs])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_bad_input_is_refused_with_its_name():
    x, W, ia3_l, b, _ = problem((6, 64), 32, FP32, FP32, False, bias=True)

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            ops.ia3_linear(*arguments, **options)

    refused(ValueError, "last dimension of x must be 64", x[:, :63], W, ia3_l)
    refused(ValueError, r"feedforward=True it must be \(64,\)", x, W, ia3_l, feedforward=True)
    refused(ValueError, r"feedforward=False it must be \(32,\)", x, W, ia3_l.view(32, 1))
    refused(ValueError, r"bias is \(31,\)", x, W, ia3_l, b[:31])
    refused(TypeError, "x is torch.bfloat16, but weight is torch.float32", x.to(BF16), W, ia3_l)
    refused(TypeError, "int64", x, W, ia3_l.long())
    refused(ValueError, "ia3_l on meta", x, W, ia3_l.to("meta"))
    refused(TypeError, "weight must be", x, W[0], ia3_l)
    refused(ValueError, "cannot run on backend 'triton'", x, W, ia3_l, backend="triton")
    assert ops.ia3_linear(*(t.to("meta") for t in (x, W, ia3_l))).shape == (6, 32)
