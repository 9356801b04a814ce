"""The kernels of prefix_attention, called directly: outputs, log-sum-exp and gradients against float64."""

import itertools
import math
import re

import pytest
import torch

from benchmarks.launches import CUDA_DYNAMIC_SHARED_BYTES
from benchmarks.machine_code import dynamic_shared_bytes
from fastpeft import _native
from fastpeft.ops.prefix_attention_eager import Form
from fastpeft.quant import native_dtype
from fastpeft.reference.prefix_attention import prefix_attention as reference
from tests.backends import emulation, over
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")

TRITON, CUDA = over("triton"), over("cuda")


def problem(B, H, Hkv, S, T, P, D, dtype=BF16, device="cpu", logits=1.0):
    """q, k, v, prefix_k, prefix_v, dout; q, k and v lie as projections leave them. logits: their size."""
    q, k, v, dout = (torch.randn(B, n, h, D).transpose(1, 2) for n, h in ((S, H), (T, Hkv), (T, Hkv), (S, H)))
    prefix = torch.randn(Hkv, P, D), torch.randn(Hkv, P, D)
    return [t.to(dtype).to(device) for t in (q * logits, k, v, *prefix, dout)]


def form_of(D, causal=True, window=None, softcap=None):
    return Form(causal, D**-0.5, window, softcap)


def formula(tensors, form, cu_seqlens=None, mask=None, dtype=None):
    """Output and gradients of the formula, computed in `dtype`."""
    *inputs, dout = (t.cpu() for t in tensors)
    leaves = [leaf(t, dtype) for t in inputs]
    cu_seqlens, mask = (None if t is None else t.cpu() for t in (cu_seqlens, mask))
    out = reference(*leaves, **form._asdict(), cu_seqlens=cu_seqlens, key_padding_mask=mask)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves)]


def lse_of(tensors, form, cu_seqlens=None, mask=None):
    """The log-sum-exp that the formula's weights, its output for values that are unit vectors, come from."""
    q, k, _, prefix_k, *_ = (t.cpu().double() for t in tensors)
    (B, H, _, _), (_, Hkv, T, _), P = q.shape, k.shape, prefix_k.shape[1]
    unit = torch.eye(P + T, dtype=FP64)
    cu_seqlens, mask = (None if t is None else t.cpu() for t in (cu_seqlens, mask))
    values = unit[P:].expand(B, Hkv, -1, -1), unit[:P].expand(Hkv, -1, -1)
    options = {"cu_seqlens": cu_seqlens, "key_padding_mask": mask}
    weights = reference(q, k, values[0], prefix_k, values[1], **form._asdict(), **options)
    keys = torch.cat([prefix_k.expand(B, -1, -1, -1), k], 2).repeat_interleave(H // Hkv, 1)
    scores = q @ keys.transpose(2, 3) * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    weight, at = weights.max(-1)
    return torch.where(weight > 0, scores.gather(-1, at.unsqueeze(-1)).squeeze(-1) - weight.log(), -torch.inf)


def assert_lse(lse, tensors, form, cu_seqlens=None, mask=None):
    exact = lse_of(tensors, form, cu_seqlens, mask)
    finite = exact.isfinite()
    assert torch.equal(lse.isneginf(), ~finite)
    # The scale, a power of 2, its logarithm and the way back are each rounded: some units in the last place.
    torch.testing.assert_close(lse[finite].double(), exact[finite], rtol=5e-7, atol=1e-5)


def check(actual, lse, tensors, form, cu_seqlens=None, mask=None, one_hot=False):
    """actual: the first of NAMES. The prefix's gradients are float32 before they become what the parameter is.

    one_hot: all weights are 0 or 1. Then the gradients of the scores are differences of equal numbers, 0 in the
    formula; a kernel that adds both in float32, each in its own order, leaves some units in their last place.
    """
    q, k, v, _, _, dout = tensors
    plain = formula(tensors, form, cu_seqlens, mask)
    exact = formula(tensors, form, cu_seqlens, mask, FP64)
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=False):
        if one_hot and name in ("dq", "dk", "dprefix_k"):
            size = math.prod(t.abs().max().item() for t in (dout, v, k if name == "dq" else q))
            assert (a.cpu() - e).abs().max() <= 8 * torch.finfo(FP32).eps * size, name
        else:
            assert_parity(a.to(p.dtype).cpu(), p, e, name)
    assert_lse(lse.cpu(), tensors, form, cu_seqlens, mask)


