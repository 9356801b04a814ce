"""The native kernels of lora_linear, called directly: small shapes that reach every instance, way to cut the work, and
edge; outputs against float64, and nothing written beside them."""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.launches import CUDA_DYNAMIC_SHARED_BYTES
from benchmarks.machine_code import dynamic_shared_bytes
from fastpeft import NF4Weight, _native
from fastpeft.quant import native_dtype, native_storage
from fastpeft.reference import nf4 as formula
from fastpeft.reference.dropout import keep_mask
from tests.backends import emulation, over
from tests.parity import assert_parity

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32))  # of x, of the adapter
RANKS = (1, 13, 16, 24, 64, 72, 384)

CUDA = over("cuda")
two_dtypes = pytest.mark.parametrize("dtype,master", DTYPES[1:3], ids=("bf16-fp32", "fp16"))
each_dtype = pytest.mark.parametrize("dtype,master", DTYPES, ids=("bf16", "bf16-fp32", "fp16", "fp16-fp32"))


class Buffers:
    """Outputs and workspaces of exactly their size, inside of memory that must stay what it is."""

    GUARD, MARK = 256, 0x5A  # bytes on both sides

    def __init__(self, device):
        self.device, self.whole = device, []

    def new(self, shape, dtype, odd=False):
        """Poisoned with NaN; `odd`: aligned to one element."""
        size, itemsize = torch.Size(shape).numel(), dtype.itemsize
        begin = self.GUARD + (itemsize if odd else 0)
        whole = torch.full((begin + size * itemsize + self.GUARD,), self.MARK, dtype=torch.uint8, device=self.device)
        inner = slice(begin, begin + size * itemsize)
        whole[inner] = 0xFF
        self.whole.append((whole, inner))
        return whole[inner].view(dtype).view(shape)

    def check(self):
        for whole, inner in self.whole:
            assert (whole[: inner.start] == self.MARK).all(), "written before the beginning"
            assert (whole[inner.stop :] == self.MARK).all(), "written past the end"


def launch(name, device, dtype, sizes, **arguments):
    """Calls the native `name`; tensors become addresses, None becomes 0."""
    module, buffers = _native.cuda, Buffers(device)
    pointers = {
        key: value if isinstance(value, (int, float, bool)) else 0 if value is None else value.data_ptr()
        for key, value in arguments.items()
        if key not in ("nf4", "adapter_dtype")
    }
    if "nf4" in arguments:
        pointers["nf4"] = None if arguments["nf4"] is None else native_storage(arguments["nf4"])
    with _native.stream_on(torch.device(device)) as stream:
        if hasattr(module, f"{name}_workspace_bytes"):
            workspace = buffers.new((getattr(module, f"{name}_workspace_bytes")(**sizes),), torch.uint8)
            pointers["workspace"] = workspace.data_ptr()
        types = dict(dtype=native_dtype(dtype), adapter_dtype=native_dtype(arguments["adapter_dtype"]))
        getattr(module, name)(**pointers, **types, **sizes, stream=stream)
    buffers.check()


def twice(backend, run, sms=4):
    """The outputs of `run(buffers)`, which are the same in another order of threads and blocks."""
    results = []
    for seed in (1, 2):
        if backend.device == "cpu":
            emulation().configure(order="random", seed=seed, cp_async="lazy" if seed == 1 else "eager", sms=sms)
        buffers = Buffers(backend.device)
        results.append(run(buffers))
        buffers.check()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    return [result.cpu() for result in results[0]]


def random(shape, dtype, backend, odd=False):
    """Standard normal; `odd`: as a view that is aligned to one element."""
    numel = torch.Size(shape).numel()
    return torch.randn(numel + 1).to(dtype).to(backend.device)[int(odd) : numel + int(odd)].view(shape)


# ---- the low-rank passes of training

SCALE = 1.7


def seed_of(number, backend):
    return torch.tensor(number, dtype=torch.int64, device=backend.device)


def mask_of(seed, rows, columns, p):
    return keep_mask(seed.cpu(), rows, columns, p) if seed is not None else torch.ones(rows, columns, dtype=torch.bool)


