"""prefix_attention: flash attention whose loop over the keys has a prologue over the slots of a shared prefix.

    s[i, j] = cap(scale * q[i] k[j])     L[i] = log sum_j exp s[i, j]     out[i] = sum_j exp(s[i, j] - L[i]) v[j]

j runs over the P slots of the prefix and over the real keys. Without real keys the same kernel takes in the prefix
where the attention over the real keys is known already: its output and log-sum-exp are the state that the loop begins
with, so that this is the merge. Backward stands in `prefix_attention_grad.py`.

Launchers take q, k, v, out and their gradients as [B, H or Hkv, S or T, D] of one 16-bit dtype, any strides but the
last, which is 1; the prefix as contiguous [Hkv, P, D]; lse and delta as contiguous float32 [B, H, S]; mask as
contiguous uint8 [B, T], 0 for hidden; cu_seqlens as int32. `form` has causal, scale, window and softcap as
`fastpeft.ops.prefix_attention` defines them. They write into their outputs and return nothing, tune nothing and ask
nothing of the device. Sums are float32; there are no atomics.

Work split: a program has some rows of one query head and walks over the keys of its key head, in steps; the prefix is
the first of them. Heads of a group read the same keys from L2, and nothing is expanded. The last rows of a causal
attention, which see most, come first.

Masks: rows see intervals (`prefix_attention_scores.py`), so the loop has three parts: tiles that some row sees from a
later key on, tiles that all rows see whole, without a mask, and tiles at the end. Slots behind the last are -inf before
the row's maximum is taken: a zero key scores 0. A row that sees nothing has L = -inf and out = 0.

Cost, modelled, B = 8, H = 32, Hkv = 8, S = 4096, D = 128 in bf16, causal, on an H100: 1.1 TFLOP over the real keys, 2.8
ms at 400 TFLOP/s, which Triton's flash attention is reported to reach there; a step of 64 slots is 1/32 of the average
row's keys, hence 3% for P <= 64. q, out: 0.5 GB, 0.2 ms. Not timed yet.
"""

import triton
import triton.language as tl

from .casts import round_to, to_float32
from .prefix_attention_grad import (
    prefix_attention_add_dq,
    prefix_attention_dkv,
    prefix_attention_dprefix,
    prefix_attention_dq,
)
from .prefix_attention_scores import (
    LN2,
    LOG2E,
    attended,
    first_slot_of,
    hide,
    keys_of,
    launch_rows,
    load_rows,
    numbers,
    score_factors,
    scores,
    store_rows,
    strided,
)
from .products import dot
from .tiles import attention_tile_of

__all__ = [
    "prefix_attention_add_dq",
    "prefix_attention_dkv",
    "prefix_attention_dprefix",
    "prefix_attention_dq",
    "prefix_attention_fwd",
    "prefix_attention_merge",
]

FEW_ROWS = 16  # up to so many queries of a sequence there are tiles of 16 rows


@triton.jit
def _take_in(
    acc,
    total,
    largest,
    q,
    keys,
    values,
    stride_k,
    stride_v,
    size,
    begin,
    end,
    first,
    past,
    mask,
    scale,
    softcap,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """The rows take in the keys from `begin` to `end`, of which each row sees those from `first` to `past`.

    acc: output, not divided yet [BM, BD]; total: sum of the weights; largest: score, to which weights are relative.
    """
    BM: tl.constexpr = q.shape[0]
    BD: tl.constexpr = q.shape[1]
    for n0 in range(begin, end, BN):
        k = load_rows(keys, n0, stride_k, size, D, BN, BD, not MASKED)
        s = scores(dot(q, k.T, tl.zeros([BM, BN], tl.float32)), scale, softcap)
        s = hide(s, float("-inf"), n0 + tl.arange(0, BN), size, first, past, mask, MASKED)
        new = tl.maximum(largest, tl.max(s, 1))
        origin = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - origin[:, None])
        shrink = tl.exp2(largest - origin)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(values, n0, stride_v, size, D, BN, BD, not MASKED)
        acc = dot(round_to(p, q.dtype), v, acc * shrink[:, None])
        largest = new
    return acc, total, largest