# ---- Triton


def triton():
    from fastpeft.triton_kernels import prefix_attention

    return prefix_attention


def empty(shape, dtype, device):
    """Poison: what a kernel leaves out stays NaN."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def run_triton(tensors, form, cu_seqlens=None, mask=None):
    """Output, gradients; log-sum-exp."""
    *inputs, dout = tensors
    q, k, v, *prefix = inputs
    kernels, bytes = triton(), None if mask is None else mask.view(torch.uint8)
    out, dq = empty(q.shape, q.dtype, q.device), empty(q.shape, q.dtype, q.device)
    lse, delta = empty(q.shape[:3], FP32, q.device), empty(q.shape[:3], FP32, q.device)
    dkv = [torch.full_like(t, torch.nan) for t in (k, v)]
    dprefix = [empty(t.shape, FP32, q.device) for t in prefix]
    kernels.prefix_attention_fwd(*inputs, cu_seqlens, bytes, form, out, lse)
    kernels.prefix_attention_dq(dout, *inputs, cu_seqlens, bytes, form, out, lse, delta, dq)
    kernels.prefix_attention_dkv(dout, q, k, v, prefix[0], cu_seqlens, bytes, form, lse, delta, *dkv)
    kernels.prefix_attention_dprefix(dout, q, *prefix, cu_seqlens, k.shape[2], form, lse, delta, *dprefix)
    return [out, dq, *dkv, *dprefix], lse


def check_triton(
    backend, B, H, Hkv, S, T, P, D, dtype=BF16, cu_seqlens=None, mask=None, logits=1.0, one_hot=False, **form
):
    tensors, form = problem(B, H, Hkv, S, T, P, D, dtype, backend.device, logits), form_of(D, **form)
    cu_seqlens, mask = (None if t is None else t.to(backend.device) for t in (cu_seqlens, mask))
    actual, lse = run_triton(tensors, form, cu_seqlens, mask)
    check(actual, lse, tensors, form, cu_seqlens, mask, one_hot)
    return tensors, actual


# In and around the sizes of tiles; S < P.
PREFIXES, LENGTHS = (1, 7, 16, 20, 31, 33, 64, 127, 128, 129, 600), (1, 63, 127, 300)


@pytest.mark.parametrize("P,S", [*itertools.product(PREFIXES, LENGTHS[:3]), (1, 300), (31, 300), (129, 300)])
@TRITON
def test_triton_over_lengths(backend, P, S):
    check_triton(backend, 1, 1, 1, S, S, P, 64, dtype=FP16 if P % 2 else BF16)


@pytest.mark.parametrize("H,Hkv", [(2, 2), (4, 1), (8, 1), (8, 2)])
@TRITON
def test_triton_over_groups(backend, H, Hkv):
    check_triton(backend, 2, H, Hkv, 20, 20, 17, 64)


@pytest.mark.parametrize("D", (80, 96, 128, 256))
@TRITON
def test_triton_over_head_sizes(backend, D):
    check_triton(backend, 1, 2, 1, 40, 40, 20, D)


@pytest.mark.slow
@TRITON
def test_triton_with_a_cache(backend):
    check_triton(backend, 2, 4, 2, 3, 130, 20, 64)
    check_triton(backend, 1, 2, 1, 35, 130, 20, 64)


@TRITON
def test_triton_in_full(backend):
    check_triton(backend, 1, 2, 1, 33, 90, 20, 64, causal=False)
    check_triton(backend, 1, 2, 1, 90, 33, 20, 64, causal=False)


def padding(kind, B, T):
    lengths = torch.randint(1, T, (B, 1))
    lengths[0] = 0
    places = torch.arange(T).expand(B, T)
    return {"left": places >= T - lengths, "right": places < lengths, "holes": torch.rand(B, T) > 0.5}[kind]


@pytest.mark.parametrize("kind", ("left", "right", "holes"))
@TRITON
def test_triton_with_padding(backend, kind):
    check_triton(backend, 2, 2, 1, 70, 70, 7, 64, mask=padding(kind, 2, 70))


@pytest.mark.parametrize("window", (1, 20, 63))
@TRITON
def test_triton_with_a_window(backend, window):
    """Smaller than the prefix, as long, and larger; rows see none of it, some of it, or all."""
    check_triton(backend, 1, 2, 1, 140, 140, 20, 64, window=window, one_hot=window == 1)


@TRITON
def test_triton_rows_that_see_nothing(backend):
    mask = padding("left", 2, 70)
    tensors, (out, dq, dk, dv, *_) = check_triton(backend, 2, 2, 1, 70, 70, 7, 64, mask=mask, window=5)
    assert (out[0, :, 10:] == 0).all() and (dq[0, :, 10:] == 0).all() and (dk[0] == 0).all() and (dv[0] == 0).all()


@TRITON
def test_triton_with_softcap(backend):
    check_triton(backend, 1, 2, 1, 70, 70, 20, 64, softcap=5.0, logits=3.0)
    check_triton(backend, 1, 2, 1, 70, 70, 20, 64, softcap=30.0, window=40, mask=padding("holes", 1, 70))


@TRITON
def test_triton_with_extreme_values(backend):
    check_triton(backend, 1, 2, 1, 40, 40, 20, 64, logits=1e4, one_hot=True)
    tensors = problem(1, 2, 1, 40, 40, 20, 64, device=backend.device)
    tensors[2].zero_(), tensors[4].zero_()
    actual, lse = run_triton(tensors, form_of(64))
    check(actual, lse, tensors, form_of(64))
    assert (actual[0] == 0).all()


DOCUMENTS = torch.tensor([0, 3, 3, 80, 81, 150], dtype=torch.int32)  # one of them is empty


@pytest.mark.parametrize("options", ({}, {"causal": False}, {"window": 25}), ids=("causal", "full", "window"))
@TRITON
def test_triton_with_documents(backend, options):
    check_triton(backend, 1, 2, 1, 150, 150, 20, 64, cu_seqlens=DOCUMENTS, **options)


@TRITON
def test_triton_repeats_its_bits_and_touches_no_input(backend):
    tensors, form = problem(1, 2, 1, 130, 130, 20, 64, device=backend.device), form_of(64)
    before = [t.clone() for t in tensors]
    (first, _), (second, _) = run_triton(tensors, form), run_triton(tensors, form)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, tensors, before))


@TRITON
def test_triton_with_views_of_any_strides(backend):
    """q, k and v out of one projection; out and dq beside other tensors."""
    S, D, device = 40, 64, backend.device
    q, k, v = torch.randn(2, S, 8, D).to(BF16).to(device).transpose(1, 2).split((4, 2, 2), 1)
    prefix = torch.randn(2, 2, 20, D).to(BF16).to(device)
    tensors, form = [q, k, v, *prefix, torch.randn(2, 4, S, D).to(BF16).to(device)], form_of(D)
    actual, lse = run_triton(tensors, form)
    check(actual, lse, tensors, form)
    wide = empty((2, S, 4, 2 * D), BF16, device).transpose(1, 2)
    triton().prefix_attention_fwd(*tensors[:5], None, None, form, wide[..., :D], lse)
    assert torch.equal(wide[..., :D], actual[0]) and wide[..., D:].isnan().all()


# The prefix beside another kernel, which attends over the real keys.


def real_part(tensors, form, cu_seqlens=None, lse=None):
    """float64 out, lse and dq over the real keys alone; with `lse` and out of the joint attention in `tensors`, dq is
    the real keys' part of it."""
    q, k, v, _, _, dout, *joint = (t.cpu().double() for t in tensors)
    S, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(S).unsqueeze(1), torch.arange(S)
    visible = (j <= i) & (i - j < (form.window or S))
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(S), cu_seqlens.cpu().long(), right=True)
        visible &= document == document.unsqueeze(1)
    scores = (q @ k.transpose(2, 3) * form.scale).masked_fill(~visible, -torch.inf)
    if not joint:
        return scores.softmax(-1) @ v, scores.logsumexp(-1)
    out, lse = joint
    ds = (scores - lse.unsqueeze(-1)).exp() * (dout @ v.transpose(2, 3) - (dout * out).sum(-1, keepdim=True))
    return ds @ k * form.scale


