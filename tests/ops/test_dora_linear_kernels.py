"""dora_linear and dora_norm on their kernels: outputs and gradients against float64 over the backends, and the native
kernels of dora_linear by themselves: every instance, every way to cut the work, nothing written beside the outputs."""

import pytest
import torch

from fastpeft import NF4Weight, ops, use_backend
from fastpeft.ops.dora_linear_backends import RUNNERS
from fastpeft.reference.dora import dora_linear as reference
from fastpeft.reference.dora import dora_norm as reference_norm
from fastpeft.reference.dropout import keep_mask
from tests.backends import over
from tests.ops import test_lora_linear
from tests.ops.test_lora_kernels import DTYPES, RANKS, Buffers, each_dtype, launch, random, seed_of, twice
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS, KERNELS, CUDA = over("eager", "triton", "cuda"), over("triton", "cuda"), over("cuda")
each_weight = pytest.mark.parametrize("weight", ("dense", "nf4"))
SCALING = 1.7


# ---- dora_linear over the backends


def problem(shape, N, R, dtype=BF16, master=FP32, weight="dense", device="cpu", **options):
    """x, weight, A, B, magnitude, bias, dy: gains around one, some of them negative, one zero."""
    x, W, A, B, bias, dy = test_lora_linear.problem(shape, N, R, dtype, master, weight, device=device, **options)
    magnitude = reference_norm(W, A, B, SCALING).cpu() * (1 + torch.randn(N) / 4)
    magnitude[:1] = 0
    return x, W, A, B, magnitude.to(master).to(device), bias, dy


def run(function, x, weight, A, B, magnitude, bias, dy, dtype=None, weight_needs_gradient=False, **options):
    """Output and gradients by name; with `dtype` everything is computed in it."""
    x, A, B, magnitude = (leaf(t, dtype) for t in (x, A, B, magnitude))
    bias = None if bias is None else leaf(bias, dtype)
    if isinstance(weight, torch.Tensor):
        weight = leaf(weight, dtype) if weight_needs_gradient else weight.to(dtype or weight.dtype)
    y = function(x, weight, A, B, magnitude, SCALING, bias, **options)
    y.backward(dy.to(y.dtype))
    leaves = {"dx": x, "dA": A, "dB": B, "dm": magnitude, "dbias": bias}
    if weight_needs_gradient:
        leaves["dW"] = weight
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}


def check(arguments, backend, **options):
    """Parity of outputs and gradients where they are wanted, and of the output alone where they are not."""
    plain_options = dict(options)
    if "seed" in options:
        plain_options["seed"] = torch.tensor(options["seed"], device=arguments[0].device)
    plain = run(reference, *arguments, **plain_options)
    exact = run(reference, *arguments, dtype=FP64, **plain_options)
    actual = run(ops.dora_linear, *arguments, backend=backend.name, **options)
    assert actual.keys() == plain.keys()
    for key in actual:
        assert_parity(actual[key], plain[key], exact[key], key)
    options.pop("weight_needs_gradient", None)
    x, weight, A, B, magnitude, bias, _ = arguments
    with torch.no_grad():
        y = ops.dora_linear(x, weight, A, B, magnitude, SCALING, bias, backend=backend.name, **options)
    assert_parity(y, plain["y"], exact["y"], "y without gradients")
    return actual


@each_weight
@pytest.mark.parametrize("M", (0, 1, 33, 130))
@BACKENDS
def test_parity_over_sizes_of_batch(backend, M, weight):
    """Fewer rows than columns of the weight, so that dy is scaled, and, with 130 of them, more: then the weight is."""
    check(problem((M, 96), 65, 16, weight=weight, bias=True, device=backend.device), backend)


@pytest.mark.parametrize("dtype,master", [(BF16, BF16), (FP16, FP32), (FP16, FP16)])
@BACKENDS
def test_parity_over_types(backend, dtype, master):
    for weight, M in (("dense", 70), ("nf4", 19)):
        check(problem((M, 64), 90, 8, dtype, master, weight, device=backend.device), backend)


@pytest.mark.parametrize("R", (1, 13, 100))
@BACKENDS
def test_parity_over_ranks(backend, R):
    check(problem((33, 72), 65, R, weight="nf4", device=backend.device), backend)


