"""The formula of `bottleneck`. Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019
(https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}


def bottleneck(x, down, up, down_bias=None, up_bias=None, *, residual=None, activation="relu", scaling=1.0) -> Tensor:
    """`y = residual + scaling * (act(x D^T + b_d) U^T + b_u)`; arguments as in `fastpeft.ops.bottleneck`.

    Everything is computed in x's dtype.
    """
    down_bias, up_bias = (None if bias is None else bias.to(x.dtype) for bias in (down_bias, up_bias))
    hidden = ACTIVATIONS[activation](F.linear(x, down.to(x.dtype), down_bias))
    y = scaling * F.linear(hidden, up.to(x.dtype), up_bias)
    return y if residual is None else residual + y
