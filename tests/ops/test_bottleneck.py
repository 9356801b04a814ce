"""bottleneck: outputs and gradients against float64 over the backends, and what autograd and compile ask of an op."""

from functools import partial

import pytest
import torch

from fastpeft import ops, use_backend
from fastpeft.reference.bottleneck import ACTIVATIONS
from fastpeft.reference.bottleneck import bottleneck as reference
from tests.backends import over
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS = over("eager", "triton")
NAMES = ("x", "down", "up", "down_bias", "up_bias", "residual")


def problem(shape, N, R, dtype, master, biases=True, residual="x", device="cpu"):
    """x, D, U, b_d, b_u, the residual ("x", "other" or None) and dy: random, of the sizes of a trained adapter.

    Parameters are representable in `dtype`: rounding them would turn ReLU's slope where a pre-activation is near zero.
    """
    K = shape[-1]
    tensors = [torch.randn(shape).to(dtype), torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5]
    tensors += [torch.randn(R) / 2, torch.randn(N) / 2] if biases else [None, None]
    tensors = [tensors[0], *(None if t is None else t.to(dtype).to(master) for t in tensors[1:])]
    tensors = [None if t is None else t.to(device) for t in tensors]
    added = {"x": tensors[0], "other": torch.randn(*shape[:-1], N).to(dtype).to(device), None: None}[residual]
    return *tensors, added, torch.randn(*shape[:-1], N).to(dtype).to(device)


def run(function, *tensors, dtype=None, **options):
    """Output and gradients by name; with `dtype` everything is computed in it."""
    *inputs, dy = tensors
    leaves = [None if t is None else leaf(t, dtype) for t in inputs]
    if inputs[5] is inputs[0]:
        leaves[5] = leaves[0]
    y = function(*leaves[:5], residual=leaves[5], scaling=0.7, **options)
    y.backward(dy.to(y.dtype))
    named = {f"d{name}": t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    return {"y": y.detach()} | named


def check(arguments, backend=None, **options):
    """Parity of output and gradients, of the output without gradients, and all of it again, bit for bit."""
    name = None if backend is None else backend.name
    plain, exact = run(reference, *arguments, **options), run(reference, *arguments, dtype=FP64, **options)
    actual = run(ops.bottleneck, *arguments, backend=name, **options)
    assert actual.keys() == plain.keys()
    for key in actual:
        assert_parity(actual[key], plain[key], exact[key], key)
    again = run(ops.bottleneck, *arguments, backend=name, **options)
    assert all(torch.equal(actual[key], again[key]) for key in actual)
    with torch.no_grad():
        *inputs, residual, _ = arguments
        y = ops.bottleneck(*inputs, residual=residual, scaling=0.7, backend=name, **options)
    assert torch.equal(y, actual["y"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype,master", [(BF16, FP32), (BF16, BF16), (FP16, FP32)])
@BACKENDS
def test_parity_over_activations(backend, dtype, master, activation):
    check(problem((33, 72), 72, 13, dtype, master, device=backend.device), backend, activation=activation)


@pytest.mark.parametrize("residual", ("x", "other", None))
@pytest.mark.parametrize("M", (0, 1, 63, 130))
@BACKENDS
def test_parity_over_tokens_and_residuals(backend, M, residual):
    options = dict(residual=residual, biases=M != 63, device=backend.device)
    check(problem((M, 100), 100 if residual == "x" else 65, 16, BF16, FP32, **options), backend, activation="gelu")


@pytest.mark.parametrize("R", (1, 4, 64, 100, 256))
@BACKENDS
def test_parity_over_ranks(backend, R):
    check(problem((70, 136), 136, R, BF16, FP32, device=backend.device), backend, activation="silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M,R", [(0, 4), (1, 1), (129, 384)])
def test_parity_in_float32(M, R, activation):
    check(problem((M, 72), 72, R, FP32, FP32), activation=activation)


@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 3, 5, 72)])
@BACKENDS
def test_parity_over_dimensions_and_views(backend, shape):
    check(problem(shape, 72, 8, BF16, FP32, device=backend.device), backend)
    if len(shape) == 2:
        x, *parameters, _, dy = problem(shape, 31, 8, BF16, FP32, residual="other", device=backend.device)
        views = [torch.randn(5, 145, device=backend.device).to(BF16)[:, 1::2], x.t().contiguous().t()]
        for view in views:
            other = torch.randn(31, 5, device=backend.device).to(BF16).t()
            check((view, *parameters, other, dy), backend)
        down, up, *biases = parameters
        transposed = (down.t().contiguous().t(), up.t().contiguous().t())
        one = torch.ones(1, 1, dtype=BF16, device=backend.device).expand(5, 31)
        check((x, *transposed, *biases, None, one), backend)


@over("triton")
def test_sums_that_programs_share(backend, monkeypatch):
    from fastpeft.triton_kernels import products

    monkeypatch.setattr(products, "MIN_STEPS", 1)
    check(problem((200, 40), 40, 5, BF16, FP32, device=backend.device), backend)


@BACKENDS
def test_only_the_gradients_that_are_asked_for(backend):
    arguments = problem((9, 64), 64, 4, BF16, FP32, residual="other", device=backend.device)
    everything = run(ops.bottleneck, *arguments, backend=backend.name)
    *inputs, dy = arguments
    for wanted in (*((name,) for name in NAMES), ("x", "up"), ("down", "up_bias")):
        leaves = [leaf(t) if name in wanted else t for name, t in zip(NAMES, inputs, strict=True)]
        ops.bottleneck(*leaves[:5], residual=leaves[5], scaling=0.7, backend=backend.name).backward(dy)
        for name, t in zip(NAMES, leaves, strict=True):
            assert (t.grad is None) == (name not in wanted)
            assert name not in wanted or torch.equal(t.grad, everything[f"d{name}"])