@each_weight
@pytest.mark.parametrize("shape", [(17, 65), (2, 3, 5, 40), (130, 33)])
@BACKENDS
def test_parity_with_dropout(backend, shape, weight):
    arguments = problem(shape, 93, 8, weight=weight, bias=len(shape) > 2, device=backend.device)
    check(arguments, backend, dropout_p=0.3, seed=11)


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@BACKENDS
def test_gradient_of_a_dense_weight(backend, dropout_p):
    options = dict(weight_needs_gradient=True, norm=torch.rand(130, device=backend.device) + 0.5)
    options |= dict(dropout_p=dropout_p, seed=5) if dropout_p else {}
    check(problem((33, 64), 130, 4, device=backend.device), backend, **options)


@pytest.mark.parametrize("K,N,blocksize", [(40, 131, 32), (100, 97, 64), (72, 129, 4096)])
@BACKENDS
def test_parity_where_blocks_cross_rows(backend, K, N, blocksize):
    storage = dict(weight="nf4", blocksize=blocksize, nested=blocksize == 64, device=backend.device)
    for M in (17, 110):  # the kernel for few tokens, with its gain, and the others
        check(problem((M, K), N, 4, **storage), backend)


@BACKENDS
def test_parity_for_views(backend):
    x, W, A, B, magnitude, _, dy = problem((20, 72), 130, 8, device=backend.device)
    wide = torch.randn(20, 2, 145, device=backend.device).to(BF16)
    for view in (wide[:, 1, 3::2][:, :64], wide[:, :, 1:65]):
        dy_of_view = torch.randn(*view.shape[:-1], 130, device=backend.device).to(BF16)
        check((view, W[:, :64], A[:, 8:], B, magnitude, None, dy_of_view), backend)
    transposed = (t.t().contiguous().t() for t in (W, A, B))
    check((x, *transposed, magnitude, None, torch.ones_like(dy)[:1, :1].expand(20, 130)), backend)


@pytest.mark.parametrize("N,K,R", [(0, 16, 2), (8, 0, 2), (8, 16, 0)])
@BACKENDS
def test_empty_dimensions(backend, N, K, R):
    x, A, B, dy = torch.randn(3, K), torch.randn(R, K), torch.randn(N, R), torch.randn(3, N)
    tensors = (x.to(BF16), torch.randn(N, K).to(BF16), A, B, torch.rand(N), None, dy.to(BF16))
    check(tuple(None if t is None else t.to(backend.device) for t in tensors), backend)


@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
@each_weight
@BACKENDS
def test_a_row_of_zeros_gives_the_bias_and_no_gradient(backend, weight, dropout_p):
    x, W, A, B, magnitude, bias, dy = problem((30, 64), 90, 8, weight=weight, bias=True, device=backend.device)
    B[3] = 0
    if isinstance(W, NF4Weight):
        W = ops.nf4_quantize(W.dequantize().index_fill(0, torch.tensor(3, device=x.device), 0))
    else:
        W[3] = 0
    results = check((x, W, A, B, magnitude, bias, dy), backend, dropout_p=dropout_p, seed=2)
    assert all(t.isfinite().all() for t in results.values())
    assert (
        torch.equal(results["y"][:, 3], bias[3].expand(30)) and results["dm"][3] == 0 and (results["dB"][3] == 0).all()
    )


@KERNELS
def test_only_the_gradients_that_are_asked_for(backend):
    x, W, A, B, magnitude, _, dy = problem((9, 64), 40, 4, weight="nf4", device=backend.device)
    everything = run(ops.dora_linear, x, W, A, B, magnitude, None, dy, backend=backend.name)
    for wanted in ("x", "A", "B", "m", "xA", "ABm"):
        leaves = {name: leaf(t) if name in wanted else t for name, t in zip("xABm", (x, A, B, magnitude), strict=True)}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            y = ops.dora_linear(leaves["x"], W, leaves["A"], leaves["B"], leaves["m"], SCALING, backend=backend.name)
        assert sum(t.shape == y.shape for t in saved) == ("m" in wanted)  # z
        y.backward(dy)
        for name, t in leaves.items():
            assert (t.grad is None) == (name not in wanted)
            assert t.grad is None or torch.equal(t.grad, everything["d" + name])


@KERNELS
def test_the_same_bits_again_and_nothing_is_read_on_the_host(backend, monkeypatch):
    """A synchronisation would break CUDA graphs."""
    x, W, A, B, magnitude, bias, dy = problem((150, 64), 40, 4, weight="nf4", bias=True, device=backend.device)
    seed, scaling = torch.tensor(3, device=x.device), torch.tensor(1.5, device=x.device)

    def refuse(*_args):
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, refuse)
        for dropout_p in (0.0, 0.2):
            leaves = [[leaf(t) for t in (x, A, B, magnitude)] for _ in range(2)]
            for x_, A_, B_, m_ in leaves:
                options = dict(dropout_p=dropout_p, seed=seed, backend=backend.name)
                ops.dora_linear(x_, W, A_, B_, m_, scaling, bias, **options).backward(dy)
    for first, second in zip(*leaves, strict=True):
        assert torch.equal(first.grad, second.grad)


