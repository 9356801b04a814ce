"""prefix_attention: outputs and gradients against float64, over the backends, and what autograd and compile ask."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import ops, use_backend
from fastpeft.ops import prefix_attention_eager as eager
from fastpeft.reference.prefix_attention import prefix_attention as reference
from tests.backends import over
from tests.parity import assert_parity, leaf

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
JOINED_PREFIXES = eager._JOINED_PREFIXES
NAMES = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")


@pytest.fixture(params=("blocks", "flash", "joined", "masked"))
def form(request, monkeypatch):
    """All forms of the eager backend on a CPU, whatever the sizes; small blocks, so that there are several."""
    monkeypatch.setattr(eager, "_FLASH_DEVICES", ("cpu", "cuda") if request.param == "flash" else ())
    for name in ("_JOINED_ROWS", "_JOINED_BACKWARD_ROWS"):
        monkeypatch.setattr(eager, name, 2 if request.param == "joined" else 10**9)
    monkeypatch.setattr(eager, "_JOINED_PREFIXES", 0)
    if request.param == "joined":  # where the CPU has no instructions for bf16 too
        monkeypatch.setattr(eager, "multiplies_natively", lambda dtype: True)
    monkeypatch.setattr(eager, "_MASK_ELEMENTS", 2**22 if request.param == "masked" else 0)
    # float64 for gradcheck
    monkeypatch.setattr(eager, "_FLASH_DTYPES", (BF16, FP16, FP64))
    monkeypatch.setattr(eager, "_JOINED_DTYPES", (BF16, FP16, FP32, FP64))
    monkeypatch.setattr(eager, "_MASKED_DTYPES", (FP32, FP64))
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", 2**12)
    monkeypatch.setattr(eager, "_LEAST_ROWS", 8)
    return request.param


def problem(B=2, H=4, Hkv=2, S=33, T=None, D=32, P=7, dtype=FP32, master=None):
    """q, k, v, prefix_k, prefix_v, dout: random. The first three lie as transformers has them, a token's heads side by
    side."""
    T = S if T is None else T
    q, k, v, dout = (torch.randn(B, n, h, D).transpose(1, 2) for n, h in ((S, H), (T, Hkv), (T, Hkv), (S, H)))
    prefix = torch.randn(Hkv, P, D), torch.randn(Hkv, P, D)
    return [t.to(dtype) for t in (q, k, v)] + [t.to(master or dtype) for t in prefix] + [dout.to(dtype)]


def padding(B, T, side):
    """[B, T] bool: the first sequence is padded, the last is whole."""
    mask = torch.ones(B, T, dtype=torch.bool)
    if side == "left":
        mask[0, : T // 2] = False
    elif side == "right":
        mask[0, T - T // 3 :] = False
    elif side == "full":
        mask[0] = False
    return mask


def run(function, tensors, dtype=None, **options):
    """Output and gradients by name; with `dtype` everything is computed in it."""
    *inputs, dout = tensors
    inputs = [leaf(t, dtype) for t in inputs]
    out = function(*inputs, **options)
    out.backward(dout.to(out.dtype))
    return {"out": out.detach()} | {name: t.grad for name, t in zip(NAMES, inputs, strict=True)}


def check(tensors, backend=None, **options):
    device = "cpu" if backend is None else backend.device
    tensors = [t.to(device) for t in tensors]
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    actual = run(ops.prefix_attention, tensors, backend=None if backend is None else backend.name, **options)
    plain = run(reference, tensors, **options)
    exact = run(reference, tensors, dtype=FP64, **options)
    for name in actual:
        assert actual[name].isfinite().all(), name
        assert_parity(actual[name], plain[name], exact[name], name)
    return actual


def kind(S, form):
    """float32 shows more, but torch's flash is for 16 bits; and of a few rows the largest error is a matter of luck."""
    in_float32 = form == "masked" or (S >= 10 and form == "blocks")
    return {"B": 16 if S < 10 else 3, "dtype": FP32 if in_float32 else BF16}


@over("eager")
@pytest.mark.parametrize("P", (1, 7, 16, 20, 31, 33, 64, 127, 128, 129, 600))
@pytest.mark.parametrize("S", (1, 63, 127, 300))
def test_parity_over_lengths(S, P, backend, form):
    check(problem(H=4, Hkv=2, S=S, P=P, **kind(S, form)), backend)


@over("eager")
@pytest.mark.parametrize("dtype,master", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32)])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("D", (64, 80, 128, 256))
def test_parity_over_groups_heads_and_dtypes(heads, D, dtype, master, backend, form):
    check(problem(2, *heads, 45, D=D, P=9, dtype=dtype, master=master), backend)


