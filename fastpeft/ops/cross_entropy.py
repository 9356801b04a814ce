"""cross_entropy: the loss of a language model without a float32 copy of its logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import backend as backends
from fastpeft.reference.cross_entropy import cross_entropy as _reference

_RULES = {"eager": backends.always, "reference": backends.always}
_OPAQUE_RULES = {"eager": backends.always}

# Bytes of the float32 buffer that serves one block of rows after the other. On a CPU it should stay in the second-level
# caches; on a GPU it should be large against a launch (modelled).
_BUFFER_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str | None = None) -> Tensor:
    """`logsumexp(logits) - logits[label]` of each row; 0 where the label is `ignore_index`.

    logits: [..., V] bf16|fp16|fp32|fp64. labels: [...] int64 in [0, V) or ignore_index. Returns [...] in float32
    (float64 for float64 logits); divide its sum by the number of labels for the usual mean. Exponentials and sums are
    float32, in blocks of rows. Saved for backward: logits, labels and a float per row; PyTorch's own loss over
    `logits.float()` keeps two float32 copies more. Differentiable once with respect to logits.

    Raises ValueError when the shapes disagree and TypeError for other dtypes. Labels out of range are an error of
    indexing, as in PyTorch.
    """
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(f"logits are {logits.dtype} and labels {labels.dtype}; they must be floating point and int64")
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"logits are {tuple(logits.shape)}, so labels must be {tuple(logits.shape[:-1])}; "
                         f"got {tuple(labels.shape)}")  # fmt: skip
    if torch.compiler.is_compiling() and backend != "reference":
        return torch.ops.fastpeft.cross_entropy(logits, labels, ignore_index, backend)[0]
    if backends.choose("cross_entropy", _RULES, logits, backend=backend) == "reference":
        return _reference(logits, labels, ignore_index=ignore_index)
    return CrossEntropyFn.apply(logits, labels, ignore_index)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of `logits` [M, V], each copied into the same buffer of at least float32."""
    M, V = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _BUFFER_BYTES.get(logits.device.type, _BUFFER_BYTES["cuda"]) // (V * dtype.itemsize))
    buffer = torch.empty(min(rows, M), V, dtype=dtype, device=logits.device)
    for start in range(0, M, rows):
        block = slice(start, min(start + rows, M))
        yield block, buffer[: block.stop - block.start].copy_(logits[block])


def _forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The loss and the logsumexp of each row, both [M]; logsumexp is inf where ignored."""
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    lse = logits.new_empty(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    for block, z in _blocks(logits):
        largest = z.amax(1, keepdim=True)
        lse[block] = z.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))
    ignored = labels == ignore_index
    target = logits.gather(1, labels.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    losses = (lse - target).masked_fill_(ignored, 0)
    return losses, lse.masked_fill_(ignored, float("inf"))


def _backward(grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """`grad * (softmax(logits) - onehot(labels))` in the dtype of logits; an infinite lse makes a row of zeros."""
    shape, logits, lse = logits.shape, logits.reshape(-1, logits.shape[-1]), lse.reshape(-1, 1)
    ignored = lse.isinf()
    grad = grad.reshape(-1, 1).masked_fill(ignored, 0)
    labels = labels.reshape(-1, 1).masked_fill(ignored, 0)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for block, z in _blocks(logits):
        z.sub_(lse[block]).exp_().mul_(grad[block])
        dlogits[block] = z.scatter_add_(1, labels[block], -grad[block])
    return dlogits.view(shape)


class CrossEntropyFn(torch.autograd.Function):
    """The autograd node of `cross_entropy`; its arguments are checked already."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index):
        losses, lse = _forward(logits, labels, ignore_index)
        ctx.save_for_backward(logits, labels, lse)
        # Not a view: autograd forbids in-place operations on a view that a Function returns.
        return torch.ops.aten._unsafe_view(losses, labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors), None, None


@torch.library.custom_op("fastpeft::cross_entropy", mutates_args=())
def _op(logits: Tensor, labels: Tensor, ignore_index: int, backend: str | None) -> tuple[Tensor, Tensor]:
    backends.choose("cross_entropy in a compiled graph", _OPAQUE_RULES, logits, backend=backend)
    losses, lse = _forward(logits, labels, ignore_index)
    return losses.view(labels.shape), lse


@_op.register_fake
def _(logits, labels, ignore_index, backend):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return labels.new_empty(labels.shape, dtype=dtype), labels.new_empty(labels.numel(), dtype=dtype)


@torch.library.custom_op("fastpeft::cross_entropy_backward", mutates_args=())
def _op_backward(grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    return _backward(grad, logits, labels, lse)


@_op_backward.register_fake
def _(grad, logits, labels, lse):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _autograd(ctx, grad, _grad_lse):
    return torch.ops.fastpeft.cross_entropy_backward(grad, *ctx.saved_tensors), None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
