"""The eager backend of prefix_attention: torch's flash attention and a merge, or blocks of rows with plain products.

Flash: torch's own op attends over the real keys and returns the log-sum-exp; the prefix is a small product beside it,
and both are merged in float32. In backward torch's op gets the merged output and log-sum-exp, so that its gradients are
those of the joint softmax. Joined, on a CPU: torch's op over copies in which the prefix stands before the keys of each
sequence; in float32, and in forward only, also with a mask that says what a row sees. Blocks: where torch's op cannot
(softcap; in 16 bits padding and windows) or is slower. A block of query rows has the scores of prefix and real keys
side by side in one buffer, so that one softmax serves both.

No tensor of S x (P + T) elements is made but that mask, of `_MASK_ELEMENTS` at most: temporaries are bounded by
`_BLOCK_ELEMENTS`, or by 32 rows of scores of the sequences that are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.cpu import multiplies_natively

aten = torch.ops.aten

# Elements of the scores of one block. On a CPU half a mebibyte of float32 for each thread, half of a common
# second-level cache; on a GPU large against a launch (modelled).
_BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}
_LEAST_ROWS = 32

# Where torch's flash attention attends over the real keys beside the prefix. On a CPU joined keys are faster (below);
# there only tests take it.
_FLASH_DEVICES = ("cuda",)
# From how many query rows torch's flash attention is called with joined keys on a CPU. In terms of blocks it took (9
# heads of 64, 3 of keys, P = 32; AMD EPYC, AVX512-BF16; medians of 41 pairs): forward of 256 to 1024 rows 0.65 to 0.78
# on two threads and 0.9 to 1.15 on one; backward of 512 rows 1.15 and 1.40, of 768, from where on it has tiles of 256
# rows, 0.85 and 1.05, of 1024 0.81 and 0.93.
_JOINED_ROWS, _JOINED_BACKWARD_ROWS = 64, 768
_JOINED_PREFIXES = 4  # so many times P rows at least: the rows of zeros and the copies of the prefix should cost little
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_JOINED_DTYPES = (*_FLASH_DTYPES, torch.float32)
# In float32 the forward of torch's op with an added mask is faster than blocks, and rows of zeros are faster still from
# _JOINED_BACKWARD_ROWS on (2 threads, AVX2, 9 heads of 64, 3 of keys, P = 20; 2 x 256 rows: blocks 7.5 ms, mask 4.8;
# 1 x 1024 rows: blocks 44, mask 33, zeros 22). The mask is as large as this at most, 16 MiB.
_MASKED_DTYPES = (torch.float32,)
_MASK_ELEMENTS = 2**22


class Form(NamedTuple):
    """The numbers of an attention: everything but its tensors."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None


def forward(q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask, form) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, S, D] in q's dtype, a token's heads side by side, and lse [B, H, S] in at least float32."""
    flash = flash_serves(q, k, cu_seqlens, key_padding_mask, form)
    if q.numel() > 0 and not flash and (joined := _joins(q, k, prefix_k, cu_seqlens, key_padding_mask, form)):
        return _joined_forward(q, k, v, prefix_k, prefix_v, form, joined)
    out = torch.empty_permuted(q.shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=_wide(q.dtype), device=q.device)
    if out.numel() == 0:
        return out, lse
    if flash:
        _flash_forward(q, k, v, prefix_k, prefix_v, cu_seqlens, form, out, lse)
    else:
        for i in _documents(cu_seqlens):
            real = q[:, :, i], k[:, :, i], v[:, :, i]
            _block_forward(*real, prefix_k, prefix_v, key_padding_mask, form, out[:, :, i], lse[:, :, i])
    return out, lse


def backward(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, key_padding_mask, out, lse, form) -> list[Tensor]:
    """Returns dq, dk, dv, dprefix_k, dprefix_v; the last two summed over batch and group, in at least float32."""
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    dprefix = [torch.zeros(t.shape, dtype=_wide(q.dtype), device=q.device) for t in (prefix_k, prefix_v)]
    grads = [dq, dk, dv, *dprefix]
    if out.numel() == 0:
        return [grad.zero_() for grad in grads]
    if flash_serves(q, k, cu_seqlens, key_padding_mask, form):
        _flash_backward(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, form, out, lse, grads)
    elif joined := _joins(q, k, prefix_k, cu_seqlens, key_padding_mask, form, backward=True):
        _joined_backward(dout, q, k, v, prefix_k, prefix_v, form, out, lse, joined, grads)
    else:
        for i in _documents(cu_seqlens):
            real = [t[:, :, i] for t in (dout, q, k, v)]
            into = [t[:, :, i] for t in (dq, dk, dv)]
            _block_backward(*real, prefix_k, prefix_v, key_padding_mask, form, [*into, *dprefix])
    return grads


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _documents(cu_seqlens: Tensor | None) -> list[slice]:
    """The rows of each document. Reads cu_seqlens on the host, which torch's flash attention on a GPU does not."""
    if cu_seqlens is None:
        return [slice(None)]
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False) if end > start]


