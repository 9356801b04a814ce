"""The gradients of prefix_attention. With p = exp(s - L), L the log-sum-exp over the prefix and the real keys:

    delta[i] = sum_d dout[i, d] out[i, d]        ds[i, j] = p[i, j] (dout[i] v[j] - delta[i]) cap'[i, j]
    dq[i] = scale sum_j ds[i, j] k[j]        dk[j] = scale sum_i ds[i, j] q[i]        dv[j] = sum_i p[i, j] dout[i]

Since L and out are those of the joint softmax, the parts of prefix and real keys do not depend on each other: beside
another kernel that gives dq, dk, dv over the real keys, from the same L and out, those of the prefix are added here.

Work split. dq: as the forward kernel, some rows of a head, whose delta it makes first and leaves for the other. dk and
dv: a program has some keys of a key head and walks over the rows of its query heads that see them. For the prefix, a
key head has few keys and very many rows, those of all sequences; so the walk is shared by programs as `products.py`
does it, each writes float32 parts and `sum_partials` adds them in order. Of real keys it is shared where they are too
few for the GPU. No copy of a key or a gradient is made for the heads of a group.

Cost, modelled: five products of the size of s against two in forward; two of them are made twice, for dq and for dk,
dv, since without atomics one walk cannot sum both.
"""

import triton
import triton.language as tl

from .casts import round_to, to_float32
from .prefix_attention_scores import (
    LOG2E,
    attended,
    first_slot_of,
    hide,
    keys_of,
    launch_rows,
    load_rows,
    numbers,
    rows_of,
    score_factors,
    scores,
    softcap_slope,
    store_rows,
    strided,
)
from .products import dot, partials_of, share, splits_of, sum_partials
from .tiles import attention_tile_of


@triton.jit
def _load_lse(lse, row, S):
    """log2(e) L; infinity, which makes every weight 0, for rows that see nothing or are not there."""
    found = tl.load(lse + row, mask=row < S, other=float("inf")) * LOG2E
    return tl.where(found == float("-inf"), float("inf"), found)