@each_weight
@KERNELS
def test_with_the_magnitude_of_the_start_it_is_the_base(backend, weight):
    x, W, A, B, _, bias, _ = problem((33, 64), 40, 4, weight=weight, bias=True, device=backend.device)
    B, options = torch.zeros_like(B), dict(backend=backend.name)
    norm = ops.dora_norm(W, A, B, 1.0, **options)
    base = ops.lora_linear(x, W, A, B, 1.0, **options)
    assert torch.equal(ops.dora_linear(x, W, A, B, norm, 1.0, norm=norm, **options), base)
    base = ops.lora_linear(x, W, A, B, 1.0, bias, dropout_p=0.3, seed=1, **options)
    dropped = ops.dora_linear(x, W, A, B, norm, 1.0, bias, norm=norm, dropout_p=0.3, seed=1, **options)
    assert torch.equal(dropped, base)


@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@CUDA
def test_the_backend_in_a_compiled_graph(backend, dropout_p):
    x, W, A, B, magnitude, bias, dy = problem((2, 5, 64), 32, 4, weight="nf4", bias=True, device=backend.device)

    def function(x, A, B, magnitude, bias):
        return ops.dora_linear(x, W, A, B, magnitude, 1.5, bias, dropout_p=dropout_p, seed=9).relu()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [leaf(t) for t in (x, A, B, magnitude, bias)]
        with use_backend(backend.name):
            y = f(*leaves)
            y.backward(dy)
        results.append([y.detach()] + [t.grad for t in leaves])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# ---- dora_norm over the backends


@KERNELS
def test_norm_over_storage_and_types(backend):
    for dtype, A_dtype, B_dtype, weight in (
        (BF16, FP32, FP32, "nf4"),
        (BF16, FP16, FP16, "nf4"),
        (BF16, BF16, BF16, "dense"),
        (FP16, BF16, BF16, "dense"),
        (BF16, BF16, FP32, "dense"),
    ):
        _, W, A, B, *_ = problem((1, 72), 33, 5, dtype, FP32, weight, device=backend.device)
        A, B = A.to(A_dtype), B.to(B_dtype)
        norm = ops.dora_norm(W, A, B, SCALING, backend=backend.name)
        exact = reference_norm(W.double() if weight == "dense" else W, A.double(), B.double(), SCALING)
        assert_parity(norm, reference_norm(W, A, B, SCALING), exact)
        of_tensor = ops.dora_norm(W, A, B.float(), torch.tensor(SCALING, device=W.device), backend=backend.name)
        assert torch.allclose(of_tensor, norm, rtol=1e-5)
    transposed = torch.randn(72, 33, device=backend.device).to(BF16).t()
    norm = ops.dora_norm(transposed, A, B, SCALING, backend=backend.name)
    assert torch.equal(norm, ops.dora_norm(transposed.contiguous(), A, B, SCALING, backend=backend.name))


@KERNELS
def test_norm_refuses_what_no_kernel_takes(backend):
    W, A, B = (torch.randn(shape, device=backend.device) for shape in ((8, 16), (2, 16), (8, 2)))
    for tensors in ((W, A, B), (W.to(BF16), A.double(), B.double())):
        with pytest.raises(ValueError, match=f"dora_norm cannot run on backend '{backend.name}': .* the kernels take"):
            ops.dora_norm(*tensors, 1.0, backend=backend.name)


# ---- the passes over [M, N]


@pytest.mark.parametrize("shape", ((1, 8), (3, 3), (33, 264), (70, 129)), ids=str)
@KERNELS
def test_sum_with_gain_and_dropout(backend, shape):
    seed, gain = seed_of(-(2**40) - 7, backend), torch.randn(shape[1], device=backend.device)
    for dtype, p, with_gain, into in (
        (BF16, 0.0, True, "new"),
        (BF16, 0.3, False, "new"),
        (FP16, 0.3, True, "offset"),
        (FP16, 0.5, False, "x"),
    ):
        x, offset = random(shape, dtype, backend, odd=into == "x"), random(shape, dtype, backend)
        exact = x.cpu().double() * (keep_mask(seed.cpu(), *shape, p) if p else 1)
        exact = exact * (gain.cpu().double() if with_gain else 1) + (offset.cpu().double() if into == "offset" else 0)
        buffers = Buffers(backend.device)
        out = buffers.new(shape, dtype, odd=into == "x")
        if into != "new":
            out.copy_(x if into == "x" else offset)
        options = (gain if with_gain else None, out if into == "offset" else None, p, seed if p else None)
        RUNNERS[backend.name].add(out, out if into == "x" else x, *options)
        buffers.check()
        assert_parity(out.cpu(), exact.to(dtype), exact, f"{dtype} {p} {with_gain} {into}")