# Products of 16-bit tensors


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in at least float32, [N, R, K] x [N, K, C]."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = _wide(a.dtype)
    return torch.bmm(a.to(wide), b.to(wide))


def _product_dtype(t: Tensor) -> torch.dtype:
    """In which dtype rounded operands are multiplied: t's, or float32 where a CPU has no instruction for it."""
    return torch.float32 if t.device.type == "cpu" and not multiplies_natively(t.dtype) else t.dtype


# Blocks. Columns are counted over [prefix; keys]: the query of row i stands at column P + T - S + i. The G heads that
# share a key take turns in the rows of its scores, i * G + g for row i of head g, so that a block of rows is a slice.


class _Block(NamedTuple):
    """Rows of some sequences, and the columns that any of these rows may see."""

    rows: slice
    columns: slice


class _Plan(NamedTuple):
    """Which sequences are worked on together, in which blocks."""

    batches: list[slice]
    blocks: list[_Block]
    P: int
    T: int
    S: int
    G: int


def _plan(q: Tensor, k: Tensor, P: int, form: Form) -> _Plan:
    (B, H, S, _), (_, Hkv, T, _) = q.shape, k.shape
    budget = _BLOCK_ELEMENTS.get(q.device.type, _BLOCK_ELEMENTS["cuda"])
    if q.device.type == "cpu":
        budget *= torch.get_num_threads()
        # torch.bmm gives a thread whole heads: of 3 of them two threads would have 2 and 1.
        balanced = math.lcm(Hkv, torch.get_num_threads()) // Hkv
    else:
        balanced = 1
    together = min(B, max(balanced, budget // (H * S * (P + T)) // balanced * balanced))
    step = min(S, max(_LEAST_ROWS, budget // (together * H * (P + T))))
    blocks = []
    for start in range(0, S, step):
        rows = slice(start, min(start + step, S))
        first = 0 if form.window is None else max(0, P + T - S + rows.start - form.window + 1)
        blocks.append(_Block(rows, slice(first, P + T - S + rows.stop if form.causal else P + T)))
    return _Plan([slice(b, min(b + together, B)) for b in range(0, B, together)], blocks, P, T, S, H // Hkv)


def _joined(prefix: Tensor, real: Tensor, dtype: torch.dtype) -> Tensor:
    """[n * Hkv, P + T, D] in `dtype`: the prefix before each of n sequences."""
    (n, Hkv, T, D), P = real.shape, prefix.shape[1]
    joined = torch.empty(n, Hkv, P + T, D, dtype=dtype, device=real.device)
    joined[:, :, :P] = prefix
    joined[:, :, P:] = real
    return joined.flatten(0, 1)


def _by_rows(t: Tensor, G: int) -> Tensor:
    """[n, H, S, C] as [n, Hkv, S, G, C], a view."""
    return t.unflatten(1, (-1, G)).transpose(2, 3)


def _stacked(t: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """[n, H, S, C] -> [n * Hkv, S * G, C] in `dtype`."""
    view = _by_rows(t, G)
    return torch.empty(view.shape, dtype=dtype, device=t.device).copy_(view).flatten(2, 3).flatten(0, 1)


def _put(rows: Tensor, into: Tensor, G: int) -> None:
    """The way back: [n * Hkv, S * G, C] into [n, H, S, C]."""
    into = _by_rows(into, G)
    into.copy_(rows.view(into.shape))


def _scores(queries: Tensor, keys: Tensor, block: _Block, plan: _Plan, hidden: Tensor | None, form: Form) -> Tensor:
    """[n * Hkv, rows * G, columns]; -inf where a row does not see a column. hidden: [n, T], True hides a real key."""
    P, T, S, G = plan[2:]
    rows, columns = block
    scores = torch.bmm(queries[:, rows.start * G : rows.stop * G], keys[:, columns].transpose(1, 2)).mul_(form.scale)
    if form.softcap is not None:
        scores.div_(form.softcap).tanh_().mul_(form.softcap)
    first = P + T - S + rows.start  # where the first row stands
    by_row = scores.view(len(scores), rows.stop - rows.start, G, -1)
    row = torch.arange(by_row.shape[1], device=scores.device)[:, None, None]
    if form.causal and len(row) > 1:
        column = row.flatten()
        by_row[..., first - columns.start :].masked_fill_(column > row, float("-inf"))
    if form.window is not None and first + len(row) - 1 - columns.start >= form.window:
        column = torch.arange(columns.start, min(columns.stop, first + len(row) - form.window), device=scores.device)
        by_row[..., : len(column)].masked_fill_(column <= row + (first - form.window), float("-inf"))
    if hidden is not None and columns.stop > P:
        shown = slice(max(columns.start, P), columns.stop)
        by_sequence = scores.view(len(hidden), -1, scores.shape[2])[..., shown.start - columns.start :]
        by_sequence.masked_fill_(hidden[:, None, shown.start - P : shown.stop - P], float("-inf"))
    return scores


def _weights(scores: Tensor, may_be_empty: bool) -> Tensor:
    weights = torch.softmax(scores, -1)
    return weights.nan_to_num_(0.0) if may_be_empty else weights


def _block_forward(q, k, v, prefix_k, prefix_v, mask, form, out, lse) -> None:
    plan = _plan(q, k, prefix_k.shape[1], form)
    wide, low, G = _wide(q.dtype), _product_dtype(q), plan.G
    may_be_empty = mask is not None and form.window is not None  # else a row sees the prefix or itself
    for batch in plan.batches:
        keys, values = _joined(prefix_k, k[batch], wide), _joined(prefix_v, v[batch], low)
        queries = _stacked(q[batch], G, wide)
        hidden = None if mask is None else ~mask[batch]
        for block in plan.blocks:
            scores = _scores(queries, keys, block, plan, hidden, form)
            weights = _weights(scores, may_be_empty)
            _put(torch.bmm(weights.to(low), values[:, block.columns]), out[batch, :, block.rows], G)
            # The weight of the largest score is exp(largest - lse).
            block_lse = scores.amax(-1, keepdim=True).sub_(weights.amax(-1, keepdim=True).log_())
            if may_be_empty:
                block_lse.nan_to_num_(float("-inf"))
            _put(block_lse, lse[batch, :, block.rows].unsqueeze(-1), G)


def _block_backward(dout, q, k, v, prefix_k, prefix_v, mask, form, grads) -> None:
    dq, dk, dv, dprefix_k, dprefix_v = grads
    plan, (D, Hkv) = _plan(q, k, prefix_k.shape[1], form), (q.shape[3], k.shape[1])
    wide, low, G, P = _wide(q.dtype), _product_dtype(q), plan.G, plan.P
    may_be_empty = mask is not None and form.window is not None
    for batch in plan.batches:
        keys, values = _joined(prefix_k, k[batch], low), _joined(prefix_v, v[batch], wide)
        queries, douts = _stacked(q[batch], G, low), _stacked(dout[batch], G, low)
        wide_keys, wide_queries, wide_douts = (t.to(wide) for t in (keys, queries, douts))
        hidden = None if mask is None else ~mask[batch]
        dkeys, dvalues = torch.zeros_like(wide_keys), torch.zeros_like(values)
        for block in plan.blocks:
            columns, rows = block.columns, slice(block.rows.start * G, block.rows.stop * G)
            scores = _scores(wide_queries, wide_keys, block, plan, hidden, form)
            weights = _weights(scores, may_be_empty)
            dweights = torch.bmm(wide_douts[:, rows], values[:, columns].transpose(1, 2))
            dscores = aten._softmax_backward_data(dweights, weights, -1, wide)
            if form.softcap is not None:  # the derivative of c tanh(s / c); a hidden score has no gradient at all
                dscores.mul_(scores.div_(form.softcap).square_().neg_().add_(1).clamp_(min=0))
            dscores, weights = dscores.to(low), weights.to(low)
            _put(torch.bmm(dscores, keys[:, columns]).mul_(form.scale), dq[batch, :, block.rows], G)
            dkeys[:, columns] += torch.bmm(dscores.transpose(1, 2), queries[:, rows])
            dvalues[:, columns] += torch.bmm(weights.transpose(1, 2), douts[:, rows])
        dkeys, dvalues = (t.view(-1, Hkv, P + plan.T, D) for t in (dkeys.mul_(form.scale), dvalues))
        dk[batch], dv[batch] = dkeys[:, :, P:], dvalues[:, :, P:]
        dprefix_k += dkeys[:, :, :P].sum(0)
        dprefix_v += dvalues[:, :, :P].sum(0)


# torch's flash attention over joined keys, on a CPU.


class _Joined(NamedTuple):
    """How torch's op learns what a row sees. Its causal mask lets row i see columns 0 to i, so P rows of zeros before
    the queries make it ours; they neither get a gradient nor give one. Or all is said by a mask that is added."""

    zero_rows: int
    causal: bool
    added: Tensor | None  # [1 or B, 1, 1 or S, P + T]: 0 or -inf


def _joins(q, k, prefix_k, cu_seqlens, mask, form: Form, *, backward: bool = False) -> _Joined | None:
    """None where blocks are faster or torch's op cannot."""
    (B, _, S, _), T, P = q.shape, k.shape[2], prefix_k.shape[1]
    if q.device.type != "cpu" or form.softcap is not None or cu_seqlens is not None:
        return None
    if S == 1 and form.window is None:
        return None if backward else _Joined(0, False, _added(q, k, P, mask, form))
    if q.dtype not in (_FLASH_DTYPES if backward else _JOINED_DTYPES) or not multiplies_natively(q.dtype):
        return None
    if S < _JOINED_PREFIXES * P:
        return None
    causal = form.causal and S > 1
    fewest = _JOINED_BACKWARD_ROWS if backward or q.dtype in _MASKED_DTYPES else _JOINED_ROWS
    if fewest <= S and mask is None and form.window is None and (S == T or not causal):
        return _Joined(P if causal else 0, causal, None)
    # A row that sees nothing would make torch's op divide by zero.
    sees_something = mask is None or form.window is None
    elements = (1 if mask is None else B) * S * (P + T)
    if q.dtype in _MASKED_DTYPES and S > 1 and sees_something and elements <= _MASK_ELEMENTS:
        return _Joined(0, False, _added(q, k, P, mask, form))
    return None


def _added(q, k, P: int, mask, form: Form) -> Tensor | None:
    """The mask that is added to the scores; None where every row sees all."""
    S, T = q.shape[2], k.shape[2]
    causal = form.causal and S > 1
    if not causal and form.window is None and mask is None:
        return None
    hidden = torch.zeros(1, 1, S, P + T, dtype=torch.bool)
    if causal or form.window is not None:
        row, column = torch.arange(P + T - S, P + T)[:, None], torch.arange(P + T)
    if causal:
        hidden |= column > row
    if form.window is not None:
        hidden |= column <= row - form.window
    if mask is not None:
        real = torch.zeros(len(mask), 1, 1, P + T, dtype=torch.bool)
        real[..., P:] = ~mask[:, None, None]
        hidden = hidden | real
    return torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))


def _joined_forward(q, k, v, prefix_k, prefix_v, form: Form, joined: _Joined) -> tuple[Tensor, Tensor]:
    (B, Hkv, _, D), S = k.shape, q.shape[2]
    keys, values = (_before_each(prefix, real) for prefix, real in ((prefix_k, k), (prefix_v, v)))
    # Of one query the heads that share a key become rows of one attention.
    queries = q.reshape(B, Hkv, -1, D) if S == 1 else _after(joined.zero_rows, q)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, joined.causal, attn_mask=joined.added, scale=form.scale
    )
    if S == 1:
        return out.reshape(q.shape), lse.reshape(q.shape[:3])
    return out[:, :, -S:].transpose(1, 2).contiguous().transpose(1, 2), lse[:, :, -S:].contiguous()


def _joined_backward(dout, q, k, v, prefix_k, prefix_v, form: Form, out, lse, joined: _Joined, grads) -> None:
    dq, dk, dv, dprefix_k, dprefix_v = grads
    Hkv, P = k.shape[1], prefix_k.shape[1]
    # torch's op gives a thread whole heads of keys: of 3 of them two threads would have 2 and 1. And it would sum over
    # the heads that share a key in 16 bits.
    ours = (_before_each(prefix, real) for prefix, real in ((prefix_k, k), (prefix_v, v)))
    keys, values = (t.repeat_interleave(q.shape[1] // Hkv, 1) for t in ours)
    rows = (_after(joined.zero_rows, t) for t in (out, lse))
    dqueries, *dkeys_dvalues = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _after(joined.zero_rows, dout), _after(joined.zero_rows, q), keys, values, *rows, 0.0, joined.causal,
        attn_mask=joined.added, scale=form.scale,
    )  # fmt: skip
    dq.copy_(dqueries[:, :, joined.zero_rows :])
    for grad, real, prefix in zip(dkeys_dvalues, (dk, dv), (dprefix_k, dprefix_v), strict=True):
        grad = grad.unflatten(1, (Hkv, -1)).sum(2, dtype=prefix.dtype)
        real.copy_(grad[:, :, P:])
        torch.sum(grad[:, :, :P], 0, out=prefix)


def _before_each(prefix: Tensor, real: Tensor) -> Tensor:
    """[B, Hkv, P + T, D] in the dtype of `real`."""
    return torch.cat([prefix.to(real.dtype).expand(len(real), -1, -1, -1), real], 2)


def _after(rows: int, t: Tensor) -> Tensor:
    """t [B, H, S, ...] after so many rows of zeros."""
    if rows == 0:
        return t
    result = t.new_empty(*t.shape[:2], rows + t.shape[2], *t.shape[3:])
    result[:, :, :rows] = 0
    result[:, :, rows:] = t
    return result


# Flash


def flash_serves(q, k, cu_seqlens, mask, form: Form) -> bool:
    """Whether torch's flash attention can attend over the real keys, and is the faster way."""
    S, T, D = q.shape[2], k.shape[2], q.shape[3]
    if form.softcap is not None or form.window is not None or (form.causal and S not in (1, T)):
        return False
    if T == 0:  # torch's op of a CPU divides by the number of keys: the process ends (pytorch issue 141219)
        return False
    if mask is not None or q.dtype not in _FLASH_DTYPES or q.device.type not in _FLASH_DEVICES:
        return False
    if q.is_cuda:
        return D % 8 == 0 and D <= 256 and _has_flash(q.device)
    return cu_seqlens is None and S > 1


def _has_flash(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_forward(q, k, v, prefix_k, prefix_v, cu_seqlens, form, out, lse) -> None:
    Hkv = k.shape[1]
    real_out, real_lse = torch_flash(q, k, v, cu_seqlens, form)
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    queries, real_out, real_lse = (_by_key_head(t, Hkv) for t in (q, real_out, real_lse.unsqueeze(-1)))
    merged = torch.empty(real_out.shape, dtype=real_lse.dtype, device=q.device)
    merged_lse = torch.empty_like(real_lse)
    for rows in _row_chunks(queries, prefix_k):
        scores = _product(queries[:, rows], prefix_k.transpose(1, 2)).mul_(form.scale)
        merged_lse[:, rows] = torch.logaddexp(real_lse[:, rows], scores.logsumexp(-1, keepdim=True))
        merged[:, rows] = _product(scores.sub_(merged_lse[:, rows]).exp_().to(q.dtype), prefix_v)
    merged += real_out * (real_lse - merged_lse).exp_()
    _from_key_head(merged, out, Hkv)
    _from_key_head(merged_lse, lse.unsqueeze(-1), Hkv)


def _flash_backward(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, form, out, lse, grads) -> None:
    Hkv = k.shape[1]
    dq, dk, dv, dprefix_k, dprefix_v = grads
    real_dq, real_dk, real_dv = torch_flash_backward(dout, q, k, v, cu_seqlens, form, out, lse)
    dk.copy_(real_dk)
    dv.copy_(real_dv)
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)
    douts, queries, delta, lse, total = (_by_key_head(t, Hkv) for t in (dout, q, delta, lse.unsqueeze(-1), real_dq))
    total = total.to(lse.dtype, copy=True)
    for rows in _row_chunks(queries, prefix_k):
        scores = _product(queries[:, rows], prefix_k.transpose(1, 2)).mul_(form.scale)
        weights = scores.sub_(lse[:, rows]).exp_()
        dscores = _product(douts[:, rows], prefix_v.transpose(1, 2)).sub_(delta[:, rows]).mul_(weights)
        dscores = dscores.mul_(form.scale).to(q.dtype)
        total[:, rows] += _product(dscores, prefix_k)
        dprefix_k += _product(dscores.transpose(1, 2), queries[:, rows])
        dprefix_v += _product(weights.to(q.dtype).transpose(1, 2), douts[:, rows])
    _from_key_head(total, dq, Hkv)


def _by_key_head(t: Tensor, Hkv: int) -> Tensor:
    """[B, H, S, C] -> [Hkv, B * G * S, C]: everything that meets one head of the prefix."""
    return t.unflatten(1, (Hkv, -1)).transpose(0, 1).flatten(1, 3)


def _from_key_head(t: Tensor, into: Tensor, Hkv: int) -> None:
    """The way back, into a tensor [B, H, S, C]."""
    into = into.unflatten(1, (Hkv, -1)).transpose(0, 1)
    into.copy_(t.view(into.shape))


def _row_chunks(queries: Tensor, prefix_k: Tensor) -> Iterator[slice]:
    (Hkv, R, _), P = queries.shape, prefix_k.shape[1]
    budget = _BLOCK_ELEMENTS.get(queries.device.type, _BLOCK_ELEMENTS["cuda"])
    step = max(_LEAST_ROWS, budget // (Hkv * P))
    return (slice(i, min(i + step, R)) for i in range(0, R, step))


# torch's op over the real keys. Packed documents are one row of tokens to it, [tokens, H, D].


def torch_flash(q, k, v, cu_seqlens, form) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, S, D] and lse [B, H, S]."""
    (B, H, S, _), causal = q.shape, form.causal and q.shape[2] > 1
    if q.is_cuda:
        q, k, v = (_tokens_first(t, cu_seqlens) for t in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, *_lengths(S, k.shape[-3], cu_seqlens), 0.0, causal, False, scale=form.scale
        )
        return _heads_first(out), lse.view(B, H, S)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=form.scale)


def torch_flash_backward(dout, q, k, v, cu_seqlens, form, out, lse) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse: those of the joint softmax. Returns dq, dk, dv."""
    S, causal = q.shape[2], form.causal and q.shape[2] > 1
    if q.is_cuda:
        dout, q, k, v, out = (_tokens_first(t, cu_seqlens) for t in (dout, q, k, v, out))
        lse = lse if cu_seqlens is None else lse.squeeze(0)
        no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, lse, *_lengths(S, k.shape[-3], cu_seqlens), 0.0, causal, no_dropout, no_dropout,
            scale=form.scale,
        )  # fmt: skip
        return tuple(_heads_first(t) for t in grads)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=form.scale
    )


def _tokens_first(t: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    t = t.transpose(1, 2)
    return t if cu_seqlens is None else t.squeeze(0)


def _heads_first(t: Tensor) -> Tensor:
    t = t if t.dim() == 4 else t.unsqueeze(0)
    return t.transpose(1, 2)


def _lengths(S: int, T: int, cu_seqlens: Tensor | None) -> tuple:
    """cum_seq_q, cum_seq_k, max_q, max_k. Of packed documents only a bound of the longest is known without a sync."""
    return (cu_seqlens, cu_seqlens, S, T)