def check_down(backend, M, K, R, dtype, master, p=0.0, odd=False):
    x, A = random((M, K), dtype, backend, odd), random((R, K), master, backend, odd)
    seed = seed_of(-(2**40) - 7, backend) if p else None

    def run(buffers):
        xa = buffers.new((M, R), dtype, odd)
        arguments = dict(x=x, lora_a=A, adapter_dtype=master, xa=xa, seed=seed, dropout_p=p)
        launch("lora_down", backend.device, dtype, dict(M=M, K=K, R=R), **arguments)
        return [xa]

    (xa,) = twice(backend, run)
    x, A = x.cpu() * mask_of(seed, M, K, p), A.cpu()
    assert_parity(xa, x @ A.to(dtype).t(), x.double() @ A.double().t(), f"xa {M, K, R}")


def check_up_grad(backend, M, N, R, dtype, master, wanted=("u", "d_b"), odd=False):
    dy, B = random((M, N), dtype, backend, odd), random((N, R), master, backend, odd)
    xa = random((M, R), dtype, backend, odd)

    def run(buffers):
        outputs = {"u": buffers.new((M, R), dtype, odd), "d_b": buffers.new((N, R), master, odd)}
        outputs = {name: outputs[name] if name in wanted else None for name in outputs}
        inputs = dict(dy=dy, lora_b=B, adapter_dtype=master, xa=xa, scale=SCALE)
        launch("lora_up_grad", backend.device, dtype, dict(M=M, N=N, R=R), **inputs, **outputs)
        return [outputs[name] for name in wanted]

    results = dict(zip(wanted, twice(backend, run), strict=True))
    dy, xa, B = dy.cpu(), xa.cpu(), B.cpu()
    if "u" in wanted:
        assert_parity(results["u"], dy @ B.to(dtype), dy.double() @ B.double(), f"u {M, N, R}")
    if "d_b" in wanted:
        plain = (SCALE * (dy.t() @ xa)).to(master)
        assert_parity(results["d_b"], plain, SCALE * (dy.t().double() @ xa.double()), f"dB {M, N, R}")


def check_down_grad(backend, M, K, R, dtype, master, p=0.0, odd=False):
    x, u = random((M, K), dtype, backend, odd), random((M, R), dtype, backend, odd)
    seed = seed_of(12345, backend) if p else None

    def run(buffers):
        d_a = buffers.new((R, K), master, odd)
        arguments = dict(x=x, u=u, d_a=d_a, adapter_dtype=master, scale=SCALE, seed=seed, dropout_p=p)
        launch("lora_down_grad", backend.device, dtype, dict(M=M, K=K, R=R), **arguments)
        return [d_a]

    (d_a,) = twice(backend, run)
    x, u = x.cpu() * mask_of(seed, M, K, p), u.cpu()
    plain, exact = (SCALE * (u.t() @ x)).to(master), SCALE * (u.t().double() @ x.double())
    assert_parity(d_a, plain, exact, f"dA {M, K, R}")


def check_add(backend, M, N, R, dtype, master, transposed=False, p=0.0, odd=False):
    y, xa = random((M, N), dtype, backend, odd), random((M, R), dtype, backend, odd)
    factor = random((R, N) if transposed else (N, R), master, backend, odd)
    seed = seed_of(2**62 + 3, backend) if p else None

    def run(buffers):
        out = buffers.new((M, N), dtype, odd).copy_(y)
        arguments = dict(y=out, xa=xa, lora_b=factor, adapter_dtype=master, transposed=transposed, scale=SCALE)
        launch("lora_add", backend.device, dtype, dict(M=M, N=N, R=R), **arguments, seed=seed, dropout_p=p)
        return [out]

    (out,) = twice(backend, run)
    y, xa, B, keep = y.cpu(), xa.cpu(), factor.cpu() if transposed else factor.cpu().t(), mask_of(seed, M, N, p)
    plain = y + SCALE * (xa @ B.to(dtype)) * keep
    assert_parity(out, plain, y.double() + SCALE * (xa.double() @ B.double()) * keep, f"y {M, N, R}")