@pytest.mark.parametrize("shape", ((0, 9), (1, 8), (33, 131), (70, 257), (300, 16)), ids=str)
@KERNELS
def test_gradient_of_the_gain(backend, shape):
    for dtype, odd in ((BF16, False), (BF16, True), (FP16, False), (FP16, True)):
        dy, z = random(shape, dtype, backend, odd), random(shape, dtype, backend)

        def run(_buffers, dy=dy, z=z):
            return [RUNNERS[backend.name].gain_grad(dy, z)]

        (dgain,) = twice(backend, run) if backend.name == "cuda" else (run(None)[0].cpu(),)
        products = dy.cpu().double() * z.cpu().double()
        assert_parity(dgain, products.float().sum(0), products.sum(0), f"{dtype}")


def check_add_with_gain(backend, M, N, R, dtype, master, with_bias=True, odd=False):
    y, xa, B = random((M, N), dtype, backend, odd), random((M, R), dtype, backend), random((N, R), master, backend)
    gain, bias = random((N,), FP32, backend, odd), random((N,), dtype, backend, odd) if with_bias else None
    common = dict(xa=xa, lora_b=B, adapter_dtype=master, transposed=False, scale=SCALING, seed=None, dropout_p=0.0)

    def add(buffers, keep_y):
        z = buffers.new((M, N), dtype, odd).copy_(y)
        out = buffers.new((M, N), dtype) if keep_y else z
        arguments = dict(common, y=z, gain=gain, bias=bias, out=out)
        launch("lora_add", backend.device, dtype, dict(M=M, N=N, R=R), **arguments)
        return [z, out] if keep_y else [out]

    (z, out), (alone,) = (twice(backend, lambda buffers, keep_y=k: add(buffers, keep_y)) for k in (True, False))
    assert torch.equal(out, alone)
    y, xa, B, gain = y.cpu(), xa.cpu(), B.cpu().to(dtype), gain.cpu()
    bias = 0 if bias is None else bias.cpu()
    exact = y.double() + SCALING * (xa.double() @ B.double().t())
    assert_parity(z, y + SCALING * (xa @ B.t()), exact, f"z {M, N, R}")
    # One rounding, of the float32 sum: within half a unit in the last place of the largest term.
    result = gain.double() * exact + (bias.double() if with_bias else 0)
    bound = torch.finfo(dtype).eps / 2 * result.abs() + 1e-5 * (gain.double() * exact).abs().max()
    assert ((out.double() - result).abs() <= bound).all()


@each_dtype
@pytest.mark.parametrize("R", RANKS)
@CUDA
def test_a_second_output_with_gain_over_ranks(backend, R, dtype, master):
    check_add_with_gain(backend, 70, 136, R, dtype, master, with_bias=R % 2 == 0)


@pytest.mark.parametrize("shape", ((1, 8), (3, 3), (33, 131), (129, 257)), ids=str)
@CUDA
def test_a_second_output_with_gain_over_shapes(backend, shape):
    check_add_with_gain(backend, *shape, 4, *DTYPES[0])
    check_add_with_gain(backend, *shape, 33, *DTYPES[3], odd=True)
    check_add_with_gain(backend, *shape, 0, *DTYPES[1])


@CUDA
def test_a_gain_with_dropout_or_without_an_output_is_refused(backend):
    y, xa, B, gain = (torch.zeros(8, 8, device=backend.device, dtype=dtype) for dtype in (BF16, BF16, BF16, FP32))
    arguments = dict(y=y, xa=xa, lora_b=B, adapter_dtype=BF16, scale=1.0, gain=gain[0].contiguous())
    for others in (
        dict(transposed=False, seed=None, dropout_p=0.0, out=None),
        dict(transposed=True, seed=None, dropout_p=0.0, out=y),
        dict(transposed=False, seed=seed_of(1, backend), dropout_p=0.5, out=y),
    ):
        with pytest.raises(RuntimeError, match="lora_add: cudaErrorInvalidValue"):
            launch("lora_add", backend.device, BF16, dict(M=8, N=8, R=8), **arguments, bias=None, **others)
