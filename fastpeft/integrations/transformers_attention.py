"""transformers: an attention, and its mask, that take a trainable prefix beside the keys of the sequence.

A stack of layers that is called with `fastpeft_prefix=Prefix(...)` hands it to every attention, as it hands all its
keyword arguments. So a layer that a checkpoint computes again sees the prefix of its own forward pass, whatever ran in
between, and no state is left in the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from fastpeft.expected import find, parameters
from fastpeft.ops import prefix_attention

repeat_kv = find("prefix", "transformers.integrations.sdpa_attention:repeat_kv")
sdpa_attention_forward = find("prefix", "transformers.integrations.sdpa_attention:sdpa_attention_forward")
sdpa_mask = find("prefix", "transformers.masking_utils:sdpa_mask")
parameters("prefix", sdpa_attention_forward, "module", "query", "key", "value", "dropout", "scaling", "is_causal")
parameters(
    "prefix", sdpa_mask, "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function",
    "attention_mask", "allow_is_causal_skip",
)  # fmt: skip

NAME = "fastpeft_prefix"  # of the attention implementation

KeysValues = tuple[Tensor, Tensor]  # two [Hkv, P, D]


@dataclass
class Prefix:
    """The keys and values that one call of a stack attends to before its own."""

    layers: list[KeysValues] | None  # of self attention
    cross: list[KeysValues] | None = None  # of attention to an encoder
    relative_bias: nn.Module | None = None  # T5: the attention whose `compute_bias` serves all layers
    past: int | Tensor = 0  # tokens in the cache before this call
    used: bool = False  # False after a call: the model does not hand its keyword arguments to its attention

    @property
    def length(self) -> int:
        """P, the positions that it takes; a prefix of cross attention takes none."""
        return self.layers[0][0].shape[1] if self.layers else 0

    def of(self, module: nn.Module) -> KeysValues | None:
        """The part of this attention, if it has one."""
        self.used = True
        layers = self.cross if is_cross(module) else self.layers
        return None if layers is None else layers[module.layer_idx]


def is_cross(module: nn.Module) -> bool:
    """Whether this attention of a decoder looks at an encoder."""
    in_decoder = getattr(module, "is_decoder", False) or getattr(module, "is_cross_attention", False)
    return in_decoder and not module.is_causal


# The mask. What a stack makes once, its layers get as `attention_mask`:
#   None                nothing but what the attention knows by itself: causal or not, window
#   [B, T] bool         False hides a key
#   [documents+1] int32 documents in the flattened batch
#   [B, 1, S, T]        any other mask, written out


def prefix_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """An entry of transformers' AttentionMaskInterface."""
    pattern = _pattern(mask_function)
    # A static cache is longer than what it holds, so its last key is not the last token.
    at_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if pattern is None or (pattern["causal"] and not at_end) or kwargs.get("use_vmap"):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )  # fmt: skip
    if "documents" in pattern:
        documents = pattern["documents"].expand(batch_size, -1)
        starts = pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
        return pad(starts.nonzero().flatten(), (0, 1), value=starts.numel()).int()
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    mask = pad(mask, (0, kv_length - mask.shape[1]), value=False)
    return None if not torch.compiler.is_compiling() and mask.all() else mask


# The mask functions that transformers makes: how to make a sample, and what such a function must hold. A release that
# has one of them in another form loses the short way only: a function that is not known is written out as a mask.
_SAMPLES = {
    "and": (("and_masks", lambda make: make(masking_utils.causal_mask_function)), "mask_functions"),
    "window": (("sliding_window_overlay", lambda make: make(1)), "sliding_window"),
    "documents": (("packed_sequence_mask_function", lambda make: make(torch.empty(0))), "packed_sequence_mask"),
    "inner": (
        (
            "remap_positions_for_packed_sequence",
            lambda make: make(masking_utils.causal_mask_function, torch.empty(0)),
        ),
        "mask_function",
    ),
}


def _kinds() -> dict[str, str]:
    """The name that mask functions of one kind share -> which kind it is."""
    kinds = {}
    for kind, ((name, sample_of), held) in _SAMPLES.items():
        make = getattr(masking_utils, name, None)
        sample = None if make is None else sample_of(make)
        if sample is not None and held in sample.__code__.co_freevars:
            kinds[sample.__qualname__] = kind
    return kinds


_KINDS = _kinds()


def _pattern(function) -> dict | None:
    """{"causal": ...} and, where rows are packed, {"documents": ids [B, S]} of a mask function; None for any other.

    The width of a window is left out: the attention is told it in each call.
    """
    if function is masking_utils.causal_mask_function:
        return {"causal": True}
    if function is masking_utils.bidirectional_mask_function:
        return {"causal": False}
    kind = _KINDS.get(getattr(function, "__qualname__", None))
    if kind is None:
        return None
    held = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    if kind == "window":
        return {}
    if kind == "documents":
        return {"documents": held["packed_sequence_mask"]}
    if kind == "inner":
        return _pattern(held["mask_function"])
    parts = [_pattern(part) for part in held["mask_functions"]]
    if None in parts:
        return None
    return {key: value for part in parts for key, value in part.items()}