@two_dtypes
@pytest.mark.parametrize("R", RANKS)
@CUDA
def test_low_rank_passes_over_ranks(backend, R, dtype, master):
    # Two row blocks and two splits of columns; five steps of rows, more than there are stages.
    check_down(backend, 70, 520, R, dtype, master, p=0.3)
    check_down(backend, 70, 72, R, dtype, master)
    check_up_grad(backend, 150, 72, R, dtype, master)
    check_down_grad(backend, 150, 72, R, dtype, master, p=0.3)
    check_down_grad(backend, 290, 24, R, dtype, master)
    check_add(backend, 70, 136, R, dtype, master)
    check_add(backend, 70, 136, R, dtype, master, transposed=True, p=0.3)


@pytest.mark.parametrize("shape", ((1, 8), (3, 3), (33, 131), (129, 257), (7, 600)), ids=str)
@CUDA
def test_low_rank_passes_over_odd_shapes(backend, shape):
    """Rows that are no vectors, single rows, tiles and slices with one column too many."""
    for R, (dtype, master), p in ((4, DTYPES[0], 0.0), (33, DTYPES[3], 0.5)):
        check_down(backend, *shape, R, dtype, master, p)
        check_up_grad(backend, *shape, R, dtype, master)
        check_down_grad(backend, *shape, R, dtype, master, p)
        check_add(backend, *shape, R, dtype, master, p=p)
        check_add(backend, *shape, R, dtype, master, transposed=True)


@CUDA
def test_low_rank_passes_over_odd_addresses(backend):
    for R, (dtype, master) in ((8, DTYPES[1]), (72, DTYPES[2])):
        check_down(backend, 40, 136, R, dtype, master, odd=True)
        check_up_grad(backend, 40, 136, R, dtype, master, odd=True)
        check_down_grad(backend, 40, 136, R, dtype, master, odd=True)
        check_add(backend, 40, 136, R, dtype, master, odd=True)
        check_add(backend, 40, 136, R, dtype, master, transposed=True, odd=True)


@pytest.mark.parametrize("R", (16, 384))
@CUDA
def test_either_gradient_of_the_up_projection_alone(backend, R):
    for wanted in (("u",), ("d_b",)):
        for dtype, master in (DTYPES[0], DTYPES[3]):
            check_up_grad(backend, 70, 136, R, dtype, master, wanted)


@CUDA
def test_down_in_more_steps_than_stages(backend):
    """As many blocks of rows as leave a CTA nine steps, one more than it has stages at these ranks."""
    M, K = 45 * 64, 18 * 64
    check_down(backend, M, K, 16, BF16, BF16)


@pytest.mark.parametrize("p", (0.05, 0.5, 0.999))
@CUDA
def test_the_mask_is_that_of_the_formula(backend, p):
    """Products with the identity give the mask itself, in every kernel that makes one."""
    rows, columns = 70, 136
    for dtype in (BF16, FP16):
        seed = seed_of(-987654321, backend)
        keep = keep_mask(seed.cpu(), rows, columns, p).to(dtype)
        ones = torch.ones(rows, columns, dtype=dtype, device=backend.device)
        identity = {n: torch.eye(n, dtype=dtype, device=backend.device) for n in (rows, columns)}
        common, mask = dict(adapter_dtype=dtype), dict(seed=seed, dropout_p=p)
        buffers = Buffers(backend.device)

        xa = buffers.new((rows, columns), dtype)
        sizes = dict(M=rows, K=columns, R=columns)
        launch("lora_down", backend.device, dtype, sizes, x=ones, lora_a=identity[columns], xa=xa, **common, **mask)
        d_a = buffers.new((rows, columns), dtype)
        arguments = dict(x=ones, u=identity[rows], d_a=d_a, scale=1.0)
        launch("lora_down_grad", backend.device, dtype, dict(M=rows, K=columns, R=rows), **arguments, **common, **mask)
        y = buffers.new((rows, columns), dtype).zero_()
        arguments = dict(y=y, xa=identity[rows], lora_b=ones, transposed=True, scale=1.0)
        launch("lora_add", backend.device, dtype, dict(M=rows, N=columns, R=rows), **arguments, **common, **mask)
        for result in (xa, d_a, y):
            assert torch.equal(result.cpu(), keep)
        buffers.check()


