"""The formula of `prefix_attention`. Source: Li and Liang, "Prefix-Tuning", 2021 (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_attention(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    *,
    causal=True,
    scale=None,
    window=None,
    softcap=None,
    cu_seqlens=None,
    key_padding_mask=None,
) -> Tensor:
    """Attention over the concatenated keys and values; arguments as in `fastpeft.ops.prefix_attention`.

    Everything is computed in q's dtype.
    """
    options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        documents = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
        parts = [prefix_attention(q[:, :, d], k[:, :, d], v[:, :, d], prefix_k, prefix_v, **options) for d in documents]
        return torch.cat(parts, 2)

    (B, H, S, D), (_, Hkv, T, _), P = q.shape, k.shape, prefix_k.shape[1]
    keys, values = (
        torch.cat([prefix.to(q.dtype).expand(B, -1, -1, -1), real], 2).repeat_interleave(H // Hkv, 1)
        for prefix, real in ((prefix_k, k), (prefix_v, v))
    )
    scores = q @ keys.transpose(2, 3) * (D**-0.5 if scale is None else scale)  # [B, H, S, P + T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    row = torch.arange(P + T - S, P + T, device=q.device).unsqueeze(1)  # the last query stands at the last key
    column = torch.arange(P + T, device=q.device)
    visible = torch.ones(B, 1, S, P + T, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (column <= row)
    if window is not None:
        visible = visible & (row - column < window)
    if key_padding_mask is not None:
        visible = visible & torch.nn.functional.pad(key_padding_mask, (P, 0), value=True)[:, None, None]
    empty = ~visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~(visible | empty), float("-inf")).softmax(-1)
    return weights.masked_fill(empty, 0) @ values
