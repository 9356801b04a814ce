"""The op prefix_attention over its kernels: what is chosen, both forms of Triton's, decoding, compile, allocations."""

from types import SimpleNamespace

import pytest
import torch

from fastpeft import backend as backends
from fastpeft import ops, use_backend
from fastpeft.ops import prefix_attention_eager as eager
from fastpeft.ops.prefix_attention_backends import TABLE
from tests.backends import over
from tests.ops.test_prefix_attention import BF16, FP16, FP32, Largest, check, leaf, padding, problem, run

TRITON, CUDA, KERNELS = over("triton"), over("cuda"), over("triton", "cuda")


@pytest.fixture(params=("one kernel", "beside flash"))
def form(request, monkeypatch):
    """The two forms of the Triton backend, whatever the sizes and the device."""
    monkeypatch.setattr(eager, "_FLASH_DEVICES", () if request.param == "one kernel" else ("cpu", "cuda"))
    return request.param


def small(S=33, T=None, P=9, dtype=BF16, master=FP32, **sizes):
    return problem(**{"B": 2, "H": 4, "Hkv": 2, "D": 64} | sizes, S=S, T=T, P=P, dtype=dtype, master=master)


def test_choice_by_queries_training_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def best(queries, training, dtype=BF16):
        q = SimpleNamespace(dtype=dtype, device="cuda:0")
        return next(backends.preferred(TABLE, q, queries, "dense", training))

    assert best(1, False) == best(16, False, FP16) == "cuda"
    assert best(17, False) == best(1, True) == best(4096, True) == "triton"
    assert best(1, False, FP32) == best(1, False, torch.float64) == "eager"


@pytest.mark.slow
@TRITON
def test_parity_of_both_forms(backend, form):
    check(small(), backend)
    check(small(dtype=FP16, master=FP16), backend, scale=0.3)
    check(small(20, 37, P=33), backend, causal=False)


@pytest.mark.slow
@TRITON
def test_parity_where_flash_cannot_serve(backend):
    check(small(3, 40, D=80), backend, key_padding_mask=padding(2, 40, "left"))
    check(small(40, P=20), backend, window=21, softcap=5.0)
    bounds = torch.tensor([0, 1, 30, 30, 50], dtype=torch.int32)
    check(small(50, B=1), backend, cu_seqlens=bounds, window=12)


@CUDA
def test_parity_of_decoding(backend):
    """With the gradients of eager, from what the kernel left."""
    check(small(1, 40), backend)
    check(small(3, 40, P=70, dtype=FP16), backend, key_padding_mask=padding(2, 40, "right"), softcap=5.0)
    check(small(16, 30, D=128), backend, causal=False, scale=0.3)
    check(small(2, 30, D=96), backend, window=12)


@KERNELS
def test_parity_for_views(backend):
    """Contiguous inputs, and those that kernels cannot load as they are: odd strides, columns apart."""
    q, k, v, prefix_k, prefix_v, dout = small(3, 20)
    wide = torch.randn(2, 2, 20, 67).to(BF16)
    apart = torch.randn(2, 2, 64, 20).to(BF16).transpose(2, 3)
    check([q.contiguous(), wide[..., 3:], v, prefix_k, prefix_v, dout.contiguous()], backend)
    check([q, apart, apart, prefix_k.mT.contiguous().mT, prefix_v, dout[..., :1].expand_as(q)], backend)


@KERNELS
def test_no_rows_and_no_keys(backend):
    for shape in ({"S": 3, "B": 0}, {"S": 0}):
        tensors = [t.to(backend.device) for t in small(**shape)]
        got = run(ops.prefix_attention, tensors, backend=backend.name)
        assert got["out"].shape == tensors[0].shape and (got["dprefix_k"] == 0).all()
    check(small(3, 0), backend, causal=False)


