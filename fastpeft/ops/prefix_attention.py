"""prefix_attention: attention over real keys and over a trainable prefix that all sequences share."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import backend as backends
from fastpeft.ops.lora_linear import autocast_dtype
from fastpeft.ops.prefix_attention_backends import RULES, RUNNERS, choose
from fastpeft.ops.prefix_attention_eager import Form
from fastpeft.reference.prefix_attention import prefix_attention as _reference

_RULES = RULES | {"reference": backends.always}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale * q [prefix_k; k]^T) [prefix_v; v]`; the prefix stands before each sequence.

    q: [B, H, S, D] bf16|fp16|fp32|fp64. k, v: [B, Hkv, T, D] in q's dtype, H a multiple of Hkv. prefix_k, prefix_v:
    [Hkv, P, D], P >= 1, any float dtype, shared by the batch; cast to q's dtype, gradients return in their own type.
    All may be views of any strides.

    Query i stands at position P + T - S + i, key j at P + j, slot j of the prefix at j. causal: a query sees what
    stands no later than itself; needs S <= T. window: and less than `window` positions before it, the prefix included.
    scale: D^-0.5 when None. softcap: scores become softcap * tanh(score / softcap). key_padding_mask: [B, T] bool,
    False hides a real key. cu_seqlens: [documents + 1] int32, 0 first and S last: B is 1, S is T, and each document is
    a sequence of its own, with the prefix before it.

    Scores, softmax and its statistics are float32 (float64 for float64); their weights are multiplied in q's dtype with
    float32 accumulation. Returns [B, H, S, D] in q's dtype, with the heads of a token side by side in memory; a row
    that sees nothing is 0. Saved for backward: the inputs, the output and a float32 per row; no tensor of S x (P + T)
    is made. The prefix's gradient is summed over batch and heads in float32, in a fixed order. Differentiable once with
    respect to q, k, v, prefix_k and prefix_v.

    Raises ValueError (shapes, ranges, devices, an unable backend) or TypeError (dtypes) before anything is computed.
    Source: Li and Liang, "Prefix-Tuning", 2021 (https://arxiv.org/abs/2101.00190).
    """
    _check(q, k, v, prefix_k, prefix_v, causal, window, softcap, cu_seqlens, key_padding_mask)
    form = Form(causal, q.shape[-1] ** -0.5 if scale is None else float(scale), window, softcap)
    tensors = (q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors[:5])
    if torch.compiler.is_compiling() and backend != "reference":
        # The backend is chosen when the op runs: use_backend is invisible to the tracer.
        return torch.ops.fastpeft.prefix_attention(*tensors, *form, training, backend)[0]
    name = choose(q, cu_seqlens, training, backend, _RULES)
    if name == "reference":
        masks = {"cu_seqlens": cu_seqlens, "key_padding_mask": key_padding_mask}
        return _reference(q, k, v, prefix_k, prefix_v, **form._asdict(), **masks)
    if not training:  # decoding: an autograd node would cost as much as a small operation
        return _forward(name, tensors, form)[0]
    return PrefixAttentionFn.apply(*tensors, form, name)


def _check(q, k, v, prefix_k, prefix_v, causal, window, softcap, cu_seqlens, mask) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q is {tuple(q.shape)}, k is {tuple(k.shape)} and v is {tuple(v.shape)}; "
                         "they must be [B, H, S, D], [B, Hkv, T, D] and [B, Hkv, T, D]")  # fmt: skip
    (B, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"q has {H} heads, k has {Hkv}: the heads of q must be a multiple of those of k")
    if prefix_k.shape != prefix_v.shape or prefix_k.dim() != 3 or prefix_k.shape[::2] != (Hkv, D):
        raise ValueError(f"prefix_k is {tuple(prefix_k.shape)} and prefix_v is {tuple(prefix_v.shape)}; "
                         f"both must be [{Hkv}, P, {D}]")  # fmt: skip
    if prefix_k.shape[1] == 0:
        raise ValueError("the prefix is empty: P must be at least 1")
    if causal and S > T:
        raise ValueError(f"there are {S} queries and {T} keys; a causal attention needs at least as many keys")
    if window is not None and (not causal or not isinstance(window, int) or window < 1):
        raise ValueError(f"window is {window!r} and causal is {causal}; it must be a positive integer, of a causal "
                         "attention")  # fmt: skip
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap!r}; it must be positive")
    if q.dtype not in _FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; they must be of one floating point dtype")
    if not prefix_k.is_floating_point() or not prefix_v.is_floating_point():
        raise TypeError(f"prefix_k is {prefix_k.dtype} and prefix_v is {prefix_v.dtype}; both must be floating point")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; "
                             "it must be [documents + 1] int32")  # fmt: skip
        if B != 1 or S != T or mask is not None:
            raise ValueError(f"with cu_seqlens B must be 1, S equal to T, and key_padding_mask None; "
                             f"got B = {B}, S = {S}, T = {T}")  # fmt: skip
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise ValueError(f"key_padding_mask is {tuple(mask.shape)} {mask.dtype}; it must be ({B}, {T}) torch.bool")
    named = {"k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    for name, t in (named | {"cu_seqlens": cu_seqlens, "key_padding_mask": mask}).items():
        if t is not None and t.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} is on {t.device}")


