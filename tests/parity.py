"""The one numerical rule of the project, and the tensors that tests feed to an op."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_parity(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """`err(actual) <= 2 * err(plain) + floor`, for the largest and for the root-mean-square error.

    actual: what is tested. plain: the formula in plain PyTorch in the same dtype. exact: the formula in float64.

    The floor is one unit in the last place of the largest value: a plain result may be exact by luck. The largest error
    has a second part, since products are summed in float32, and another order of summation draws other errors. n terms
    of either sign make a sum of sqrt(n) times their size, and n roundings an error of sqrt(n) times theirs: the error
    stays near one float32 unit of the sum, however long it is. But the largest of N such errors is sqrt(2 ln N) times
    that, as of N normal numbers.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == plain.shape == exact.shape, (what, actual.shape, plain.shape, exact.shape)
    assert actual.dtype == plain.dtype, (what, actual.dtype, plain.dtype)
    if exact.numel() == 0:
        return
    error, plain_error = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    floor = torch.finfo(actual.dtype).eps * exact.abs().max()
    of_order = math.sqrt(2 * math.log(exact.numel())) * torch.finfo(torch.float32).eps * exact.abs().max()
    sizes = {"largest": (Tensor.max, floor + of_order), "rms": (lambda e: e.square().mean().sqrt(), floor)}
    for name, (size, least) in sizes.items():
        got, allowed = size(error), 2 * size(plain_error) + least
        assert got <= allowed, (
            f"{what}: {name} error {got:.3e}, allowed {allowed:.3e} (largest value {exact.abs().max():.3e})"
        )


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that collects a gradient."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(True)