# The attention


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    fastpeft_prefix: Prefix | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An entry of transformers' AttentionInterface. query: [B, H, S, D]; key, value: [B, Hkv, T, D].

    Without a prefix for this attention it is torch's scaled_dot_product_attention. Returns [B, S, H, D] and None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    own = None if fastpeft_prefix is None else fastpeft_prefix.of(module)
    written_out = attention_mask is not None and attention_mask.dim() == 4
    if written_out and query.shape[2] == 1 and sliding_window is None and attention_mask.dtype == torch.bool:
        # One token of a static cache: a row of the mask is a mask of keys.
        attention_mask, written_out, causal = attention_mask[:, 0, 0].expand(len(query), -1), False, False
    if own is None or written_out or dropout or position_bias is not None:
        return _written_out(
            module, query, key, value, attention_mask, causal, sliding_window, softcap, position_bias, own,
            fastpeft_prefix, dropout=dropout, scaling=scaling,
        )  # fmt: skip
    options = {"causal": causal, "scale": scaling, "window": sliding_window if causal else None, "softcap": softcap}
    documents = cu_seq_lens_q
    if documents is None and attention_mask is not None and attention_mask.dim() == 1:
        documents = attention_mask
    if documents is not None:
        flat = [t.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for t in (query, key, value)]
        out = prefix_attention(*flat, *own, cu_seqlens=documents.int(), **options)
        return out.transpose(1, 2).view(len(query), query.shape[2], query.shape[1], -1), None
    out = prefix_attention(query, key, value, *own, key_padding_mask=attention_mask, **options)
    return out.transpose(1, 2), None


def _written_out(
    module, query, key, value, mask, causal, window, softcap, bias, own, prefix, *, dropout, scaling
) -> tuple[Tensor, None]:
    """The attention as transformers has it: keys concatenated, mask and bias written out.

    For a call without a prefix, and for what the op has not: dropout of weights, T5's position bias, any other mask.
    """
    if own is None and mask is None and bias is None and softcap is None and (window is None or key.shape[2] <= window):
        causal = causal and query.shape[2] > 1
        if not causal or query.shape[2] == key.shape[2]:
            return sdpa_attention_forward(
                module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=causal
            )
    mask = _written_out_mask(mask, query, key, causal, window)
    if own is not None:
        P, S = own[0].shape[1], query.shape[2]
        key, value = (
            torch.cat([mine.to(real.dtype).expand(len(real), -1, -1, -1), real], 2)
            for mine, real in zip(own, (key, value), strict=True)
        )
        if mask is not None and window is not None:
            row = torch.arange(S, device=query.device).unsqueeze(1) + prefix.past + P
            visible = row - torch.arange(P, device=query.device) < window
            if mask.dtype != torch.bool:
                hidden = ~visible
                visible = torch.zeros_like(hidden, dtype=mask.dtype).masked_fill_(hidden, torch.finfo(mask.dtype).min)
            mask = torch.cat([visible.expand(*mask.shape[:2], -1, -1), mask], 3)
        elif mask is not None:
            mask = pad(mask, (P, 0), value=True if mask.dtype == torch.bool else 0.0)
        if bias is not None:
            if prefix.relative_bias is None or is_cross(module):
                bias = pad(bias, (P, 0))
            else:
                mine = prefix.relative_bias.compute_bias(S, P, query.device, prefix.past + P)
                bias = torch.cat([mine.to(bias.dtype), bias], 3)
    if softcap is not None:
        return _softcapped(module, query, key, value, mask, softcap, dropout, scaling)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, position_bias=bias
    )


def _written_out_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: int | None):
    """[B or 1, 1, S, T]; None where every row sees every key."""
    if mask is not None and mask.dim() == 4:
        return mask
    S, T = query.shape[2], key.shape[2]
    row = torch.arange(T - S, T, device=query.device).unsqueeze(1)
    column = torch.arange(T, device=query.device)
    visible = None
    if causal and S > 1:
        visible = (column <= row)[None, None]
    if causal and window is not None and window < T:
        near = (row - column < window)[None, None]
        visible = near if visible is None else visible & near
    if mask is not None:
        if mask.dim() == 1:
            token = torch.arange(len(query) * S, device=query.device).view(-1, S)
            document = torch.bucketize(token, mask, right=True)
            shown = document[:, None, :, None] == document[:, None, None, :]
        else:
            shown = mask[:, None, None]
        visible = shown if visible is None else visible & shown
    return None if visible is None else visible.expand(-1, -1, S, -1)


def _softcapped(module, query, key, value, mask, softcap, dropout, scaling) -> tuple[Tensor, None]:
    """torch's scaled_dot_product_attention has no softcap."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        # The lowest number, not -inf: a row of padding that sees nothing must not spread NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = nn.functional.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, prefix_attention_forward)
AttentionMaskInterface.register(NAME, prefix_mask)