@CUDA
def test_low_rank_passes_of_nothing(backend):
    """No tokens: the gradients of the adapter are zero."""
    for R in (4, 64):
        check_down(backend, 0, 72, R, BF16, FP32)
        check_up_grad(backend, 0, 72, R, BF16, FP32)
        check_down_grad(backend, 0, 72, R, BF16, FP32)
        check_add(backend, 0, 72, R, BF16, FP32)


# ---- the decode kernel

KINDS = ("nf4", "nf4-nested", "dense")


def random_weight(N, K, kind, dtype, blocksize):
    """Codes in the proportions of Gaussian weights: the tables of codes are made for these."""
    if kind == "dense":
        return torch.randn(N, K).to(dtype)
    codes, absmax = formula.nf4_quantize(torch.randn(N, K), blocksize)
    if kind == "nf4":
        return NF4Weight(packed=codes, absmax=absmax, shape=(N, K), blocksize=blocksize, dtype=FP32)
    return NF4Weight(
        packed=codes,
        absmax=torch.randint(256, absmax.shape, dtype=torch.uint8),
        absmax_code=formula.absmax_code(torch.device("cpu")),
        absmax_scale=torch.rand(-(-len(absmax) // formula.ABSMAX_BLOCKSIZE)) + 0.1,
        absmax_offset=torch.rand(()) + 1,
        shape=(N, K),
        blocksize=blocksize,
        dtype=FP32,
    )


def check_decode(
    backend, M, N, K, R, kind="nf4", dtype=BF16, master=None, blocksize=64, sms=4, options="gain factor bias"
):
    master = master or dtype
    weight = random_weight(N, K, kind, dtype, blocksize)
    x = random((M, K), dtype, backend)
    A, B = random((R, K), master, backend) / 8, random((N, R), master, backend) / 8
    gain = (torch.rand(N) + 0.5).to(backend.device) if "gain" in options else None
    factor = torch.tensor(1.5, device=backend.device) if "factor" in options else None
    bias = random((N,), dtype, backend) if "bias" in options else None
    on_device = weight.to(backend.device)

    def run(buffers):
        y = buffers.new((M, N), dtype, odd=True)
        launch(
            "lora_linear_decode",
            backend.device,
            dtype,
            dict(M=M, N=N, K=K, R=R),
            x=x,
            weight=on_device if kind == "dense" else None,
            nf4=None if kind == "dense" else on_device,
            lora_a=A,
            lora_b=B,
            adapter_dtype=master,
            scaling=0.75,
            scaling_tensor=factor,
            gain=gain,
            bias=bias,
            y=y,
        )
        return [y]

    (y,) = twice(backend, run, sms)
    x, A, B = x.cpu(), A.cpu(), B.cpu()
    gain, bias = (t if t is None else t.cpu() for t in (gain, bias))
    scale = 0.75 * (1.5 if factor is not None else 1.0)

    def result(dtype):
        W = weight.to(dtype) if kind == "dense" else formula.nf4_dequantize(weight, dtype)
        y = x.to(dtype) @ W.t() + scale * ((x.to(dtype) @ A.to(dtype).t()) @ B.to(dtype).t())
        y = y if gain is None else y * gain.to(y.dtype)
        return y if bias is None else y + bias

    assert_parity(y, result(dtype), result(torch.float64), f"y {M, N, K, R} {kind} {sms} SMs")


@pytest.mark.parametrize("kind", KINDS)
@each_dtype
@CUDA
def test_decode_over_tokens(backend, dtype, master, kind):
    """K of whole slices, and not: for NF4 these are different kernels."""
    for M in (1, 5, 8, 9, 16, 17, 32, 33, 64):
        check_decode(backend, M, 40, 128, 16, kind, dtype, master)
    for M in (1, 7, 12, 20, 40):
        check_decode(backend, M, 40, 136, 16, kind, dtype, master)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
@CUDA
def test_decode_over_blocksizes(backend, blocksize, kind):
    """Blocks that cross rows, rows of many blocks."""
    for M, N, K in ((2, 33, 192), (3, 65, 72), (9, 9, 8)):
        check_decode(backend, M, N, K, 4, kind, FP16, blocksize=blocksize)


@pytest.mark.parametrize("R", (0, *RANKS))
@CUDA
def test_decode_over_ranks(backend, R):
    """More ranks than a row group has rows, than the second kernel takes at a time; rows of B that are no vectors."""
    check_decode(backend, 3, 70, 128, R, "nf4", BF16, FP32)
    check_decode(backend, 20, 70, 72, R, "dense", FP16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", (3, 9, 17, 40))
@CUDA
def test_decode_in_more_steps_than_stages(backend, M, kind):
    """One SM: each CTA takes rows of several groups, and more steps than it has stages."""
    check_decode(backend, M, 24, 4160, 5, kind, BF16, sms=1)
    check_decode(backend, M, 24, 1096, 5, kind, FP16, FP32, sms=1)


@pytest.mark.parametrize("N", (1, 31, 200))
@CUDA
def test_decode_over_divisions_of_the_work(backend, N):
    """Ranges that begin and end within a row, of one slice and of whole row groups."""
    for sms in (1, 2, 3, 7, 16, 61):
        check_decode(backend, 2, N, 1024, 4, "nf4", sms=sms)
        check_decode(backend, 9, N, 320, 20, "nf4-nested", sms=sms)
        check_decode(backend, 33, N, 192, 8, "dense", sms=sms)


@CUDA
def test_decode_with_and_without_its_options(backend):
    for options in ("", "gain", "factor", "bias"):
        check_decode(backend, 3, 40, 64, 4, options=options)


@CUDA
def test_decode_of_nothing(backend):
    for M, N in ((0, 40), (3, 0)):
        for kind in KINDS[::2]:
            check_decode(backend, M, N, 64, 4, kind)


@CUDA
def test_decode_refuses_what_it_would_compute_wrongly(backend):
    x = torch.randn(65 * 64, device=backend.device).to(BF16)
    sizes, absent = dict(M=1, N=1, K=64, R=0), ("nf4", "lora_a", "lora_b", "scaling_tensor", "gain", "bias")
    valid = dict(x=x, weight=x, y=x, adapter_dtype=BF16, scaling=1.0, **dict.fromkeys(absent))

    def refused(sizes=sizes, **arguments):
        with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
            launch("lora_linear_decode", backend.device, BF16, sizes, **valid | arguments)

    refused(sizes | dict(M=65))
    refused(sizes | dict(K=60))
    refused(sizes | dict(R=1), lora_a=x[1:])
    refused(x=x[1:])
    refused(weight=x[1:])
    weight = random_weight(1, 64, "nf4", BF16, 64).to(backend.device)
    refused(weight=None, nf4=replace(weight, packed=weight.packed[1:]))


@CUDA
def test_the_static_report_knows_the_dynamic_shared_memory(backend):
    """What benchmarks/launches.py says is what launchers ask for."""
    if backend.device != "cpu":
        pytest.skip("launches are recorded by the emulation")
    emulation().reset()
    for R in (1, 17, 65):
        check_down(backend, 1, 8, R, BF16, BF16)
        check_up_grad(backend, 1, 8, R, BF16, BF16)
        check_down_grad(backend, 1, 8, R, BF16, BF16)
    for M in (1, 9, 17, 33):
        check_decode(backend, M, 1, 8, 1, "dense")
    asked = {name: size for name, size in emulation().dynamic_shared_bytes().items() if size}
    assert asked == {name: dynamic_shared_bytes(name) for name in asked}
    for pattern in filter(lambda pattern: pattern.startswith("lora"), CUDA_DYNAMIC_SHARED_BYTES):
        assert any(re.fullmatch(pattern, name) for name in asked), pattern