@pytest.mark.parametrize("options", ({}, {"cu_seqlens": DOCUMENTS[:4] // 2}, {"cu_seqlens": DOCUMENTS, "window": 25}))
@TRITON
def test_triton_beside_another_kernel(backend, options):
    cu_seqlens, window = options.get("cu_seqlens"), options.get("window")
    S = 40 if cu_seqlens is None else int(cu_seqlens[-1])
    device = backend.device
    tensors, form = problem(1 if cu_seqlens is not None else 2, 4, 2, S, S, 20, 64, device=device), form_of(64)
    form = form._replace(window=window)
    q, k, v, *prefix, dout = tensors
    cu = None if cu_seqlens is None else cu_seqlens.to(device)

    out, lse = real_part(tensors, form, cu)
    out, lse = out.to(BF16).to(device), lse.float().to(device)
    triton().prefix_attention_merge(q, *prefix, cu, S, form, out, lse)
    dq = real_part([*tensors, out, lse], form, cu).to(BF16).to(device)
    delta, *dprefix = (empty(t.shape, FP32, device) for t in (lse, *prefix))
    triton().prefix_attention_add_dq(dout, q, *prefix, cu, S, form, out, lse, delta, dq)
    triton().prefix_attention_dprefix(dout, q, *prefix, cu, S, form, lse, delta, *dprefix)

    plain, exact = formula(tensors, form, cu), formula(tensors, form, cu, dtype=FP64)
    names = ("out", "dq", "dprefix_k", "dprefix_v")
    for name, actual in zip(names, (out, dq, *dprefix), strict=True):
        at = NAMES.index(name)
        assert_parity(actual.to(BF16).cpu(), plain[at], exact[at], name)
    assert_lse(lse.cpu(), tensors, form, cu)


@TRITON
def test_triton_takes_the_prefix_in_where_nothing_else_was_seen(backend):
    """The other kernel left -inf, and nothing that can be read as an output."""
    tensors, form = problem(1, 2, 1, 20, 20, 20, 64, device=backend.device), form_of(64)
    q, k, v, *prefix, _ = tensors
    out, lse = empty(q.shape, BF16, q.device), torch.full(q.shape[:3], -torch.inf, device=q.device)
    triton().prefix_attention_merge(q, *prefix, None, 20, form, out, lse)
    hidden = torch.zeros(1, 20, dtype=torch.bool)
    check([out], lse, tensors, form, mask=hidden)


# ---- CUDA: decoding

GUARD = 64  # elements on both sides of what a kernel may write


def run_decode(tensors, form, mask=None):
    """out [B, H, L, D] and lse, by the native kernels; nothing is written beside them."""
    q, k, v, *prefix = tensors[:5]
    (B, H, L, D), (_, Hkv, T, _), P, device = q.shape, k.shape, prefix[0].shape[1], q.device
    sizes = dict(B=B, H=H, Hkv=Hkv, L=L, T=T, P=P, D=D)
    guarded = []

    def memory(numel, dtype):
        guarded.append(empty((numel + 2 * GUARD,), dtype, device))
        return guarded[-1][GUARD:-GUARD]

    with _native.stream_on(device) as stream:
        workspace = memory(_native.cuda.prefix_attention_decode_workspace_bytes(**sizes) // 4, FP32)
        out, lse = memory(B * L * H * D, q.dtype), memory(B * H * L, FP32)
        pointers = dict(q=q, k=k, v=v, prefix_k=prefix[0], prefix_v=prefix[1], mask=mask)
        pointers |= dict(out=out, lse=lse, workspace=workspace)
        _native.cuda.prefix_attention_decode(
            **{name: 0 if t is None else t.data_ptr() for name, t in pointers.items()},
            **{f"{name}_stride": t.stride()[:3] for name, t in dict(q=q, k=k, v=v).items()},
            **sizes,
            causal=form.causal,
            scale=form.scale,
            window=form.window or 0,
            softcap=form.softcap or 0.0,
            dtype=native_dtype(q.dtype),
            stream=stream,
        )
    for t in guarded:
        assert t[:GUARD].isnan().all() and t[-GUARD:].isnan().all(), "written outside"
    return out.view(B, L, H, D).transpose(1, 2).clone(), lse.view(B, H, L).clone()


def check_decode(backend, B, H, Hkv, L, T, P, D, dtype=BF16, mask=None, logits=1.0, sms=4, **form):
    """Against the formula; the same bits in another order of threads."""
    tensors, form = problem(B, H, Hkv, L, T, P, D, dtype, backend.device, logits), form_of(D, **form)
    mask = None if mask is None else mask.to(backend.device)
    results = []
    for seed, copies in ((1, "lazy"), (2, "eager")):
        if backend.device == "cpu":
            emulation().configure(order="random", seed=seed, cp_async=copies, sms=sms)
        results.append(run_decode(tensors, form, mask))
    assert all(map(torch.equal, *results))
    out, lse = results[0]
    check([out], lse, tensors, form, mask=mask)
    return out, lse


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("D", (64, 96, 128, 256))
@CUDA
def test_decode_over_head_sizes(backend, D, dtype):
    check_decode(backend, 2, 2, 1, 1, 70, 130, D, dtype)  # 4 rows of the prefix, 2 of a sequence
    check_decode(backend, 3, 4, 1, 2, 20, 70, D, dtype)  # 24 and 8: tiles of both kinds


@pytest.mark.parametrize("L,H,Hkv,B", [(1, 1, 1, 1), (1, 16, 1, 5), (3, 6, 2, 2), (16, 8, 2, 2), (16, 5, 1, 1)])
@CUDA
def test_decode_over_queries_and_groups(backend, L, H, Hkv, B):
    check_decode(backend, B, H, Hkv, L, 33, 65, 64)


@pytest.mark.parametrize("T", (0, *LENGTHS))
@pytest.mark.parametrize("P", PREFIXES)
@CUDA
def test_decode_over_keys(backend, P, T):
    for sms in (1, 16):  # few splits, many splits
        check_decode(backend, 2, 2, 1, 1, T, P, 64, sms=sms, causal=T > 0)


@pytest.mark.parametrize("window", (1, 6, 40, 71, 89))
@CUDA
def test_decode_with_a_window(backend, window):
    """Some own keys; all of them and one slot; all but one slot."""
    check_decode(backend, 4, 8, 1, 1, 70, 20, 64, window=window)
    check_decode(backend, 2, 2, 1, 5, 70, 20, 64, window=window)


@pytest.mark.parametrize("kind", ("left", "right", "holes"))
@CUDA
def test_decode_with_padding(backend, kind):
    check_decode(backend, 2, 2, 1, 2, 70, 20, 64, mask=padding(kind, 2, 70))


@CUDA
def test_decode_rows_that_see_nothing(backend):
    out, lse = check_decode(backend, 2, 2, 1, 2, 70, 20, 64, mask=padding("left", 2, 70), window=5)
    assert (out[0] == 0).all() and lse[0].isneginf().all()


@CUDA
def test_decode_in_full_capped_and_extreme(backend):
    check_decode(backend, 1, 2, 1, 4, 70, 20, 64, causal=False)
    check_decode(backend, 1, 2, 1, 4, 70, 20, 64, softcap=5.0, logits=3.0)
    check_decode(backend, 1, 2, 1, 4, 70, 20, 64, logits=1e4)


@CUDA
def test_decode_out_of_a_cache(backend):
    """Keys and values as views of a longer cache, as static caches are."""
    tensors, form = problem(2, 4, 2, 1, 90, 20, 64, device=backend.device), form_of(64)
    tensors[1:3] = [t.contiguous()[:, :, :50] for t in tensors[1:3]]
    out, lse = run_decode(tensors, form)
    check([out], lse, tensors, form)


@CUDA
def test_decode_refuses_what_it_cannot_do(backend):
    form = form_of(64)
    whole = problem(1, 2, 1, 17, 40, 20, 64, device=backend.device)
    unaligned = problem(1, 2, 1, 1, 40, 20, 64, device=backend.device)
    memory = torch.empty(unaligned[1].numel() + 1, dtype=BF16, device=backend.device)
    unaligned[1] = memory[1:].view(unaligned[1].shape)
    size = problem(1, 2, 1, 1, 40, 20, 80, device=backend.device)
    for tensors in (whole, unaligned, size):
        with pytest.raises(RuntimeError, match="prefix_attention_decode.*cudaErrorInvalidValue"):
            run_decode(tensors, form)


@CUDA
def test_the_static_report_knows_the_dynamic_shared_memory_of_decode(backend):
    if backend.device != "cpu":
        pytest.skip("launches are recorded by the emulation")
    emulation().reset()
    for D, dtype in itertools.product((64, 96, 128, 256), (BF16, FP16)):
        run_decode(problem(3, 8, 1, 1, 1, 1, D, dtype), form_of(D))
    asked = {name: size for name, size in emulation().dynamic_shared_bytes().items() if size}
    assert len(asked) == 8 and asked == {name: dynamic_shared_bytes(name) for name in asked}
    for pattern in CUDA_DYNAMIC_SHARED_BYTES:
        if pattern.startswith("prefix_attention"):
            assert any(re.fullmatch(pattern, name) for name in asked), pattern