@over("eager")
@pytest.mark.parametrize("side", ("left", "right", "full", "none"))
@pytest.mark.parametrize("window", (None, 5, 9, 100))
@pytest.mark.parametrize("S,T", [(40, 40), (1, 40), (6, 40)])
def test_parity_over_padding_and_windows(S, T, window, side, backend, form):
    """Windows shorter than P = 8, of P + 1 and beyond everything; queries that come after a cache."""
    tensors = problem(H=4, Hkv=2, S=S, T=T, P=8, **kind(S, form))
    check(tensors, backend, window=window, key_padding_mask=padding(len(tensors[0]), T, side))


@over("eager")
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("options", ({}, {"softcap": 3.0}, {"scale": 0.7}, {"softcap": 2.0, "scale": 1.3}))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_parity_over_softcap_and_scale(options, causal, dtype, backend, form):
    check(problem(2, 4, 2, 37, dtype=dtype), backend, causal=causal, **options)


@over("eager")
def test_parity_for_attention_to_another_sequence(backend, form):
    check(problem(2, 4, 2, 37, 21), backend, causal=False)
    check(problem(2, 4, 2, 5, 70), backend, causal=False, key_padding_mask=padding(2, 70, "right"))


@over("eager")
@pytest.mark.parametrize("window", (None, 6))
def test_documents_are_a_loop_over_documents(window, backend, form):
    """Documents of 1, 20, 0, 3 and 16 tokens; against the formula, and bit for bit against calls of their own."""
    bounds = torch.tensor([0, 1, 21, 21, 24, 40], dtype=torch.int32)
    tensors = problem(1, 4, 2, 40)
    actual = check(tensors, backend, cu_seqlens=bounds, window=window)
    q, k, v, *prefix, _ = (t.to(backend.device) for t in tensors)
    for start, end in zip(bounds, bounds[1:], strict=False):
        own = [t[:, :, start:end] for t in (q, k, v)]
        alone = ops.prefix_attention(*own, *prefix, window=window, backend=backend.name)
        torch.testing.assert_close(actual["out"][:, :, start:end], alone, rtol=1e-5, atol=1e-5)


@over("eager")
@pytest.mark.parametrize("where", ("real", "prefix", "both"))
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_large_logits_and_zero_values(where, dtype, backend, form):
    """Logits of 1e4: a softmax without its largest score subtracted would overflow, a rounded one would be another."""
    q, k, v, prefix_k, prefix_v, dout = problem(2, 4, 2, 40, dtype=dtype)
    k = k * 1e4 if where != "prefix" else k
    prefix_k = prefix_k * 1e4 if where != "real" else prefix_k
    for values in ((v, prefix_v), (torch.zeros_like(v), prefix_v), (v, torch.zeros_like(prefix_v))):
        tensors = [q, k, values[0], prefix_k, values[1], dout]
        actual = run(ops.prefix_attention, tensors, backend=backend.name)
        plain, exact = run(reference, tensors), run(reference, tensors, dtype=FP64)
        # Most weights are 0 or 1, so most gradients are 0: errors are measured by the largest gradient of them all.
        floor = torch.finfo(dtype).eps * max(t.abs().max() for t in exact.values())
        for name in actual:
            error, plain_error = ((found[name].double() - exact[name]).abs().max() for found in (actual, plain))
            assert error <= 2 * plain_error + floor, name


@over("eager")
def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient(backend):
    tensors = problem(2, 2, 1, 12, D=16, P=3)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :9] = False  # in sequence 0, rows 3 to 8 see neither the prefix (window) nor a key (padding)
    got = check(tensors, backend, window=4, key_padding_mask=mask)
    assert (got["out"][0, :, 3:9] == 0).all() and (got["dq"][0, :, 3:9] == 0).all()
    assert (got["out"][0, :, :3] != 0).any() and (got["out"][0, :, 9:] != 0).any()


@over("eager")
def test_no_rows(backend):
    for shape in ({"B": 0}, {"S": 0}):
        tensors = [t.to(backend.device) for t in problem(**shape)]
        got = run(ops.prefix_attention, tensors, backend=backend.name)
        assert got["out"].shape == tensors[0].shape and (got["dprefix_k"] == 0).all()


@over("eager")
def test_no_keys(backend, form):
    """Nothing but the prefix is seen. torch's flash attention on a CPU would end the process: it divides by their
    number."""
    check(problem(2, 4, 2, 33, 0, dtype=BF16), backend, causal=False)