@triton.jit(do_not_specialize=["S", "T", "P", "group", "documents", "halvings", "window"])
def prefix_attention_fwd_kernel(
    out,
    stride_ob,
    stride_oh,
    stride_os,
    lse,
    q,
    stride_qb,
    stride_qh,
    stride_qs,
    k,
    stride_kb,
    stride_kh,
    stride_ks,
    v,
    stride_vb,
    stride_vh,
    stride_vs,
    prefix_k,
    prefix_v,
    mask,
    cu_seqlens,
    documents,
    halvings,
    S,
    T,
    P,
    group,
    window,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """out and lse of BM rows of a query head. k is None: they hold the real keys' part already."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    hkv = h // group
    out += b * stride_ob + h * stride_oh
    lse += (b * tl.num_programs(1) + h) * S
    row = m0 + tl.arange(0, BM)
    seen = tl.minimum(row, S - 1)  # rows past the last are that one again: they widen no loop
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, m0, stride_qs, S, D, BM, BD)

    if k is None:
        largest = tl.load(lse + row, mask=row < S, other=float("-inf")) * LOG2E
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
        acc = tl.where(total[:, None] > 0, to_float32(load_rows(out, m0, stride_os, S, D, BM, BD)), 0)
    else:
        largest = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)

    slots = hkv * P * D
    first_slot = 0
    slot = None
    if window is not None:
        slot = first_slot_of(seen, S, T, P, window, cu_seqlens, documents, halvings)
        first_slot = tl.min(slot)
    acc, total, largest = _take_in(
        acc, total, largest, q_tile, prefix_k + slots, prefix_v + slots, D, D, P,
        first_slot, P, slot, None, None, scale, softcap, True, D, BN,
    )  # fmt: skip

    if k is not None:
        k += b * stride_kb + hkv * stride_kh
        v += b * stride_vb + hkv * stride_vh
        if mask is not None:
            mask += b * T
        first, past = keys_of(seen, S, T, window, cu_seqlens, documents, halvings, CAUSAL)
        begin, whole, whole_end, end = attended(first, past, BN)
        BOUNDED: tl.constexpr = window is not None or cu_seqlens is not None
        first = first if BOUNDED else None
        if BOUNDED:
            acc, total, largest = _take_in(
                acc, total, largest, q_tile, k, v, stride_ks, stride_vs, T,
                begin, whole, first, past, mask, scale, softcap, True, D, BN,
            )  # fmt: skip
        acc, total, largest = _take_in(
            acc, total, largest, q_tile, k, v, stride_ks, stride_vs, T,
            whole, whole_end, first, past, mask, scale, softcap, False, D, BN,
        )  # fmt: skip
        acc, total, largest = _take_in(
            acc, total, largest, q_tile, k, v, stride_ks, stride_vs, T,
            whole_end, end, first, past, mask, scale, softcap, True, D, BN,
        )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)  # a row without a key has no weight: 0 / 1, and L = -inf + log 1
    store_rows(out, acc / total[:, None], m0, stride_os, S, D)
    tl.store(lse + row, (largest + tl.log2(total)) * LN2, mask=row < S)


def prefix_attention_fwd(q, k, v, prefix_k, prefix_v, cu_seqlens, mask, form, out, lse):
    """The attention over the prefix and the real keys."""
    _forward(q, k, v, prefix_k, prefix_v, cu_seqlens, mask, k.shape[2], form, out, lse)


def prefix_attention_merge(q, prefix_k, prefix_v, cu_seqlens, keys, form, out, lse):
    """out and lse hold the attention over the `keys` real keys, and after it the one over the prefix as well.

    cu_seqlens matters where there is a window.
    """
    _forward(q, None, None, prefix_k, prefix_v, cu_seqlens, None, keys, form, out, lse)


def _forward(q, k, v, prefix_k, prefix_v, cu_seqlens, mask, keys, form, out, lse):
    few = " few" if q.shape[2] <= FEW_ROWS else ""
    launch_rows(
        prefix_attention_fwd_kernel,
        attention_tile_of(f"prefix_attention_fwd{few}", q.shape[3]),
        q,
        form,
        *strided(out),
        lse,
        *strided(q),
        *strided(k),
        *strided(v),
        prefix_k,
        prefix_v,
        mask,
        *numbers(q, prefix_k, cu_seqlens, keys, form),
        *score_factors(form),
    )