def _forward(name: str, tensors: tuple, form: Form) -> tuple[Tensor, Tensor]:
    # All dtypes are settled: an autocast that is on must not mix in.
    q = tensors[0]
    guard = torch.autocast(q.device.type, enabled=False) if autocast_dtype(q) is not None else nullcontext()
    with guard:
        return RUNNERS[name].forward(*tensors, form)


def _backward(name: str, dout: Tensor, saved: tuple, form: Form) -> list[Tensor]:
    """The five gradients in the types of their tensors."""
    guard = torch.autocast(dout.device.type, enabled=False) if autocast_dtype(dout) is not None else nullcontext()
    with guard:
        grads = RUNNERS[name].backward(dout, *saved, form)
    return [grad.to(t.dtype) for grad, t in zip(grads, saved[:5], strict=True)]


class PrefixAttentionFn(torch.autograd.Function):
    """The autograd node of `prefix_attention`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask, form, name):
        tensors = (q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask)
        out, lse = _forward(name, tensors, form)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*tensors, out, lse)
            ctx.form, ctx.name = form, name
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *_backward(ctx.name, dout, ctx.saved_tensors, ctx.form), None, None, None, None


# The same computation as a torch.library op: one opaque node in a compiled graph.

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? cu_seqlens, Tensor? mask"
_FORM = "bool causal, float scale, int? window, float? softcap, bool training, str? backend"


@torch.library.custom_op(
    "fastpeft::prefix_attention", mutates_args=(), schema=f"({_TENSORS}, {_FORM}) -> (Tensor, Tensor)"
)
def _op(q, k, v, prefix_k, prefix_v, cu_seqlens, mask, *form_and_backend):
    *form, training, backend = form_and_backend
    form = Form(*form)
    name = choose(q, cu_seqlens, training, backend)
    return RUNNERS[name].forward(q, k, v, prefix_k, prefix_v, cu_seqlens, mask, form)


@_op.register_fake
def _(q, k, v, prefix_k, prefix_v, cu_seqlens, mask, *form_and_backend):
    out = torch.empty_permuted(q.shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op(
    "fastpeft::prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_TENSORS}, Tensor out, Tensor lse, {_FORM}) -> Tensor[]",
)
def _op_backward(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, mask, out, lse, *form_and_backend):
    *form, training, backend = form_and_backend
    form = Form(*form)
    name = choose(q, cu_seqlens, training, backend)
    grads = _backward(name, dout, (q, k, v, prefix_k, prefix_v, cu_seqlens, mask, out, lse), form)
    return [_as_promised(grad, t) for grad, t in zip(grads[:3], (q, k, v), strict=True)] + grads[3:]


def _as_promised(grad: Tensor, t: Tensor) -> Tensor:
    """grad, or a copy where its elements do not lie as the fake says: torch's flash attention has its own order."""
    promised = torch.empty_like(t, device="meta")
    return grad if grad.stride() == promised.stride() else torch.empty_like(t).copy_(grad)


@_op_backward.register_fake
def _(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, mask, out, lse, *form_and_backend):
    real = [torch.empty_like(t) for t in (q, k, v)]
    return real + [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (prefix_k, prefix_v)]


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.form_and_backend = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, dout, _dlse):
    grads = _op_backward(dout, *ctx.saved_tensors, *ctx.form_and_backend)
    return *grads, *[None] * (2 + len(ctx.form_and_backend))


_op.register_autograd(_autograd, setup_context=_setup_context)