@pytest.mark.slow
@TRITON
def test_results_repeat_bit_for_bit(backend, form):
    tensors = [t.to(backend.device) for t in small()]
    first, second = (run(ops.prefix_attention, tensors, backend=backend.name) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@KERNELS
def test_compile_fullgraph(backend):
    tensors = [t.to(backend.device) for t in small(5, 12)]
    compiled = torch.compile(ops.prefix_attention, fullgraph=True, backend="aot_eager")
    options = {"backend": backend.name, "key_padding_mask": padding(2, 12, "left").to(backend.device)}
    expected, got = (run(function, tensors, **options) for function in (ops.prefix_attention, compiled))
    assert all(torch.equal(expected[name], got[name]) for name in got)


@pytest.mark.slow
@TRITON
def test_opcheck(backend, form):
    """Among others that no result is a view of another, and that strides are those that a compiled graph expects."""
    inputs = [leaf(t.to(backend.device)) for t in small(5)[:5]]
    inputs[1] = leaf(inputs[1].detach().contiguous())
    inputs[3] = inputs[3].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    arguments = (*inputs, None, None, True, 0.25, None, None, True, backend.name)
    torch.library.opcheck(torch.ops.fastpeft.prefix_attention, arguments)
    out, lse = torch.ops.fastpeft.prefix_attention(*arguments)
    backward = (torch.randn_like(out), *arguments[:7], out.detach(), lse.detach(), *arguments[7:])
    torch.library.opcheck(torch.ops.fastpeft.prefix_attention_backward, backward, test_utils="test_faketensor")


@TRITON
def test_no_tensor_of_queries_times_keys(backend, form):
    S, D, P = 512, 16, 40
    tensors = [t.to(backend.device) for t in small(S, B=1, H=1, Hkv=1, D=D, P=P)]
    with Largest() as largest:
        run(ops.prefix_attention, tensors, backend=backend.name)
    # The interpreter copies bytes, which count as elements here: a float32 of the parts of dk as four.
    assert S * D <= largest.elements < S * (P + S) / 2


@CUDA
def test_decoding_copies_neither_cache_nor_prefix(backend):
    """32 sequences: a cache that begins with the prefix would have 32 of them."""
    B, T, P = 32, 64, 300
    q, k, v, *prefix, _ = (t.to(backend.device) for t in small(1, T, P, B=B, H=1, Hkv=1, master=BF16))
    caches = [torch.zeros(B, 1, 2 * T, 64, dtype=BF16, device=backend.device) for _ in range(2)]
    for cache, t in zip(caches, (k, v), strict=True):
        cache[:, :, :T] = t
    views = [cache[:, :, :T] for cache in caches]
    with Largest() as largest:
        out = ops.prefix_attention(q, *views, *prefix, backend=backend.name)
    assert torch.equal(out, ops.prefix_attention(q, k, v, *prefix, backend=backend.name))
    assert largest.elements < B * T * 64


@pytest.mark.parametrize(
    "name,change,options,message",
    [
        ("triton", {"dtype": FP32}, {}, "q is torch.float32; the kernels take bf16 and fp16"),
        ("triton", {"D": 264}, {}, "the head size is 264; the kernels take 256"),
        ("cuda", {"dtype": FP32}, {}, "q is torch.float32"),
        ("cuda", {"S": 17}, {}, "a sequence has 17 queries; the kernel is for decoding, up to 16"),
        ("cuda", {"D": 80}, {}, "the head size is 80; the kernel has 64, 96, 128, 256"),
        ("cuda", {"B": 1}, {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "documents are packed"),
    ],
)
def test_a_backend_that_is_asked_for_says_what_it_cannot(name, change, options, message):
    tensors = small(**{"S": 5} | change)[:5]
    with pytest.raises(ValueError, match=f"prefix_attention cannot run on backend '{name}': {message}"):
        ops.prefix_attention(*tensors, **options, backend=name)
    with use_backend(name), pytest.raises(ValueError, match=message):
        ops.prefix_attention(*tensors, **options)