@BACKENDS
def test_saves_x_the_pre_activation_and_parameters_only(backend):
    *inputs, dy = problem((96, 64), 64, 8, BF16, FP32, device=backend.device)
    leaves, saved = [leaf(t) for t in inputs[:5]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.bottleneck(*leaves, residual=leaves[0], activation="gelu", backend=backend.name)
    wanted = [((96, 64), BF16), ((96, 8), BF16), ((8, 64), FP32), ((64, 8), FP32), ((8,), FP32), ((64,), FP32)]
    assert sorted((tuple(t.shape), t.dtype) for t in saved) == sorted(wanted)
    assert any(t.data_ptr() == leaves[0].data_ptr() for t in saved)


@BACKENDS
def test_a_start_with_zeros_is_the_residual(backend):
    x, down, up, down_bias, up_bias, _, _ = problem((7, 64), 64, 4, BF16, FP32, device=backend.device)
    y = ops.bottleneck(x, down, up * 0, down_bias, up_bias * 0, residual=x, backend=backend.name)
    assert torch.equal(y, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ("x", "other", None))
def test_gradcheck(residual, activation):
    *inputs, _ = problem((3, 4, 6), 6, 3, FP64, FP64, residual=residual)
    leaves = [leaf(t) for t in inputs[:5]] + ([leaf(inputs[5])] if residual == "other" else [])

    def function(x, down, up, down_bias, up_bias, other=None):
        added = x if residual == "x" else other
        options = dict(residual=added, activation=activation, scaling=0.7)
        return ops.bottleneck(x, down, up, down_bias, up_bias, **options)

    assert torch.autograd.gradcheck(function, tuple(leaves))


def test_use_twice_and_second_derivative():
    *inputs, _ = problem((5, 8), 8, 3, FP64, FP64)
    x, *parameters = (leaf(t) for t in inputs[:5])

    def loss(function):
        inner = function(x, *parameters, residual=x)
        return function(inner, *parameters, residual=inner, activation="silu").square().sum()

    mine = loss(ops.bottleneck)
    first = torch.autograd.grad(mine, (x, *parameters), retain_graph=True)
    second = torch.autograd.grad(mine, (x, *parameters))
    for a, b, c in zip(first, second, torch.autograd.grad(loss(reference), (x, *parameters)), strict=True):
        assert torch.equal(a, b) and torch.allclose(a, c, rtol=1e-10)
    (dx,) = torch.autograd.grad(loss(ops.bottleneck), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        dx.sum().backward()


@pytest.mark.parametrize("residual", ("x", "other"))
def test_autocast(residual):
    *inputs, dy = problem((7, 64), 64, 8, FP32, FP32, residual=residual)
    with torch.autocast("cpu", BF16):
        actual = run(partial(ops.bottleneck, activation="gelu"), *inputs, dy)
    exact = run(partial(reference, activation="gelu"), *inputs, dy, dtype=FP64)
    assert actual["y"].dtype == BF16
    for name, value in actual.items():
        assert (value - exact[name]).norm() < 0.02 * exact[name].norm(), name


@pytest.mark.parametrize("residual", ("x", "other", None))
def test_opcheck_and_compile(residual):
    *inputs, dy = problem((2, 5, 16), 16, 4, FP32, FP32, residual=residual)
    leaves = [leaf(t) for t in inputs[:5]]
    other = leaf(inputs[5]) if residual == "other" else None
    torch.library.opcheck(torch.ops.fastpeft.bottleneck, (*leaves, other, residual == "x", "gelu", 0.5, None))

    def function(*tensors):
        *rest, other = tensors
        return ops.bottleneck(*rest, residual=rest[0] if residual == "x" else other, activation="silu").relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        tensors = [*(leaf(t) for t in inputs[:5]), None if other is None else leaf(other)]
        y = f(*tensors)
        y.backward(dy)
        results.append([y.detach()] + [t.grad for t in tensors if t is not None])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_backends_by_name():
    *inputs, _ = problem((5, 8), 8, 3, FP64, FP64)
    with use_backend("reference"):
        plain = ops.bottleneck(*inputs[:5], residual=inputs[0])
    assert torch.equal(plain, reference(*inputs[:5], residual=inputs[0]))


def test_bad_input_is_refused_with_its_name():
    x, down, up, down_bias, up_bias, _, _ = problem((6, 64), 32, 4, FP32, FP32)

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            ops.bottleneck(*arguments, **options)

    refused(ValueError, "last dimension of x must be 64", x[:, :63], down, up)
    refused(ValueError, r"\[R, K\] and \[N, R\]", x, down, up.t())
    refused(ValueError, r"down_bias is \(32,\)", x, down, up, up_bias)
    refused(ValueError, r"up_bias is \(4,\)", x, down, up, None, down_bias)
    refused(ValueError, "up makes 32 features", x, down, up, residual=x)
    refused(ValueError, r"residual is \(6, 64\).*must be \(6, 32\)", x, down, up, residual=x + 1)
    refused(ValueError, "activation is 'tanh'; allowed are relu, gelu, gelu_tanh, silu", x, down, up, activation="tanh")
    refused(TypeError, "scaling is '2'", x, down, up, scaling="2")
    refused(TypeError, "down is torch.int64", x, down.long(), up)
    refused(ValueError, "up is on meta", x, down, up.to("meta"))
    refused(ValueError, "cannot run on backend 'triton'", x, down, up, backend="triton")
    assert ops.bottleneck(*(t.to("meta") for t in (x, down, up))).shape == (6, 32)