@triton.jit
def _add_dq(
    dq,
    q,
    dout,
    lse,
    delta,
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
    """dq / scale and what the keys from `begin` to `end` add, of which each row sees those from `first` to `past`."""
    BM: tl.constexpr = q.shape[0]
    BD: tl.constexpr = q.shape[1]
    for n0 in range(begin, end, BN):
        k = load_rows(keys, n0, stride_k, size, D, BN, BD, not MASKED)
        v = load_rows(values, n0, stride_v, size, D, BN, BD, not MASKED)
        s = scores(dot(q, k.T, tl.zeros([BM, BN], tl.float32)), scale, softcap)
        p = hide(tl.exp2(s - lse[:, None]), 0.0, n0 + tl.arange(0, BN), size, first, past, mask, MASKED)
        ds = p * (dot(dout, v.T, tl.zeros([BM, BN], tl.float32)) - delta[:, None])
        if softcap is not None:
            ds *= softcap_slope(s, softcap)
        dq = dot(round_to(ds, q.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["S", "T", "P", "group", "documents", "halvings", "window"])
def prefix_attention_dq_kernel(
    dq,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    delta,
    dout,
    stride_dob,
    stride_doh,
    stride_dos,
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
    form_scale,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dq and delta of BM rows of a query head. k is None: dq holds the real keys' part already."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    hkv = h // group
    rows = (b * tl.num_programs(1) + h) * S
    row = m0 + tl.arange(0, BM)
    seen = tl.minimum(row, S - 1)  # rows past the last are that one again: they widen no loop
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, m0, stride_qs, S, D, BM, BD)
    do_tile = load_rows(dout + b * stride_dob + h * stride_doh, m0, stride_dos, S, D, BM, BD)
    o_tile = load_rows(out + b * stride_ob + h * stride_oh, m0, stride_os, S, D, BM, BD)
    d_tile = tl.sum(to_float32(do_tile) * to_float32(o_tile), 1)
    tl.store(delta + rows + row, d_tile, mask=row < S)
    l_tile = _load_lse(lse + rows, row, S)

    slots = hkv * P * D
    first_slot = 0
    slot = None
    if window is not None:
        slot = first_slot_of(seen, S, T, P, window, cu_seqlens, documents, halvings)
        first_slot = tl.min(slot)
    acc = _add_dq(
        tl.zeros([BM, BD], tl.float32), q_tile, do_tile, l_tile, d_tile, prefix_k + slots, prefix_v + slots, D, D, P,
        first_slot, P, slot, None, None, scale, softcap, True, D, BN,
    )  # fmt: skip

    dq += b * stride_dqb + h * stride_dqh
    if k is None:
        before = to_float32(load_rows(dq, m0, stride_dqs, S, D, BM, BD))
        store_rows(dq, before + acc * form_scale, m0, stride_dqs, S, D)
    else:
        k += b * stride_kb + hkv * stride_kh
        v += b * stride_vb + hkv * stride_vh
        if mask is not None:
            mask += b * T
        first, past = keys_of(seen, S, T, window, cu_seqlens, documents, halvings, CAUSAL)
        begin, whole, whole_end, end = attended(first, past, BN)
        BOUNDED: tl.constexpr = window is not None or cu_seqlens is not None
        first = first if BOUNDED else None
        if BOUNDED:
            acc = _add_dq(
                acc, q_tile, do_tile, l_tile, d_tile, k, v, stride_ks, stride_vs, T,
                begin, whole, first, past, mask, scale, softcap, True, D, BN,
            )  # fmt: skip
        acc = _add_dq(
            acc, q_tile, do_tile, l_tile, d_tile, k, v, stride_ks, stride_vs, T,
            whole, whole_end, first, past, mask, scale, softcap, False, D, BN,
        )  # fmt: skip
        acc = _add_dq(
            acc, q_tile, do_tile, l_tile, d_tile, k, v, stride_ks, stride_vs, T,
            whole_end, end, first, past, mask, scale, softcap, True, D, BN,
        )  # fmt: skip
        store_rows(dq, acc * form_scale, m0, stride_dqs, S, D)


@triton.jit(do_not_specialize=["size", "H", "S", "T", "P", "group", "documents", "halvings", "window"])
def prefix_attention_dkv_kernel(
    dk,
    stride_dkb,
    stride_dkh,
    stride_dks,
    dv,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    k,
    stride_kb,
    stride_kh,
    stride_ks,
    v,
    stride_vb,
    stride_vh,
    stride_vs,
    q,
    stride_qb,
    stride_qh,
    stride_qs,
    dout,
    stride_dob,
    stride_doh,
    stride_dos,
    lse,
    delta,
    mask,
    size,
    sequences,
    H,
    cu_seqlens,
    documents,
    halvings,
    S,
    T,
    P,
    group,
    window,
    form_scale,
    scale,
    softcap,
    PREFIX: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dk and dv of BN keys of a key head, or float32 parts of the sums, one tensor after the other.

    PREFIX: k and v are the prefix, one for all `sequences` of q; else each program has a sequence.
    """
    n0 = tl.program_id(0) * BN
    split = tl.program_id(2)
    hkv = (tl.program_id(1) % (H // group)).to(tl.int64)
    b = (tl.program_id(1) // (H // group)).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    k_tile = load_rows(k + b * stride_kb + hkv * stride_kh, n0, stride_ks, size, D, BN, BD)
    v_tile = load_rows(v + b * stride_vb + hkv * stride_vh, n0, stride_vs, size, D, BN, BD)
    n = n0 + tl.arange(0, BN)

    # The rows that see a key of the tile, from `begin` to `end`.
    if PREFIX:
        begin = 0
        end = S
        if window is not None and cu_seqlens is None:
            end = tl.maximum(tl.minimum(S, n0 + BN - 1 + window - (P + T - S)), 0)
    else:
        first, past = rows_of(tl.minimum(n, size - 1), S, T, window, cu_seqlens, documents, halvings, CAUSAL)
        if mask is not None:
            shown = tl.load(mask + b * T + n, mask=n < size, other=0) != 0
            first = tl.where(shown, first, S)
            past = tl.where(shown, past, 0)
        begin = tl.min(first)
        end = tl.max(past)

    blocks = tl.cdiv(tl.maximum(end - begin, 0), BM)
    step, steps = share(blocks * group * sequences, 1, split, tl.num_programs(2))
    dk_sum = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BD], tl.float32)
    for i in range(step, steps):
        head = b * group + i // blocks  # of the query heads that meet this key head, sequence by sequence
        m0 = begin + i % blocks * BM
        h = hkv * group + head % group
        of_b = head // group
        row = m0 + tl.arange(0, BM)
        rows = (of_b * H + h) * S
        q_tile = load_rows(q + of_b * stride_qb + h * stride_qh, m0, stride_qs, S, D, BM, BD)
        do_tile = load_rows(dout + of_b * stride_dob + h * stride_doh, m0, stride_dos, S, D, BM, BD)
        l_tile = _load_lse(lse + rows, row, S)
        d_tile = tl.load(delta + rows + row, mask=row < S, other=0.0)

        s = scores(dot(k_tile, q_tile.T, tl.zeros([BN, BM], tl.float32)), scale, softcap)
        p = tl.exp2(s - l_tile[None, :])
        if PREFIX:
            if window is not None:
                slot = first_slot_of(tl.minimum(row, S - 1), S, T, P, window, cu_seqlens, documents, halvings)
                p = tl.where(n[:, None] >= slot[None, :], p, 0.0)
        else:
            if CAUSAL or mask is not None or cu_seqlens is not None:
                p = tl.where(row[None, :] >= first[:, None], p, 0.0)
            if window is not None or cu_seqlens is not None:
                p = tl.where(row[None, :] < past[:, None], p, 0.0)
        dv_sum = dot(round_to(p, dtype), do_tile, dv_sum)
        ds = p * (dot(v_tile, do_tile.T, tl.zeros([BN, BM], tl.float32)) - d_tile[None, :])
        if softcap is not None:
            ds *= softcap_slope(s, softcap)
        dk_sum = dot(round_to(ds, dtype), q_tile, dk_sum)

    part = split * tl.num_programs(1).to(tl.int64) * size * D
    store_rows(dk + part + b * stride_dkb + hkv * stride_dkh, dk_sum * form_scale, n0, stride_dks, size, D)
    store_rows(dv + part + b * stride_dvb + hkv * stride_dvh, dv_sum, n0, stride_dvs, size, D)


def prefix_attention_dq(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, mask, form, out, lse, delta, dq):
    """Writes delta too, which the gradients of k, v and the prefix take."""
    _dq(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, mask, k.shape[2], form, out, lse, delta, dq)


def prefix_attention_add_dq(dout, q, prefix_k, prefix_v, cu_seqlens, keys, form, out, lse, delta, dq):
    """Adds the prefix's part to dq, which holds that of the `keys` real keys, and writes delta."""
    _dq(dout, q, None, None, prefix_k, prefix_v, cu_seqlens, None, keys, form, out, lse, delta, dq)


def _dq(dout, q, k, v, prefix_k, prefix_v, cu_seqlens, mask, keys, form, out, lse, delta, dq):
    launch_rows(
        prefix_attention_dq_kernel,
        attention_tile_of("prefix_attention_dq", q.shape[3]),
        q,
        form,
        *strided(dq),
        delta,
        *strided(dout),
        *strided(out),
        lse,
        *strided(q),
        *strided(k),
        *strided(v),
        prefix_k,
        prefix_v,
        mask,
        *numbers(q, prefix_k, cu_seqlens, keys, form),
        form.scale,
        *score_factors(form),
    )


def prefix_attention_dkv(dout, q, k, v, prefix_k, cu_seqlens, mask, form, lse, delta, dk, dv):
    """dk, dv: without gaps in memory. Of the prefix only the length matters."""
    _dkv(dout, q, k, v, prefix_k, cu_seqlens, mask, k.shape[2], form, lse, delta, dk, dv, False)


def prefix_attention_dprefix(dout, q, prefix_k, prefix_v, cu_seqlens, keys, form, lse, delta, dprefix_k, dprefix_v):
    """dprefix_k, dprefix_v: contiguous float32 [Hkv, P, D]. keys: how many real ones there are."""
    k, v, dk, dv = (t.unsqueeze(0) for t in (prefix_k, prefix_v, dprefix_k, dprefix_v))
    _dkv(dout, q, k, v, prefix_k, cu_seqlens, None, keys, form, lse, delta, dk, dv, True)


def _dkv(dout, q, k, v, prefix_k, cu_seqlens, mask, keys, form, lse, delta, dk, dv, prefix):
    """prefix: k and v are one for all sequences of q."""
    _, H, S, D = q.shape
    B, Hkv, size, _ = k.shape
    sequences = len(q) if prefix else 1
    tile = attention_tile_of("prefix_attention_dkv", D)
    grid = triton.cdiv(size, tile.rows), B * Hkv
    splits = splits_of(grid, triton.cdiv(S, tile.depth) * (H // Hkv) * sequences)
    dk_parts, dv_parts = partials_of(dk, splits), partials_of(dv, splits)
    prefix_attention_dkv_kernel[(*grid, splits)](
        dk_parts,
        *dk.stride()[:3],
        dv_parts,
        *dv.stride()[:3],
        *strided(k),
        *strided(v),
        *strided(q),
        *strided(dout),
        lse,
        delta,
        mask,
        size,
        sequences,
        H,
        *numbers(q, prefix_k, cu_seqlens, keys, form),
        form.scale,
        *score_factors(form),
        PREFIX=prefix,
        CAUSAL=form.causal,
        D=D,
        BM=tile.depth,
        BN=tile.rows,
        BD=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=255,  # see launch_rows
        enable_fp_fusion=True,
    )
    sum_partials(dk_parts, dk)
    sum_partials(dv_parts, dv)