def test_which_form_serves_on_a_cpu(monkeypatch):
    """Long rows without a mask of their own go to torch's flash attention, and to blocks in a short backward; in
    float32 also few rows and masked ones, but to blocks in backward. A long prefix goes to blocks."""
    monkeypatch.setattr(eager, "multiplies_natively", lambda dtype: True)
    calls = []
    for name in ("_joined_forward", "_joined_backward", "_block_forward", "_block_backward"):
        stock = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, name=name, stock=stock: calls.append(name) or stock(*a))
    for S, P, dtype, options, expected in (
        (800, 3, BF16, {}, ["_joined_forward", "_joined_backward"]),
        (100, 3, BF16, {}, ["_joined_forward", "_block_backward"]),
        (100, 26, BF16, {}, ["_block_forward", "_block_backward"]),
        (800, 3, FP32, {}, ["_joined_forward", "_block_backward"]),
        (40, 3, FP32, {}, ["_joined_forward", "_block_backward"]),
        (40, 30, FP32, {}, ["_block_forward", "_block_backward"]),
        (40, 3, FP32, {"key_padding_mask": padding(1, 40, "left")}, ["_joined_forward", "_block_backward"]),
        (40, 3, FP32, {"softcap": 2.0}, ["_block_forward", "_block_backward"]),
        (800, 3, BF16, {"key_padding_mask": padding(1, 800, "left")}, ["_block_forward", "_block_backward"]),
    ):
        calls.clear()
        check(problem(1, 2, 1, S, P=P, dtype=dtype), **options)
        assert calls == expected, (S, P, dtype)


def test_parity_for_views(form):
    """Contiguous and transposed inputs, rows of a wider tensor, an expanded gradient."""
    dtype = kind(33, form)["dtype"]
    q, k, v, prefix_k, prefix_v, dout = problem(2, 4, 2, 33, dtype=dtype)
    wide = torch.randn(2, 33, 3, 4, 35).to(dtype)
    check([wide[:, :, 1, :, 3:].transpose(1, 2), k.contiguous(), v, prefix_k, prefix_v, dout])
    check([q, k, v, torch.randn(7, 2, 32).to(dtype).transpose(0, 1), prefix_v, dout.contiguous()])
    check([q, k, v, prefix_k, prefix_v, torch.ones(1, 1, 1, 1, dtype=dtype).expand(2, 4, 33, 32)])


@pytest.mark.parametrize("options", ({}, {"window": 5}, {"softcap": 1.5}, {"causal": False}, {"mask": True}))
def test_gradcheck_in_float64(options, form):
    inputs = [leaf(t) for t in problem(2, 4, 2, 6, D=4, P=3, dtype=FP64)[:5]]
    options = dict(options)
    if options.pop("mask", False):
        options["key_padding_mask"] = padding(2, 6, "left")
    for function in (ops.prefix_attention, reference):
        assert torch.autograd.gradcheck(lambda *t, f=function: f(*t, **options), inputs)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returns in storage of its own."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize("options", ({}, {"key_padding_mask": "left"}, {"window": 700}))
def test_no_tensor_of_queries_times_keys(options, monkeypatch):
    """2048 queries and 2048 keys in blocks and by torch's flash: nothing of a quarter of their product."""
    S, D, P = 2048, 16, 40
    options = {name: padding(1, S, o) if o == "left" else o for name, o in options.items()}
    tensors = problem(1, 2, 1, S, D=D, P=P, dtype=BF16)
    for flash in (("cpu",), ()):
        monkeypatch.setattr(eager, "_FLASH_DEVICES", flash)
        with Largest() as largest:
            run(ops.prefix_attention, tensors, **options)
        assert 2 * S * D <= largest.elements < S * (P + S) / 4, flash
    with Largest() as largest:
        run(reference, tensors, **options)
    assert largest.elements >= S * (P + S)  # the test can see what it forbids


def test_a_long_prefix_is_not_copied_for_each_sequence(form, monkeypatch):
    """A prefix of 3000 positions, a batch of 32: its gradient is summed as it comes, and no form copies it."""
    monkeypatch.setattr(eager, "_JOINED_PREFIXES", JOINED_PREFIXES)
    tensors = problem(32, 2, 2, 4, D=8, P=3000)
    with Largest() as largest:
        run(ops.prefix_attention, tensors)
    assert largest.elements < 8 * 2 * 3000 * 8


