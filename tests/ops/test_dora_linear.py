"""dora_linear: outputs and gradients against float64 and the closed form, where peft gives NaN, and as an op."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import ops, use_backend
from fastpeft.reference.dora import dora_linear as reference
from fastpeft.reference.dora import dora_norm as reference_norm
from fastpeft.reference.dropout import keep_mask
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def problem(shape, N, R, dtype, master, weight="dense", bias=False):
    """x, weight, A, B, magnitude, bias, dy: random, of the sizes that a trained adapter has."""
    K = shape[-1]
    x, W, dy = torch.randn(shape), torch.randn(N, K) / K**0.5, torch.randn(*shape[:-1], N)
    A, B = torch.randn(R, K) / K**0.5, 0.3 * torch.randn(N, R) / R**0.5
    W = ops.nf4_quantize(W.to(dtype)) if weight == "nf4" else W.to(dtype)
    A, B = A.to(master), B.to(master)
    magnitude = (reference_norm(W, A, B, 1.7) * (1 + 0.2 * torch.randn(N))).to(master)
    return x.to(dtype), W, A, B, magnitude, torch.randn(N).to(dtype) if bias else None, dy.to(dtype)


def run(function, x, weight, A, B, magnitude, bias, dy, dtype=None, **options):
    """Output and gradients by name; with `dtype` everything is computed in it."""
    x, A, B, magnitude = (leaf(t, dtype) for t in (x, A, B, magnitude))
    bias = None if bias is None else leaf(bias, dtype)
    if isinstance(weight, torch.Tensor) and dtype is not None:
        weight = weight.to(dtype)
    y = function(x, weight, A, B, magnitude, 1.7, bias, **options)
    y.backward(dy.to(y.dtype))
    results = {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad, "dm": magnitude.grad}
    return results if bias is None else results | {"dbias": bias.grad}


def check(*problems, **options):
    """Several problems are judged as one: the largest of few errors is a matter of luck."""
    options_plain = options | {"seed": torch.tensor(options["seed"])} if "seed" in options else options
    actual = [run(ops.dora_linear, *arguments, **options) for arguments in problems]
    plain = [run(reference, *arguments, **options_plain) for arguments in problems]
    exact = [run(reference, *arguments, dtype=FP64, **options_plain) for arguments in problems]
    assert actual[0].keys() == plain[0].keys()
    for name in actual[0]:
        assert_parity(*(torch.stack([result[name] for result in results]) for results in (actual, plain, exact)), name)


def problems(shape, *arguments, **options):
    few = math.prod(shape[:-1]) == 1
    return [problem(shape, *arguments, **options) for _ in range(16 if few else 4)]


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("dtype,master", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32)])
@pytest.mark.parametrize("M", (0, 1, 63, 129))
def test_parity_over_sizes_of_batch(M, dtype, master, weight):
    check(*problems((M, 192), 128, 16, dtype, master, weight, bias=M == 63))


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("R", (1, 13, 384))
def test_parity_over_ranks(R, weight):
    check(*problems((33, 136), 65, R, BF16, FP32, weight, bias=True))


@pytest.mark.parametrize("shape", [(192,), (2, 5, 192), (2, 3, 5, 192)])
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_parity_over_dimensions_bias_and_dropout(shape, bias, dropout_p):
    for dtype in (FP32, BF16):
        check(*problems(shape, 64, 8, dtype, FP32, bias=bias), dropout_p=dropout_p, seed=11)
    check(*problems(shape, 64, 8, BF16, FP32, "nf4", bias=bias), dropout_p=dropout_p, seed=11)


def test_parity_for_views():
    """A transposed x; a transposed weight, as Conv1D keeps it, and an expanded gradient."""
    transposed, weights = [], []
    for x, W, A, B, m, _, dy in problems((40, 70), 32, 4, BF16, FP32):
        transposed.append((x.t().contiguous().t(), W, A, B, m, None, dy))
        weights.append((x, W.t().contiguous().t(), A, B, m, None, torch.ones(1, 1, dtype=BF16).expand(40, 32)))
    check(*transposed)
    check(*weights)


@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
def test_closed_form_in_float64(dropout_p):
    """The derivation on paper: dZ = g dY, dm = sum(dY Z) / n, dS = s dZ B, dB = s dZ^T S, dA = dS^T x, S = x A^T."""
    x, W, A, B, m, b, dy = problem((9, 24), 16, 3, FP64, FP64, bias=True)
    s, n = 1.7, reference_norm(W, A, B, 1.7)
    got = run(ops.dora_linear, x, W, A, B, m, b, dy, dropout_p=dropout_p, seed=5)
    keep = keep_mask(torch.tensor(5), 9, 24, dropout_p).double() / (1 - dropout_p)
    xd, g = x * keep, m / n
    z = xd @ W.t() + s * (xd @ A.t()) @ B.t()
    dz = g * dy
    expected = {
        "y": (x - xd) @ W.t() + g * z + b,
        "dx": dy @ W + keep * (dz @ W + s * dz @ B @ A - dy @ W),
        "dA": s * (dz @ B).t() @ xd,
        "dB": s * dz.t() @ (xd @ A.t()),
        "dm": (dy * z).sum(0) / n,
        "dbias": dy.sum(0),
    }
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
def test_gradcheck_in_float64(dropout_p):
    """With the norm held fixed every input is differentiated truly, a dense weight too."""
    *tensors, _ = problem((3, 4, 10), 6, 3, FP64, FP64, bias=True)
    norm = ops.dora_norm(*tensors[1:4], 0.7)

    def function(x, W, A, B, m, b):
        return ops.dora_linear(x, W, A, B, m, 0.7, b, norm=norm, dropout_p=dropout_p, seed=5)

    assert torch.autograd.gradcheck(function, tuple(leaf(t) for t in tensors))


def test_equals_the_base_when_the_magnitude_is_the_norm():
    for weight, dtype in (("dense", FP32), ("dense", BF16), ("nf4", BF16)):
        x, W, A, B, *_ = problem((40, 192), 64, 4, dtype, FP32, weight)
        norm = ops.dora_norm(W, A, B * 0, 1.7)
        dense = W if isinstance(W, torch.Tensor) else W.dequantize(dtype)
        for dropout_p in (0.0, 0.5):
            y = ops.dora_linear(x, W, A, B * 0, norm, 1.7, dropout_p=dropout_p)
            assert torch.equal(y, torch.nn.functional.linear(x, dense))


def test_the_gain_is_not_rounded_to_the_compute_type():
    """The next neighbours of 1 in bf16 are 0.996 and 1.008: a gain of 1.01 must not become one of them."""
    x, W, A, B, *_ = problem((256, 192), 64, 4, BF16, FP32)
    norm = ops.dora_norm(W, A, B, 1.7)
    one, more = (ops.dora_linear(x, W, A, B, norm * gain, 1.7).double() for gain in (1.0, 1.01))
    assert abs((more * one).sum() / (one * one).sum() - 1.01) < 5e-4


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("weight", ("dense", "nf4"))
def test_zero_rows_and_zero_or_negative_magnitudes_stay_finite(weight, dtype, dropout_p):
    x, W, A, B, m, b, dy = problem((17, 128), 48, 4, dtype, FP32, bias=True)
    W[:3], B[:3], m[2], m[3], m[4] = 0, 0, 0, 0, -m[4]
    W = ops.nf4_quantize(W) if weight == "nf4" else W
    got = run(ops.dora_linear, x, W, A, B, m, b, dy, dropout_p=dropout_p, seed=3)
    assert all(torch.isfinite(value).all() for value in got.values())
    if dropout_p == 0:
        assert torch.equal(got["y"][:, :4], b[:4].expand(17, 4))
    assert (got["dm"][:3] == 0).all() and got["dm"][3] != 0 and (got["dB"][:4] == 0).all()
    check((x, W, A, B, m, b, dy), dropout_p=dropout_p, seed=3)


@pytest.mark.parametrize("scaling", (1e6 / 16, 1e-8 / 16))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_extreme_alphas(scaling, dtype):
    x, W, A, B, m, b, dy = problem((17, 128), 48, 16, dtype, FP32, bias=True)

    def scaled(function):
        return lambda x, W, A, B, m, s, b, **options: function(x, W, A, B, m, scaling, b, **options)

    actual, plain = run(scaled(ops.dora_linear), x, W, A, B, m, b, dy), run(scaled(reference), x, W, A, B, m, b, dy)
    exact = run(scaled(reference), x, W, A, B, m, b, dy, dtype=FP64)
    for name in actual:
        assert torch.isfinite(actual[name]).all()
        assert_parity(actual[name], plain[name], exact[name], name)


def test_an_update_close_to_minus_the_weight():
    """W + s B A = 1e-4 W: the rows shrink by four digits, and the magnitude stretches what is left of them."""
    x, A, dy = torch.randn(9, 64), torch.randn(24, 64) / 8, torch.randn(9, 24)
    B = torch.eye(24) * (1e-4 - 1)
    m = 1 + torch.rand(24)
    got, exact = (
        run(f, x, A.clone(), A, B, m, None, dy, dtype=t, seed=None)
        for f, t in ((lambda *a, **k: ops.dora_linear(*a[:5], 1.0, *a[6:]), None),
                     (lambda *a, **k: reference(*a[:5], 1.0, *a[6:]), FP64))
    )  # fmt: skip
    for name in got:
        # The sum of two products cancels four digits; nothing more is lost, and nothing is clamped to zero.
        error = (got[name] - exact[name]).norm() / exact[name].norm()
        assert error < 2e-2, (name, error)


def test_scaling_may_be_a_tensor_and_gets_a_gradient():
    x, W, A, B, m, *_ = problem((5, 24), 16, 3, FP64, FP64)
    norm, scaling = ops.dora_norm(W, A, B, 1.7), torch.tensor(1.7, dtype=FP64, requires_grad=True)
    assert torch.allclose(ops.dora_linear(x, W, A, B, m, scaling), ops.dora_linear(x, W, A, B, m, 1.7), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda s: ops.dora_linear(x, W, A, B, m, s, norm=norm), (scaling,))


def test_gradients_come_in_the_type_of_the_parameter_and_only_where_asked():
    x, W, A, B, m, _, dy = problem((5, 64), 32, 4, BF16, FP32)
    for chosen in (A, B, m):
        parameters = [leaf(t) if t is chosen else t for t in (A, B, m)]
        ops.dora_linear(x, W, *parameters, 1.0).backward(dy)
        for parameter in parameters:
            assert (parameter.grad is not None) == parameter.requires_grad
            assert parameter.grad is None or (parameter.grad.dtype == FP32 and parameter.grad.is_contiguous())
    assert not ops.dora_linear(x, W, A, B, m, 1.0).requires_grad


def test_saves_x_xa_z_and_parameters_only():
    x, W, A, B, m, *_ = problem((256, 512), 384, 8, BF16, FP32, "nf4")
    x, A, B, m = leaf(x), leaf(A), leaf(B), leaf(m)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.dora_linear(x, W, A, B, m, 1.0, dropout_p=0.5)
    sizes = sorted((tuple(t.shape), str(t.dtype)) for t in saved)
    activations = [((256, 512), str(BF16)), ((256, 384), str(BF16)), ((256, 8), str(BF16))]
    small = [
        ((8, 512), str(FP32)),
        ((384, 8), str(FP32)),
        ((384,), str(FP32)),
        ((384,), str(FP32)),
        ((), "torch.int64"),
    ]
    assert sizes == sorted(activations + small)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_retain_graph_and_second_derivative():
    x, W, A, B, m, *_ = problem((5, 24), 24, 3, FP64, FP64)
    x, A, B, m = leaf(x), leaf(A), leaf(B), leaf(m)
    inner = ops.dora_linear(x, W, A, B, m, 0.5)
    loss = ops.dora_linear(inner, W, A, B, m, 0.5).square().sum()
    first = torch.autograd.grad(loss, (x, A, B, m), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (x, A, B, m))))
    (dx,) = torch.autograd.grad(ops.dora_linear(x, W, A, B, m, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_draws_the_same_mask_again(reentrant):
    x, W, A, B, m, _, dy = problem((16, 64), 64, 4, FP32, FP32)
    x, A, B, m = leaf(x), leaf(A), leaf(B), leaf(m)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)

        def block(x):
            return ops.dora_linear(x, W, A, B, m, 2.0, dropout_p=0.5).tanh()

        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.backward(dy)
        gradients.append([t.grad.clone() for t in (x, A, B, m)])
        x.grad = A.grad = B.grad = m.grad = None
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_dropout_has_the_mean_of_no_dropout():
    """E[xd] = x, and y is linear in xd: its mean is what evaluation computes."""
    x, W, A, B, m, b, _ = problem((6, 64), 32, 4, FP32, FP32, bias=True)
    expected = ops.dora_linear(x, W, A, B, m, 1.7, b)
    drawn = torch.stack([ops.dora_linear(x, W, A, B, m, 1.7, b, dropout_p=0.4) for _ in range(600)])
    error = drawn.std(0) / 600**0.5
    assert ((drawn.mean(0) - expected).abs() / error).mean() < 1.0  # 0.8 for a normal distribution


def test_autocast():
    x, W, A, B, m, b, dy = problem((7, 64), 32, 4, FP32, FP32, bias=True)
    leaves = [leaf(t) for t in (x, A, B, m, b)]
    for dropout_p in (0.0, 0.3):
        with torch.autocast("cpu", BF16):
            y = ops.dora_linear(leaves[0], W, *leaves[1:4], 1.7, leaves[4], dropout_p=dropout_p, seed=3)
            assert y.dtype == BF16
            y.backward(dy.to(BF16))  # autocast on in backward too
        options = dict(dropout_p=dropout_p, seed=torch.tensor(3))
        exact = run(reference, x, W, A, B, m, b, dy.to(BF16), dtype=FP64, **options)
        arguments = (x.to(BF16), W.to(BF16), A.to(BF16), B.to(BF16), m, b.to(BF16), dy.to(BF16))
        plain = run(reference, *arguments, **options)
        assert_parity(y.detach(), plain["y"], exact["y"])
        for name, t in zip(("dx", "dA", "dB", "dm", "dbias"), leaves, strict=True):
            assert_parity(t.grad, plain[name].float(), exact[name], name)
            t.grad = None


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
def test_compile_and_opcheck(weight, dropout_p):
    from fastpeft.ops.lora_linear import _flatten

    x, W, A, B, m, b, dy = problem((2, 5, 64), 32, 4, FP32, FP32, weight, bias=True)

    def function(x, A, B, m, b):
        return ops.dora_linear(x, W, A, B, m, 1.5, b, dropout_p=dropout_p, seed=9).relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(t) for t in (x, A, B, m, b)]
        y = f(*inputs)
        y.backward(dy)
        results.append([y.detach()] + [t.grad for t in inputs])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)

    flat = _flatten(W)
    flat = (*flat[:5], list(flat[5]), flat[6])
    seed = torch.tensor(7) if dropout_p > 0 else None
    norm = ops.dora_norm(W, A, B, 1.5)
    tensors = (leaf(A), leaf(B), leaf(m), leaf(b), norm)
    arguments = (leaf(x), *flat, *tensors, 1.5, dropout_p, seed, True, None)
    torch.library.opcheck(torch.ops.fastpeft.dora_linear, arguments)


def test_backends_by_name_and_meta_tensors():
    x, W, A, B, m, b, _ = problem((6, 64), 32, 4, FP64, FP64, bias=True)
    eager = ops.dora_linear(x, W, A, B, m, 1.5, b, backend="eager")
    with use_backend("reference"):
        plain = ops.dora_linear(x, W, A, B, m, 1.5, b)
    assert torch.equal(plain, reference(x, W, A, B, m, 1.5, b)) and torch.allclose(plain, eager, atol=1e-12)
    assert ops.dora_linear(*(t.to("meta") for t in (x, W, A, B, m)), 1.5).shape == (6, 32)


def test_bad_input_is_refused_with_its_name():
    x, W, A, B, m, b, _ = problem((6, 64), 32, 4, FP32, FP32, bias=True)

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            ops.dora_linear(*arguments, **options)

    refused(ValueError, r"magnitude is \(31,\)", x, W, A, B, m[:31], 1.0)
    refused(ValueError, r"magnitude is \(32, 1\)", x, W, A, B, m[:, None], 1.0)
    refused(TypeError, "magnitude is torch.int64", x, W, A, B, m.long(), 1.0)
    refused(ValueError, "magnitude is .* on meta", x, W, A, B, m.to("meta"), 1.0)
    refused(ValueError, r"norm is \(31,\)", x, W, A, B, m, 1.0, norm=m[:31])
    refused(ValueError, r"last dimension of x must be 64", x[:, :63], W, A, B, m, 1.0)
    refused(ValueError, "dropout_p is 1.0", x, W, A, B, m, 1.0, dropout_p=1.0)
    refused(TypeError, "x is torch.bfloat16, but weight is torch.float32", x.to(BF16), W, A, B, m, 1.0)
