"""The Triton kernels of lora_linear, called directly: each launcher against float64, what must be equal to the bit, and
sums that programs share; nothing is written beside an output."""

import pytest
import torch
from fastpeft.triton_kernels import lora_linear as kernels
from fastpeft.triton_kernels import products

from fastpeft.reference import nf4 as formula
from fastpeft.reference.dropout import keep_mask
from tests.backends import over
from tests.parity import assert_parity

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

TRITON = over("triton")


class Outputs:
    """Tensors poisoned with NaN, each inside of memory that must stay what it is."""

    GUARD, MARK = 256, 0x5A

    def __init__(self, device):
        self.device, self.whole = device, []

    def new(self, shape, dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((size + 2 * self.GUARD,), self.MARK, dtype=torch.uint8, device=self.device)
        inner = whole[self.GUARD : self.GUARD + size].fill_(0xFF)
        self.whole.append(whole)
        return inner.view(dtype).view(shape)

    def check(self):
        for whole in self.whole:
            assert (whole[: self.GUARD] == self.MARK).all() and (whole[-self.GUARD :] == self.MARK).all()


def moved(tensor, by):
    """The same values `by` elements further in memory."""
    return torch.cat([tensor.new_zeros(by), tensor.reshape(-1)])[by:].view(tensor.shape)


def nf4(N, K, blocksize, nested, by, device):
    """The storage as launchers take it, of random codes, which begin at a word."""
    blocks = -(-N * K // blocksize)
    packed = torch.randint(256, (-(-N * K // 2),), dtype=torch.uint8)
    storage = [packed, torch.rand(blocks) / K**0.5, None, None, None]
    if nested:
        scales = torch.rand(-(-blocks // formula.ABSMAX_BLOCKSIZE)) / K**0.5
        code, offset = formula.absmax_code(torch.device("cpu")), torch.rand(()) / K**0.5
        storage[1:] = torch.randint(256, (blocks,), dtype=torch.uint8), code, scales, offset
    offsets = (4 * by, by, by, by, by)
    moved_storage = (None if t is None else moved(t, n).to(device) for t, n in zip(storage, offsets, strict=True))
    return (*moved_storage, blocksize)


def absmax_of(weight):
    absmax, code, scale, offset = weight[1:5]
    return absmax if code is None else formula.dequantize_absmax(absmax, code, scale, offset)


def dense(weight, N, K, dtype):
    """The weight in float32, or its bits in another dtype."""
    packed, blocksize = weight[0], weight[5]
    index = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: N * K].int()
    values = formula.nf4_values(packed.device)[index]
    return (values * absmax_of(weight).repeat_interleave(blocksize)[: N * K]).view(N, K).to(dtype)


def run(outputs, weight, x, dy, A, B, bias, scale, seed, p):
    (M, K), (N, R) = x.shape, B.shape
    xa, y = outputs.new((M, R), x.dtype), outputs.new((M, N), x.dtype)
    kernels.lora_down(x, A, seed, p, xa)
    kernels.lora_linear_fwd(x, weight, xa, B, bias, scale, y)
    u, dB = outputs.new((M, R), x.dtype), outputs.new((N, R), B.dtype)
    kernels.lora_up_grad(dy, B, xa, u, dB, scale)
    u_alone, dB_alone = outputs.new((M, R), x.dtype), outputs.new((N, R), B.dtype)
    kernels.lora_up_grad(dy, B, xa, u_alone, None, scale)
    kernels.lora_up_grad(dy, B, xa, None, dB_alone, scale)
    dA, dx = outputs.new((R, K), A.dtype), outputs.new((M, K), x.dtype)
    kernels.lora_down_grad(x, u, seed, p, scale, dA)
    kernels.lora_linear_dx(dy, weight, u, A, scale, seed, p, dx)
    return dict(xa=xa, y=y, u=u, dB=dB, u_alone=u_alone, dB_alone=dB_alone, dA=dA, dx=dx)


def plain(weight, x, dy, A, B, bias, scale, keep, dtype):
    """The same in PyTorch: every operation in `dtype`, gradients in that of the adapter."""
    x, dy, weight, a, b = (t.to(dtype) for t in (x, dy, weight, A, B))
    master = torch.float64 if dtype == torch.float64 else A.dtype
    kept = x * keep
    xa, u = kept @ a.t(), dy @ b
    y = x @ weight.t() + scale * (xa @ b.t())
    dA, dB = (scale * (u.t() @ kept)).to(master), (scale * (dy.t() @ xa)).to(master)
    dx = dy @ weight + scale * (u @ a) * keep
    return dict(xa=xa, y=y if bias is None else y + bias.to(dtype), u=u, dB=dB, u_alone=u, dB_alone=dB, dA=dA, dx=dx)


def check(device, M, N, K, R, dtype, master, blocksize=0, nested=False, p=0.0, bias=False, by=0):
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    A, B = (torch.randn(R, K) / K**0.5).to(master), torch.randn(N, R).to(master)
    x, dy, A, B = (moved(t, by).to(device) for t in (x, dy, A, B))
    bias = torch.randn(N).to(device, dtype) if bias else None
    if blocksize:
        weight = nf4(N, K, blocksize, nested, by, device)
        rounded, exact_weight = dense(weight, N, K, dtype), dense(weight, N, K, FP32)
    else:
        weight = rounded = exact_weight = moved((torch.randn(N, K) / K**0.5).to(dtype), by).to(device)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64).to(device) if p > 0 else None
    keep = keep_mask(seed, M, K, p) if p > 0 else torch.ones(M, K, dtype=torch.bool, device=device)
    scale = 0.7 / R**0.5 / (1 - p)

    outputs = Outputs(device)
    actual, again = (run(outputs, weight, x, dy, A, B, bias, scale, seed, p) for _ in range(2))
    outputs.check()
    expected = plain(rounded, x, dy, A, B, bias, scale, keep, dtype)
    exact = plain(exact_weight, x, dy, A, B, bias, scale, keep, torch.float64)
    for name, output in actual.items():
        assert torch.equal(output, again[name]), name
        assert_parity(output, expected[name], exact[name], name)


@pytest.mark.parametrize("M", (1, 16, 17, 33, 65, 130))  # one for each tile, and more than one tile
@TRITON
def test_tokens(backend, M):
    check(backend.device, M, 72, 192, 8, BF16, FP32, blocksize=64, nested=True, p=0.1)
    check(backend.device, M, 31, 72, 16, FP16, FP16, bias=True)


@pytest.mark.parametrize("R", (1, 13, 32, 33, 384))
@TRITON
def test_ranks(backend, R):
    check(backend.device, 20, 33, 40, R, BF16, BF16, blocksize=128, p=0.5)


@pytest.mark.parametrize("by", (0, 1, 4))
@pytest.mark.parametrize("K,N,blocksize", [(1, 1, 0), (7, 130, 0), (99, 3, 0), (8, 1, 32), (104, 3, 32), (136, 64, 32)])
@TRITON
def test_features_and_addresses(backend, K, N, blocksize, by):
    """K that is no multiple of 8 or 64, odd N, and tensors that begin anywhere."""
    check(backend.device, 3, N, K, 4, FP16, FP16, blocksize=blocksize, nested=True, bias=True, by=by)


def test_codes_that_are_no_words_are_refused():
    x, dy, xa = torch.zeros(1, 12, dtype=BF16), torch.zeros(1, 3, dtype=BF16), torch.zeros(1, 2, dtype=BF16)
    weight = nf4(3, 12, 64, False, 0, "cpu")
    with pytest.raises(ValueError, match="lora_linear_fwd: K = 12 is no multiple of 8"):
        kernels.lora_linear_fwd(x, weight, xa, xa.new_zeros(3, 2), None, 1.0, dy)
    with pytest.raises(ValueError, match="lora_linear_dx: K = 12 is no multiple of 8"):
        kernels.lora_linear_dx(dy, weight, xa, xa.new_zeros(2, 12), 1.0, None, 0.0, x)
    packed, *rest = nf4(3, 8, 64, False, 0, "cpu")
    with pytest.raises(ValueError, match="do not begin at a multiple of 4 bytes"):
        kernels.lora_linear_fwd(x[:, :8], (moved(packed, 1), *rest), xa, xa.new_zeros(3, 2), None, 1.0, dy)


@pytest.mark.slow
@pytest.mark.parametrize("blocksize", (0, 256))
@TRITON
def test_shared_sums(backend, blocksize, monkeypatch):
    """5 steps for 4 programs: two for each, and nothing for the last."""
    monkeypatch.setattr(products, "MIN_STEPS", 1)
    monkeypatch.setattr(products, "PROGRAMS", 4)
    shared = []
    sum_partials = products.sum_partials
    monkeypatch.setattr(
        products, "sum_partials", lambda partials, out: (shared.append(partials), sum_partials(partials, out))
    )
    check(backend.device, 16, 33, 296, 4, BF16, BF16, blocksize=blocksize, nested=True, p=0.3, bias=True)  # forward
    check(backend.device, 296, 33, 32, 4, FP16, FP32, blocksize=blocksize)  # gradients
    check(backend.device, 16, 296, 32, 4, BF16, FP32, blocksize=blocksize)  # dx
    # xa, y, dB, dA, dx; of the first call dx is [16, 296], one program for each tile
    assert {tuple(p.shape) for p in shared} >= {(4, 16, 4), (4, 16, 33), (4, 33, 4), (4, 4, 32), (4, 16, 32)}


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
@TRITON
def test_the_weight_is_that_of_dequantize_bit_for_bit(backend, blocksize, dtype, nested):
    """The product with the unit matrix; blocks cross rows, and tiles their edges."""
    for N, K, by in ((70, 64, 0), (33, 136, 0), (40, 72, 2), (7, 40, 0)):
        weight = nf4(N, K, blocksize, nested, by, backend.device)
        expected = dense(weight, N, K, dtype)
        none = torch.empty(0, dtype=dtype, device=backend.device)
        y, dx = expected.new_empty(K, N), expected.new_empty(N, K)
        eye = torch.eye(K, dtype=dtype, device=backend.device)
        kernels.lora_linear_fwd(eye, weight, none.view(K, 0), none.view(N, 0), None, 1.0, y)
        eye = torch.eye(N, dtype=dtype, device=backend.device)
        kernels.lora_linear_dx(eye, weight, none.view(N, 0), none.view(0, K), 1.0, None, 0.0, dx)
        assert torch.equal(y.t(), expected) and torch.equal(dx, expected)


@pytest.mark.parametrize("p", (1e-9, 0.1, 0.9, 1 - 1e-12))
@TRITON
def test_the_dropout_mask_is_that_of_the_reference(backend, p):
    """Factors of ones and unit matrices leave the mask."""
    M, K = 70, 140
    for number in (-5, 2**62 + 12345, -(2**63)):
        seed = torch.tensor(number, device=backend.device)
        keep = keep_mask(seed, M, K, p).to(BF16)
        ones, weight = torch.ones_like(keep), torch.zeros(1, K, dtype=BF16, device=backend.device)
        xa, dA, dx = torch.empty_like(keep), torch.empty_like(keep), torch.empty_like(keep)
        kernels.lora_down(ones, torch.eye(K, dtype=BF16, device=backend.device), seed, p, xa)
        kernels.lora_down_grad(ones, torch.eye(M, dtype=BF16, device=backend.device), seed, p, 1.0, dA)
        u, A = ones[:, :1].contiguous(), ones[:1].contiguous()
        kernels.lora_linear_dx(u, weight, u, A, 1.0, seed, p, dx)
        assert torch.equal(xa, keep) and torch.equal(dA, keep) and torch.equal(dx, keep)


@TRITON
def test_nothing_to_sum_and_nothing_to_write(backend):
    empty = {(i, j): torch.full((i, j), torch.nan, device=backend.device, dtype=BF16) for i in (0, 3) for j in (0, 3)}
    y = empty[3, 3].clone()
    kernels.lora_linear_fwd(empty[3, 0], empty[3, 0], empty[3, 0], empty[3, 0], y[0].fill_(2), 1.0, y)
    assert (y == 2).all()
    kernels.lora_linear_fwd(empty[0, 3], y, empty[0, 3], y, None, 1.0, empty[0, 3])
    u, dB = y.clone(), y.clone()
    kernels.lora_up_grad(empty[3, 0], empty[0, 3], y, u, empty[0, 3], 1.0)
    kernels.lora_up_grad(empty[0, 3], y, empty[0, 3], empty[0, 3], dB, 1.0)
    assert (u == 0).all() and (dB == 0).all()


def test_places_that_do_not_fit_into_32_bits_are_refused():
    x, y = torch.empty(1, 2**22 + 8, device="meta"), torch.empty(1, 4, device="meta")
    weight, xa, B = torch.empty(4, 2**22 + 8, device="meta"), torch.empty(1, 2, device="meta"), y.new_empty(4, 2)
    with pytest.raises(ValueError, match="4194312 features; the Triton kernels take up to 4194304"):
        kernels.lora_linear_fwd(x, weight, xa, B, None, 1.0, y)
    with pytest.raises(ValueError, match="4194312 features"):
        kernels.lora_down(x, weight[:2], None, 0.0, xa)
