"""How each backend computes prefix_attention, arguments checked already, and which one is chosen.

Each has `forward` and `backward` as in `prefix_attention_eager`. Where torch's flash attention serves, Triton's small
kernels take in the prefix beside it; elsewhere (windows, softcap, padding, a few queries over a cache) its own flash
attention begins with the prefix. The native module has the decoding step alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.backend import Row
from fastpeft.ops import prefix_attention_eager as eager
from fastpeft.quant import native_dtype

DECODE_QUERIES = 16  # of a sequence: the most that the native kernel takes
DECODE_HEAD_SIZES = (64, 96, 128, 256)
MOST_HEAD_SIZE = 256  # of the Triton kernels

# tokens: queries of a sequence. Reasons are bytes and operations in the headers of the kernels.
TABLE = (
    Row(
        "cuda",
        tokens=DECODE_QUERIES,
        training=False,
        reason="decoding: the prefix is read once for the batch, and all keys are divided among the SMs",
    ),
    Row("triton", reason="one pass for the prefix beside torch's flash attention, or one kernel where that cannot"),
    Row("eager", dtypes=None, capability=(0, 0), reason="float32, float64, older GPUs, CPUs"),
)


def _needs_16_bits(q: Tensor) -> str | None:
    return None if q.dtype in backends.HALF_TYPES else f"q is {q.dtype}; the kernels take bf16 and fp16"


def _needs_decoding(q: Tensor, cu_seqlens: Tensor | None) -> str | None:
    if q.shape[2] > DECODE_QUERIES:
        return f"a sequence has {q.shape[2]} queries; the kernel is for decoding, up to {DECODE_QUERIES}"
    if q.shape[3] not in DECODE_HEAD_SIZES:
        return f"the head size is {q.shape[3]}; the kernel has {', '.join(map(str, DECODE_HEAD_SIZES))}"
    return None if cu_seqlens is None else "documents are packed; the kernel takes sequences"


def _needs_head_size(q: Tensor) -> str | None:
    return None if q.shape[3] <= MOST_HEAD_SIZE else f"the head size is {q.shape[3]}; the kernels take {MOST_HEAD_SIZE}"


RULES = {
    "cuda": lambda q, cu: _needs_16_bits(q) or _needs_decoding(q, cu) or backends.needs_cuda_module(q),
    "triton": lambda q, cu: _needs_16_bits(q) or _needs_head_size(q) or backends.needs_triton(q),
    "eager": backends.always,
}


def choose(q: Tensor, cu_seqlens: Tensor | None, training: bool, backend: str | None, rules=RULES) -> str:
    """The backend's name."""
    order = backends.preferred(TABLE, q, q.shape[2], "dense", training) if q.is_cuda else None
    return backends.choose("prefix_attention", rules, q, cu_seqlens, backend=backend, order=order)


class Cuda:
    """The native decoding kernel; gradients are those of eager, from the same output and log-sum-exp."""

    @staticmethod
    def forward(q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask, form) -> tuple[Tensor, Tensor]:
        (B, H, S, D), (_, Hkv, T, _), P = q.shape, k.shape, prefix_k.shape[1]
        out, lse = _outputs(q)
        if out.numel() == 0:
            return out, lse
        q, k, v = (_in_vectors(t) for t in (q, k, v))
        prefix_k, prefix_v = (_in_vectors(t.to(q.dtype).contiguous()) for t in (prefix_k, prefix_v))
        mask = None if key_padding_mask is None else key_padding_mask.contiguous()
        sizes = dict(B=B, H=H, Hkv=Hkv, L=S, T=T, P=P, D=D)
        tensors = dict(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, mask=mask, out=out, lse=lse)
        native = _native.cuda
        with _native.stream_on(q.device) as stream:
            workspace_bytes = native.prefix_attention_decode_workspace_bytes(**sizes)
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=q.device)
            native.prefix_attention_decode(
                **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()},
                **{f"{name}_stride": tensors[name].stride()[:3] for name in ("q", "k", "v")},
                **sizes,
                causal=form.causal,
                scale=form.scale,
                window=form.window or 0,
                softcap=form.softcap or 0.0,
                dtype=native_dtype(q.dtype),
                workspace=workspace.data_ptr(),
                stream=stream,
            )
        return out, lse

    backward = staticmethod(eager.backward)


def _in_vectors(t: Tensor) -> Tensor:
    """t, or a copy where its rows are not vectors of 16 bytes as the kernel loads them: a cache's are."""
    is_vectors = t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and all(stride % 8 == 0 for stride in t.stride()[:-1])
    return t if is_vectors else t.clone(memory_format=torch.contiguous_format)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_permuted(q.shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


class Triton:
    """Triton kernels: the prefix beside torch's flash attention over the real keys, or all in one."""

    @staticmethod
    def forward(q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask, form) -> tuple[Tensor, Tensor]:
        if q.numel() == 0:
            return _outputs(q)
        prefix = [t.to(q.dtype).contiguous() for t in (prefix_k, prefix_v)]
        if eager.flash_serves(q, k, cu_seqlens, key_padding_mask, form):
            out, lse = eager.torch_flash(q, k, v, cu_seqlens, form)
            out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
            with _native.stream_on(q.device):
                _triton().prefix_attention_merge(_by_rows(q), *prefix, cu_seqlens, k.shape[2], form, out, lse)
            return out, lse
        out, lse = _outputs(q)
        q, k, v = (_by_rows(t) for t in (q, k, v))
        with _native.stream_on(q.device):
            _triton().prefix_attention_fwd(q, k, v, *prefix, cu_seqlens, _as_bytes(key_padding_mask), form, out, lse)
        return out, lse

    @staticmethod
    def backward(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask, out, lse, form) -> list[Tensor]:
        if q.numel() == 0:
            return [torch.zeros_like(t) for t in (q, k, v, prefix_k, prefix_v)]
        prefix = [t.to(q.dtype).contiguous() for t in (prefix_k, prefix_v)]
        dprefix = [torch.empty(t.shape, dtype=torch.float32, device=q.device) for t in prefix]
        delta, keys, flash = torch.empty_like(lse), k.shape[2], None
        if eager.flash_serves(q, k, cu_seqlens, key_padding_mask, form):
            flash = eager.torch_flash_backward(dout, q, k, v, cu_seqlens, form, out, lse)
        dout, q, k, v = (_by_rows(t) for t in (dout, q, k, v))
        kernels = _triton()
        with _native.stream_on(q.device):
            if flash is not None:
                dq, dk, dv = flash
                dq = _by_rows(dq)
                kernels.prefix_attention_add_dq(dout, q, *prefix, cu_seqlens, keys, form, out, lse, delta, dq)
            else:
                dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
                masks = cu_seqlens, _as_bytes(key_padding_mask), form
                kernels.prefix_attention_dq(dout, q, k, v, *prefix, *masks, out, lse, delta, dq)
                if keys > 0:
                    kernels.prefix_attention_dkv(dout, q, k, v, prefix[0], *masks, lse, delta, dk, dv)
            kernels.prefix_attention_dprefix(dout, q, *prefix, cu_seqlens, keys, form, lse, delta, *dprefix)
        return [dq, dk, dv, *dprefix]


def _triton():
    from fastpeft.triton_kernels import prefix_attention

    return prefix_attention


def _by_rows(t: Tensor) -> Tensor:
    """t, or a copy where the elements of a row are apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


RUNNERS = {"cuda": Cuda, "triton": Triton, "eager": eager}
