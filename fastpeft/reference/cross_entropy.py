"""The formula of `cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """`logsumexp(logits) - logits[label]`, in at least float32, 0 where ignored; as `fastpeft.ops.cross_entropy`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = labels == ignore_index
    target = logits.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - target).masked_fill(ignored, 0)
