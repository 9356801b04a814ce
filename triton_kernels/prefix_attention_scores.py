"""What the kernels of prefix_attention share: who sees whom, scores, tiles of rows.

All that hides keys is an interval. The keys that a query sees lie side by side, and so do the queries that see a key,
whether by causality, a window, the bounds of a document or the end of the tensor; and of the prefix a window hides the
first slots. So a mask is two comparisons, and a loop knows where to begin, where to end, and where nothing is masked.
Only the padding mask has holes.

Query i stands at position P + T - S + i, key j at P + j, slot j of the prefix at j. With cu_seqlens each document is a
sequence of its own, and S is T; a tile may hold rows of several.
"""

import triton
import triton.language as tl

from .casts import round_to
from .products import load

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _documents_of(token, cu_seqlens, documents, halvings):
    """Begin and end of the document of each token: a binary search for the last cu_seqlens[d] <= token.

    halvings: of the number of documents until one is left. With a `while` in its place Triton 3.9 no longer knows what
    divides the pointers that come after it, and loads element by element.
    """
    d = tl.zeros_like(token)
    past = d + documents
    for _ in range(halvings):
        middle = (d + past) // 2
        found = tl.load(cu_seqlens + middle) <= token
        d = tl.where(found, middle, d)
        past = tl.where(found, past, middle)
    return tl.load(cu_seqlens + d), tl.load(cu_seqlens + d + 1)


@triton.jit
def keys_of(row, S, T, window, cu_seqlens, documents, halvings, CAUSAL: tl.constexpr):
    """The keys that each row sees: first, and the one past the last, int32 [len(row)]."""
    if cu_seqlens is None:
        first = tl.zeros_like(row)
        past = first + T
    else:
        first, past = _documents_of(row, cu_seqlens, documents, halvings)
    at = row + (T - S)
    if CAUSAL:
        past = tl.minimum(past, at + 1)
    if window is not None:
        first = tl.maximum(first, at + 1 - window)
    return first, past


@triton.jit
def rows_of(key, S, T, window, cu_seqlens, documents, halvings, CAUSAL: tl.constexpr):
    """The same, seen from the keys: the first row that sees each, and the one past the last, int32 [len(key)]."""
    if cu_seqlens is None:
        first = tl.zeros_like(key)
        past = first + S
    else:
        first, past = _documents_of(key, cu_seqlens, documents, halvings)
    at = key - (T - S)
    if CAUSAL:
        first = tl.maximum(first, at)
    if window is not None:
        past = tl.minimum(past, at + window)
    return first, past


@triton.jit
def first_slot_of(row, S, T, P, window, cu_seqlens, documents, halvings):
    """The first slot of the prefix that each row sees, which sees all that follow: int32 [len(row)].

    For a window only: Triton 3.6 compiles no function that returns None.
    """
    position = row + (P + T - S)
    if cu_seqlens is not None:
        begin, _ = _documents_of(row, cu_seqlens, documents, halvings)
        position -= begin
    return tl.maximum(position + 1 - window, 0)


@triton.jit
def attended(first, past, BN: tl.constexpr):
    """begin, whole, whole_end, end of the keys that rows see: all rows see all keys from whole to whole_end, which are
    whole tiles, and begin to whole are too."""
    begin = tl.min(first)
    whole = begin + tl.cdiv(tl.max(first) - begin, BN) * BN
    whole_end = whole + tl.maximum((tl.min(past) - whole) // BN, 0) * BN
    return begin, whole, whole_end, tl.max(past)


@triton.jit
def hide(x, hidden, n, size, first, past, mask, MASKED: tl.constexpr):
    """x [rows, len(n)] where a row sees key n, else `hidden`. Only padding hides where not MASKED.

    size: of all keys. first, past: what each row sees; None for no other bound. mask: uint8 [size], or None.
    """
    if MASKED:
        seen = (n < size)[None, :]
        if first is not None:
            seen = seen & (n[None, :] >= first[:, None])
        if past is not None:
            seen = seen & (n[None, :] < past[:, None])
        x = tl.where(seen, x, hidden)
    if mask is not None:
        x = tl.where(tl.load(mask + n, mask=n < size, other=0)[None, :] != 0, x, hidden)
    return x


@triton.jit
def scores(products, scale, softcap):
    """log2(e) times the scores, of q k^T; both factors as `score_factors` makes them."""
    if softcap is None:
        return products * scale
    else:
        tanh = 1.0 - 2.0 / (tl.exp2(products * (scale * (2 * LOG2E))) + 1.0)
        return tanh * softcap


@triton.jit
def softcap_slope(s, softcap):
    """How a score grows with scale * q k^T, from what `scores` made of it."""
    tanh = s / softcap
    return 1.0 - tanh * tanh


def score_factors(form):
    """scale and softcap for the kernels, whose scores are powers of 2."""
    if form.softcap is None:
        return form.scale * LOG2E.value, None
    return form.scale / form.softcap, form.softcap * LOG2E.value


@triton.jit
def _rows_at(tensor, first, stride, size, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to rows `first` and on, [ROWS, COLUMNS], and which are inside. Where they begin is int64."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < size - first
    if D < COLUMNS:
        inside = inside & (column < D)
    return tensor + tl.cast(first, tl.int64) * stride + (row * stride + column), inside


@triton.jit
def load_rows(
    tensor,
    first,
    stride,
    size,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """[ROWS, COLUMNS], zeros outside. WHOLE: all rows are inside."""
    pointers, inside = _rows_at(tensor, first, stride, size, D, ROWS, COLUMNS)
    return load(pointers, None if WHOLE and D == COLUMNS else inside)


@triton.jit
def store_rows(tensor, tile, first, stride, size, D: tl.constexpr):
    """tile: float32, rounded here."""
    pointers, inside = _rows_at(tensor, first, stride, size, D, tile.shape[0], tile.shape[1])
    tl.store(pointers, round_to(tile, tensor.dtype.element_ty), mask=inside)


def strided(tensor):
    """A tensor [B, heads, rows, D] and its strides as arguments of a kernel; it may be None."""
    return (None, 0, 0, 0) if tensor is None else (tensor, *tensor.stride()[:3])


def numbers(q, prefix_k, cu_seqlens, keys, form):
    """The arguments of a kernel from cu_seqlens to window. keys: how many real ones a sequence has."""
    documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    group = q.shape[1] // prefix_k.shape[0]
    return cu_seqlens, documents, documents.bit_length(), q.shape[2], keys, prefix_k.shape[1], group, form.window


def launch_rows(kernel, tile, q, form, *arguments):
    """Launches `kernel` over the rows of the heads of q."""
    B, H, S, D = q.shape
    kernel[(triton.cdiv(S, tile.rows), H, B)](
        *arguments,
        CAUSAL=form.causal,
        D=D,
        BM=tile.rows,
        BN=tile.depth,
        BD=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=255,  # all; else ptxas spills a few for one more program on an SM
        enable_fp_fusion=True,  # no bits are promised
    )