def test_saves_inputs_output_and_one_number_a_row():
    q, k, v, *prefix, _ = problem(2, 4, 2, 64, dtype=BF16, master=FP32)
    inputs = [leaf(t) for t in (q, k, v, *prefix)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.prefix_attention(*inputs)
    expected = [(t.shape, t.dtype) for t in (*inputs, out)] + [(torch.Size([2, 4, 64]), FP32)]
    assert sorted(map(str, ((t.shape, t.dtype) for t in saved))) == sorted(map(str, expected))


def test_the_heads_of_a_token_are_side_by_side(form):
    """So that transformers' transpose and reshape copy nothing."""
    out = ops.prefix_attention(*problem()[:5])
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_come_in_the_type_of_the_parameter_and_only_where_asked():
    q, k, v, prefix_k, prefix_v, dout = problem(dtype=BF16, master=FP32)
    prefix_k = leaf(prefix_k)
    out = ops.prefix_attention(q, k, v, prefix_k, prefix_v)
    out.backward(dout)
    assert out.dtype == BF16 and prefix_k.grad.dtype == FP32 and prefix_v.grad is None and q.grad is None
    assert not ops.prefix_attention(q, k, v, prefix_k.detach(), prefix_v).requires_grad


def test_results_repeat_bit_for_bit(form):
    tensors = problem(3, 4, 2, 50, dtype=BF16)
    first, second = run(ops.prefix_attention, tensors), run(ops.prefix_attention, tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_retain_graph_and_second_derivative():
    q, k, v, prefix_k, prefix_v, dout = (leaf(t) for t in problem(dtype=FP64))
    out = ops.prefix_attention(q, k, v, prefix_k, prefix_v)
    first = torch.autograd.grad(out, (q, prefix_k), dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, prefix_k), dout, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        second[0].sum().backward()


def test_autocast():
    """The projections give bfloat16; a float32 prefix goes along."""
    q, k, v, prefix_k, prefix_v, dout = problem(dtype=BF16, master=FP32)
    with torch.autocast("cpu", BF16):
        inside = run(ops.prefix_attention, [q, k, v, prefix_k, prefix_v, dout])
    outside = run(ops.prefix_attention, [q, k, v, prefix_k, prefix_v, dout])
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


@pytest.mark.parametrize("options", ({}, {"window": 5, "softcap": 2.0}, {"causal": False}))
def test_compile_fullgraph(options):
    tensors = problem(dtype=FP32)
    compiled = torch.compile(ops.prefix_attention, fullgraph=True, backend="aot_eager")
    eager_results, results = run(ops.prefix_attention, tensors, **options), run(compiled, tensors, **options)
    for name in results:
        torch.testing.assert_close(results[name], eager_results[name])


def test_opcheck():
    inputs = [leaf(t) for t in problem(S=5)[:5]]
    arguments = (*inputs, None, padding(2, 5, "left"), True, 0.25, 3, None, True, None)
    torch.library.opcheck(torch.ops.fastpeft.prefix_attention, arguments)


def test_backends_by_name():
    tensors = problem()[:5]
    with use_backend("reference"):
        assert torch.equal(ops.prefix_attention(*tensors, window=3), reference(*tensors, window=3))
    with pytest.raises(ValueError, match="has no backend 'cuda'|cannot run on backend 'cuda'"):
        ops.prefix_attention(*tensors, backend="cuda")


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"q": torch.randn(2, 4, 33)}, ValueError, "q is .2, 4, 33."),
        ({"v": torch.randn(2, 2, 32, 32)}, ValueError, "v is .2, 2, 32, 32."),
        ({"q": torch.randn(2, 3, 33, 32)}, ValueError, "q has 3 heads, k has 2"),
        ({"prefix_k": torch.randn(4, 7, 32)}, ValueError, "both must be .2, P, 32."),
        ({"prefix_k": torch.randn(2, 0, 32), "prefix_v": torch.randn(2, 0, 32)}, ValueError, "prefix is empty"),
        ({"q": torch.randn(2, 4, 34, 32)}, ValueError, "34 queries and 33 keys"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": 3, "causal": False}, ValueError, "causal is False"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"k": torch.randn(2, 2, 33, 32).half()}, TypeError, "k is torch.float16"),
        ({"prefix_v": torch.zeros(2, 7, 32, dtype=torch.int32)}, TypeError, "prefix_v is torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 33])}, ValueError, "int32"),
        ({"cu_seqlens": torch.tensor([0, 33], dtype=torch.int32)}, ValueError, "B must be 1"),
        ({"key_padding_mask": torch.ones(2, 32, dtype=torch.bool)}, ValueError, "must be .2, 33. torch.bool"),
        ({"key_padding_mask": torch.ones(2, 33)}, ValueError, "key_padding_mask is .2, 33. torch.float32"),
        ({"prefix_k": torch.randn(2, 7, 32, device="meta")}, ValueError, "prefix_k is on meta"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), problem(), strict=False)) | change
    with pytest.raises(error, match=message):
        ops.prefix_attention(**arguments)
