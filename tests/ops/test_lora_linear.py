"""lora_linear: outputs and gradients against float64, and what autograd, compile and checkpointing ask of an op."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import ops, use_backend
from fastpeft.reference.dropout import keep_mask
from fastpeft.reference.lora_linear import lora_linear as reference
from tests.backends import over
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def problem(shape, N, R, dtype, master, weight="dense", bias=False, nested=True, blocksize=64, device="cpu"):
    """x, weight, A, B, bias, dy: random, of the sizes that a trained adapter has."""
    K = shape[-1]
    x, W, dy = torch.randn(shape), torch.randn(N, K) / K**0.5, torch.randn(*shape[:-1], N)
    A, B = torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5
    W = ops.nf4_quantize(W.to(dtype), blocksize, nested, backend="eager") if weight == "nf4" else W.to(dtype)
    tensors = x.to(dtype), W, A.to(master), B.to(master), torch.randn(N).to(dtype) if bias else None, dy.to(dtype)
    return tuple(None if t is None else t.to(device) for t in tensors)


def run(function, x, weight, A, B, bias, dy, dtype=None, **options):
    """Output and gradients by name; with `dtype` everything is computed in it."""
    x, A, B = leaf(x, dtype), leaf(A, dtype), leaf(B, dtype)
    bias = None if bias is None else leaf(bias, dtype)
    if isinstance(weight, torch.Tensor) and dtype is not None:
        weight = weight.to(dtype)
    y = function(x, weight, A, B, 1.7, bias, **options)
    y.backward(dy.to(y.dtype))
    results = {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad}
    return results if bias is None else results | {"dbias": bias.grad}


def check(arguments, backend=None, **options):
    """Parity of outputs and gradients with gradients wanted, of the output without, and both again, bit for bit."""
    name = None if backend is None else backend.name
    plain_options = {key: value for key, value in options.items() if key != "fold"}
    if "seed" in options:
        plain_options["seed"] = torch.tensor(options["seed"], device=arguments[0].device)
    plain = run(reference, *arguments, **plain_options)
    exact = run(reference, *arguments, dtype=FP64, **plain_options)
    actual = run(ops.lora_linear, *arguments, backend=name, **options)
    assert actual.keys() == plain.keys()
    for key in actual:
        assert_parity(actual[key], plain[key], exact[key], key)
    again = run(ops.lora_linear, *arguments, backend=name, **options)
    assert all(torch.equal(actual[key], again[key]) for key in actual)
    x, weight, A, B, bias, _ = arguments
    with torch.no_grad():
        inference = [ops.lora_linear(x, weight, A, B, 1.7, bias, backend=name, **options) for _ in range(2)]
    assert_parity(inference[0], plain["y"], exact["y"], "y without gradients")
    assert torch.equal(*inference)


BACKENDS = over("eager", "triton", "cuda")


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("dtype,master", [(BF16, FP32), (BF16, BF16), (FP16, FP32)])
@pytest.mark.parametrize("M", (0, 1, 7, 33, 63, 130))
@BACKENDS
def test_parity_over_sizes_of_batch(backend, M, dtype, master, weight):
    check(problem((M, 192), 65, 16, dtype, master, weight, device=backend.device), backend)


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("M", (0, 1, 63, 129))
def test_parity_in_float32(M, weight):
    check(problem((M, 192), 128, 16, FP32, FP32, weight))


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("R", (1, 4, 13, 64, 384))
@BACKENDS
def test_parity_over_ranks(backend, R, weight):
    check(problem((33, 136), 65, R, BF16, FP32, weight, bias=True, device=backend.device), backend)


@pytest.mark.parametrize("K,N", [(8, 8), (40, 31), (100, 7), (72, 65)])
@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("blocksize", (32, 64, 4096))
@BACKENDS
def test_parity_over_4bit_storage(backend, K, N, nested, blocksize):
    storage = dict(nested=nested, blocksize=blocksize, device=backend.device)
    check(problem((17, K), N, 4, BF16, FP32, "nf4", **storage), backend)


@BACKENDS
def test_parity_over_codes_that_are_no_words(backend):
    """Codes that begin at an odd byte: no kernel that reads them by words may take them."""
    x, weight, *rest = problem((17, 72), 9, 4, BF16, FP32, "nf4", device=backend.device)
    packed = torch.cat([weight.packed.new_zeros(1), weight.packed])[1:]
    check((x, replace(weight, packed=packed), *rest), backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    "M,K,blocksize", [(1, 4160, 64), (2, 1096, 32), (9, 640, 128), (66, 328, 256), (3, 320, 512), (5, 576, 2048)]
)
@BACKENDS
def test_parity_of_long_rows(backend, M, K, blocksize):
    """Blocks that cross rows, sums that are split; a token, few, and more than the kernel for few takes."""
    storage = dict(nested=M > 1, blocksize=blocksize, device=backend.device)
    check(problem((M, K), 24, 5, FP16, FP16, "nf4", **storage), backend)


@pytest.mark.parametrize("shape", [(192,), (5, 192), (2, 5, 192), (2, 3, 5, 192)])
@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@BACKENDS
def test_parity_over_dimensions_bias_and_dropout(backend, shape, dropout_p):
    for weight, bias in (("dense", False), ("nf4", True)):
        arguments = problem(shape, 64, 8, BF16, FP32, weight, bias=bias, device=backend.device)
        check(arguments, backend, dropout_p=dropout_p, seed=11)
        if backend.name == "eager":
            check(problem(shape, 64, 8, FP32, FP32, weight, bias=bias), dropout_p=dropout_p, seed=11)


@BACKENDS
def test_parity_for_views(backend):
    """Non-contiguous and offset x; a transposed weight (Conv1D keeps [K, N]); an expanded gradient; odd addresses."""
    dtype = BF16 if backend.name != "eager" else FP32
    x, W, A, B, _, dy = problem((6, 72), 32, 4, dtype, FP32, device=backend.device)
    wide = torch.randn(6, 2, 145, device=backend.device).to(dtype)
    for view in (wide[:, 1, 3::2][:, :64], wide[:, :, 1:65], torch.randn(64, 6, device=backend.device).to(dtype).t()):
        dy_of_view = torch.randn(*view.shape[:-1], 32, device=backend.device).to(dtype)
        check((view, W[:, :64], A[:, 8:], B, None, dy_of_view), backend)
    check((x, W.t().contiguous().t(), A.t().contiguous().t(), B.t().contiguous().t(), None, dy), backend)
    check((x, W, A, B, None, torch.ones(1, 1, dtype=dtype, device=backend.device).expand(6, 32)), backend)
    flat = torch.randn(1 + 32 * 72 + 4 * 72, device=backend.device).to(dtype)
    odd_W, odd_A = flat[1 : 1 + 32 * 72].view(32, 72), flat[1 + 32 * 72 :].view(4, 72)
    check((x, odd_W, odd_A, B, None, dy), backend)


@BACKENDS
def test_only_the_gradients_that_are_asked_for(backend):
    x, W, A, B, _, dy = problem((9, 64), 40, 4, BF16, FP32, "nf4", device=backend.device)
    everything = run(ops.lora_linear, x, W, A, B, None, dy, backend=backend.name)
    for wanted in ("x", "A", "B", "xA", "xB", "AB"):
        leaves = {name: leaf(t) if name in wanted else t for name, t in (("x", x), ("A", A), ("B", B))}
        ops.lora_linear(leaves["x"], W, leaves["A"], leaves["B"], 1.7, backend=backend.name).backward(dy)
        for name in "xAB":
            assert (leaves[name].grad is None) == (name not in wanted)
            if name in wanted:
                assert torch.equal(leaves[name].grad, everything["d" + name])


@BACKENDS
def test_nothing_is_read_on_the_host(backend, monkeypatch):
    """A synchronisation would break CUDA graphs; test_lora_linear_gpu.py captures some."""
    x, W, A, B, bias, dy = problem((9, 64), 40, 4, BF16, FP32, "nf4", bias=True, device=backend.device)
    x, A, B = leaf(x), leaf(A), leaf(B)
    options = dict(dropout_p=0.2, seed=torch.tensor(3, device=x.device), backend=backend.name)
    scaling = torch.tensor(1.5, device=x.device)

    def refuse(*_args):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    ops.lora_linear(x, W, A, B, scaling, bias, **options).backward(dy)
    with torch.no_grad():
        ops.lora_linear(x, W, A, B, scaling, bias, backend=backend.name)


@pytest.mark.parametrize("N,K,R", [(0, 16, 2), (8, 0, 2), (8, 16, 0)])
@BACKENDS
def test_empty_dimensions(backend, N, K, R):
    x, A, B, dy = torch.randn(3, K), torch.randn(R, K), torch.randn(N, R), torch.randn(3, N)
    tensors = (x.to(BF16), torch.randn(N, K).to(BF16), A, B, None, dy.to(BF16))
    check(tuple(None if t is None else t.to(backend.device) for t in tensors), backend)


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("M", (5, 33))
@BACKENDS
def test_parity_with_a_folded_update(backend, M, weight):
    check(problem((M, 136), 65, 8, BF16, FP32, weight, bias=True, device=backend.device), backend, fold=True)


def test_a_folded_update_under_dropout_is_not_folded():
    x, W, A, B, _, _ = problem((5, 64), 32, 4, FP32, FP32)
    options = dict(dropout_p=0.5, seed=3)
    assert torch.equal(
        ops.lora_linear(x, W, A, B, 1.0, fold=True, **options), ops.lora_linear(x, W, A, B, 1.0, **options)
    )


def test_what_folding_loses_and_where():
    """An outlier channel in every token and an update far smaller than the weight: the reason why folding is opt-in."""
    x, W, A, B, _, _ = problem((256, 512), 384, 8, BF16, FP32)
    x[:, 7] = 60.0

    def errors(scaling, fold):
        """Of the update, relative: token by token, and of its mean over tokens, where independent errors cancel."""
        update = ops.lora_linear(x, W, A, B, scaling, fold=fold).double() - x.double() @ W.double().t()
        exact = scaling * (x.double() @ A.double().t()) @ B.double().t()
        error = update - exact
        return error.norm() / exact.norm(), error.mean(0).norm() / exact.mean(0).norm()

    for scaling in (4.0, 0.1):
        folded, added = errors(scaling, fold=True), errors(scaling, fold=False)
        assert folded[0] < 1.1 * added[0]  # a token's result is as good either way
        if scaling == 4.0:
            assert folded[1] < 2 * added[1] < 0.01
        else:
            assert folded[1] > 4 * added[1]  # the same error in all tokens


def test_gradcheck_in_float64():
    x, W, A, B, b, _ = problem((3, 4, 10), 6, 3, FP64, FP64, bias=True)
    inputs = tuple(leaf(t) for t in (x, W, A, B, b))
    for options in ({}, {"dropout_p": 0.4, "seed": 5}, {"fold": True}):
        assert torch.autograd.gradcheck(
            lambda x, W, A, B, b, o=options: ops.lora_linear(x, W, A, B, 0.7, b, **o), inputs
        )


def test_scaling_may_be_a_tensor_and_gets_a_gradient():
    x, W, A, B, _, _ = problem((5, 24), 16, 3, FP64, FP64)
    scaling = torch.tensor(1.7, dtype=FP64, requires_grad=True)
    assert torch.equal(ops.lora_linear(x, W, A, B, scaling), ops.lora_linear(x, W, A, B * 1.7, 1.0))
    assert torch.autograd.gradcheck(lambda s: ops.lora_linear(x, W, A, B, s), (scaling,))


def test_gradients_come_in_the_type_of_the_parameter_and_only_where_asked():
    x, W, A, B, _, dy = problem((5, 64), 32, 4, BF16, FP32)
    A = leaf(A)
    y = ops.lora_linear(x, W, A, B, 1.0)
    assert y.dtype == BF16
    y.backward(dy)
    assert A.grad.dtype == FP32 and A.grad.is_contiguous() and B.grad is None and x.grad is None and W.grad is None
    assert not ops.lora_linear(x, W, A.detach(), B, 1.0).requires_grad


@BACKENDS
def test_saves_x_xa_and_parameters_only(backend):
    """Saved for backward: no float32 copy of x, no mask, no dequantized weight."""
    x, W, A, B, _, _ = problem((96, 256), 192, 8, BF16, FP32, "nf4", device=backend.device)
    x, A, B = leaf(x), leaf(A), leaf(B)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(x, W, A, B, 1.0, dropout_p=0.5, backend=backend.name)
    sizes = sorted((tuple(t.shape), t.dtype) for t in saved)
    wanted = [((96, 256), BF16), ((96, 8), BF16), ((8, 256), FP32), ((192, 8), FP32), ((), torch.int64)]
    assert sizes == sorted(wanted)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_double_use_retain_graph_and_second_derivative():
    x, W, A, B, _, _ = problem((5, 24), 24, 3, FP64, FP64)
    W, x, A, B = W, leaf(x), leaf(A), leaf(B)
    inner = ops.lora_linear(x, W, A, B, 0.5)
    loss = ops.lora_linear(inner, W, A, B, 0.5).square().sum()
    first = torch.autograd.grad(loss, (x, A, B), retain_graph=True)
    second = torch.autograd.grad(loss, (x, A, B))
    plain = reference(reference(x, W, A, B, 0.5), W, A, B, 0.5).square().sum()
    for a, b, c in zip(first, second, torch.autograd.grad(plain, (x, A, B)), strict=True):
        assert torch.equal(a, b) and torch.allclose(a, c, rtol=1e-10)
    (dx,) = torch.autograd.grad(ops.lora_linear(x, W, A, B, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        dx.sum().backward()


def test_the_output_may_be_changed_in_place():
    for shape in ((6, 64), (2, 3, 64)):
        x, W, A, B, _, _ = problem(shape, 32, 4, FP64, FP64)
        A = leaf(A)
        y = ops.lora_linear(x, W, A, B, 1.5)
        y *= 2
        torch.relu_(y)
        y.sum().backward()
        (expected,) = torch.autograd.grad((2 * reference(x, W, A, B, 1.5)).relu().sum(), A)
        assert torch.allclose(A.grad, expected)


def test_backward_under_an_autocast_that_was_off_in_forward():
    x, W, A, B, _, _ = problem((6, 64), 32, 4, FP32, FP32)
    x, A, B = leaf(x), leaf(A), leaf(B)
    with torch.autocast("cpu", BF16):
        with torch.autocast("cpu", enabled=False):
            y = ops.lora_linear(x, W, A, B, 1.5)
        y.sum().backward()
    expected = torch.autograd.grad(reference(x, W, A, B, 1.5).sum(), (x, A, B))
    for t, e in zip((x, A, B), expected, strict=True):
        assert torch.allclose(t.grad, e, rtol=1e-4, atol=1e-5)


def test_meta_tensors():
    x, W, A, B, _, _ = problem((2, 3, 64), 32, 4, FP32, FP32)
    assert ops.lora_linear(*(t.to("meta") for t in (x, W, A, B)), 1.5).shape == (2, 3, 32)


def test_changed_parameters_between_forward_and_backward_are_noticed():
    x, W, A, B, _, dy = problem((5, 24), 16, 3, FP32, FP32)
    A, B = leaf(A), leaf(B)
    y = ops.lora_linear(leaf(x), W, A, B, 1.0)
    with torch.no_grad():
        B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_draws_the_same_mask_again(reentrant):
    x, W, A, B, _, dy = problem((16, 64), 64, 4, FP32, FP32)
    x, A, B = leaf(x), leaf(A), leaf(B)

    def block(x):
        return ops.lora_linear(ops.lora_linear(x, W, A, B, 2.0, dropout_p=0.5), W, A, B, 2.0, dropout_p=0.5).tanh()

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.backward(dy)
        gradients.append([t.grad.clone() for t in (x, A, B)])
        x.grad = A.grad = B.grad = None
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_dropout_mask_is_fair_and_made_of_its_seed():
    seed = torch.tensor(12345)
    keep = keep_mask(seed, 2000, 1000, 0.3)
    assert torch.equal(keep, keep_mask(seed, 2000, 1000, 0.3))
    assert torch.equal(keep[:7, :5], keep_mask(seed, 7, 5, 0.3))  # does not depend on the size
    values = keep.double()
    # Means of 2e6, 1000 and 2000 Bernoulli draws, and correlations of neighbours: within five standard deviations.
    deviation = (0.3 * 0.7) ** 0.5
    assert abs(values.mean() - 0.7) < 5 * deviation / 2e6**0.5
    assert (values.mean(0) - 0.7).abs().max() < 5 * deviation / 2000**0.5
    assert (values.mean(1) - 0.7).abs().max() < 5 * deviation / 1000**0.5
    centred = (values - 0.7) / deviation
    other = (keep_mask(seed + 1, 2000, 1000, 0.3).double() - 0.7) / deviation
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred, other)):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    assert keep_mask(seed, 100, 100, 0.0).all()


def test_dropout_seed_comes_from_the_generator():
    x, W, A, B, _, _ = problem((16, 64), 64, 4, FP32, FP32)
    torch.manual_seed(0)
    first, second = (ops.lora_linear(x, W, A, B, 1.0, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(ops.lora_linear(x, W, A, B, 1.0, dropout_p=0.5), first) and not torch.equal(first, second)


def test_autocast():
    x, W, A, B, b, dy = problem((7, 64), 32, 4, FP32, FP32, bias=True)
    x, A, B, b = leaf(x), leaf(A), leaf(B), leaf(b)
    with torch.autocast("cpu", BF16):
        y = ops.lora_linear(x, W, A, B, 1.7, b)
    assert y.dtype == BF16
    y.backward(dy.to(BF16))
    exact = run(reference, x, W, A, B, b, dy.to(BF16), dtype=FP64)
    with torch.autocast("cpu", BF16):
        plain_inputs = [leaf(t) for t in (x, A, B, b)]
        base = torch.nn.functional.linear(plain_inputs[0], W, plain_inputs[3])
        low = torch.nn.functional.linear(torch.nn.functional.linear(plain_inputs[0], plain_inputs[1]), plain_inputs[2])
        plain = base + 1.7 * low
    plain.backward(dy.to(BF16))
    assert_parity(y.detach(), plain.detach(), exact["y"])
    for mine, theirs, name in zip((x, A, B, b), plain_inputs, ("dx", "dA", "dB", "dbias"), strict=True):
        assert_parity(mine.grad, theirs.grad, exact[name], name)


@pytest.mark.parametrize("weight", ("dense", "nf4"))
def test_opcheck(weight):
    from fastpeft.ops.lora_linear import _flatten

    x, W, A, B, b, _ = problem((2, 5, 64), 32, 4, FP32, FP32, weight, bias=True)
    flat = _flatten(W)
    flat = (*flat[:5], list(flat[5]), flat[6])
    for p, seed, fold in ((0.0, None, False), (0.5, torch.tensor(7), False), (0.0, None, True)):
        torch.library.opcheck(
            torch.ops.fastpeft.lora_linear,
            (leaf(x), *flat, leaf(A), leaf(B), leaf(b), 1.5, p, seed, True, fold, None),
        )


@pytest.mark.parametrize("weight", ("dense", "nf4"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
def test_compile_fullgraph(weight, dropout_p):
    x, W, A, B, b, dy = problem((2, 5, 64), 32, 4, FP32, FP32, weight, bias=True)

    def function(x, A, B, b):
        return ops.lora_linear(x, W, A, B, 1.5, b, dropout_p=dropout_p, seed=9).relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(t) for t in (x, A, B, b)]
        y = f(*inputs)
        y.backward(dy)
        results.append([y.detach()] + [t.grad for t in inputs])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
def test_compile_with_inductor_and_changing_batch():
    x, W, A, B, _, _ = problem((6, 64), 32, 4, FP32, FP32)
    compiled = torch.compile(lambda x: ops.lora_linear(x, W, A, B, 1.5) * 2, fullgraph=True, dynamic=True)
    for M in (6, 9, 31):
        x = torch.randn(M, 64)
        assert torch.allclose(compiled(x), ops.lora_linear(x, W, A, B, 1.5) * 2, atol=1e-6)


def test_backends_by_name():
    x, W, A, B, _, _ = problem((6, 64), 32, 4, FP64, FP64)
    eager = ops.lora_linear(x, W, A, B, 1.5, backend="eager")
    with use_backend("reference"):
        plain = ops.lora_linear(x, W, A, B, 1.5)
        with use_backend("eager"):
            assert torch.equal(ops.lora_linear(x, W, A, B, 1.5), eager)
    assert torch.equal(plain, reference(x, W, A, B, 1.5)) and torch.allclose(plain, eager, atol=1e-12)
    with pytest.raises(ValueError, match="'nonsense'; allowed are"):
        use_backend("nonsense")


def test_bad_input_is_refused_with_its_name():
    x, W, A, B, b, _ = problem((6, 64), 32, 4, FP32, FP32, bias=True)

    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            ops.lora_linear(*arguments, **options)

    refused(ValueError, r"last dimension of x must be 64", x[:, :63], W, A, B, 1.0)
    refused(ValueError, r"\[R, 64\] and \[32, R\]", x, W, A[:3], B, 1.0)
    refused(ValueError, r"\[R, 64\] and \[32, R\]", x, W, A.t(), B, 1.0)
    refused(ValueError, r"bias is \(31,\)", x, W, A, B, 1.0, b[:31])
    refused(ValueError, "dropout_p is 1.0", x, W, A, B, 1.0, dropout_p=1.0)
    refused(TypeError, "x is torch.bfloat16, but weight is torch.float32", x.to(BF16), W, A, B, 1.0)
    refused(TypeError, "int64", x, W, A.long(), B, 1.0)
    refused(ValueError, "A on meta", x, W, A.to("meta"), B, 1.0)
    refused(TypeError, "weight must be", x, W[0], A, B, 1.0)
    refused(TypeError, "scaling is '2'", x, W, A, B, "2")
    refused(ValueError, r"scaling is \(4,\)", x, W, A, B, torch.ones(4))
    refused(ValueError, r"seed is \(3,\)", x, W, A, B, 1.0, dropout_p=0.1, seed=torch.zeros(3, dtype=torch.int64))
    refused(ValueError, "seed is 0.5", x, W, A, B, 1.0, dropout_p=0.1, seed=0.5)
