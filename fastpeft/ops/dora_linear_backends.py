"""How each backend computes dora_linear, arguments checked already. The products are lora_linear's.

Arguments as in lora_linear_backends, but `scaling` is not divided by 1 - p, p being the probability of dropout. gain:
[N], magnitude / norm, at least float32. With keep the mask of dropout, xk = keep * x and xa = xk A^T [M, R],

    z = xk W^T + scaling * xa B^T
    y = gain * z + bias                                 without dropout, where xk is x
    y = lora_linear(x) + (gain - 1) / (1 - p) * z       with dropout, as in peft

z [M, N] is what the gradient of the gain needs, sum_m dy * z / (1 - p). `forward` returns y, z and xa; the latter two
may be None where `training` is False. `needs`: which gradients of (x, weight, A, B, gain, bias) are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.ops import lora_linear_backends as lora
from fastpeft.ops.columns import scale_columns, scale_columns_backward
from fastpeft.ops.nf4 import nf4_merge
from fastpeft.ops.products import addmm_, linear, mm
from fastpeft.quant import NF4Weight
from fastpeft.reference.dropout import keep_mask


class Eager:
    """PyTorch operations in the cheapest arrangement; any device and dtype."""

    @staticmethod
    def forward(x, weight, A, B, gain, bias, scaling, p, seed, training) -> tuple[Tensor, Tensor, Tensor]:
        y = None
        if p > 0:
            weight = lora.dense(weight, x.dtype)  # once for two products
            y = linear(x, weight, None if bias is None else bias.to(x.dtype))
            x = x * keep_mask(seed, *x.shape, p)
        z, xa = lora.Eager.forward(x, weight, A, B, None, scaling, 0.0, None, True)
        if y is None:
            return scale_columns(z, gain, bias), z, xa
        addmm_(y, xa, B.to(x.dtype).t(), alpha=scaling / (1 - p))
        return y.add_(scale_columns(z, (gain - 1) / (1 - p))), z, xa

    @staticmethod
    def backward(dy, x, z, xa, weight, A, B, gain, bias, scaling, p, seed, needs) -> list[Tensor | None]:
        need_x, need_weight, need_A, need_B, need_gain, need_bias = needs
        dense, kept_x = weight, x
        if p > 0:
            dense, keep = lora.dense(weight, dy.dtype), keep_mask(seed, dy.shape[0], A.shape[1], p)
            kept_x = None if x is None else x * keep
        dz, sums = scale_columns_backward(dy, z if need_gain else None, gain / (1 - p))
        lora_needs = (need_x, need_weight, need_A, need_B, False)
        grads = lora.Eager.backward(dz, kept_x, xa, dense, A, B, None, scaling, 0.0, None, lora_needs)
        dx, dweight, dA, dB, _ = grads
        if p > 0:
            # y holds (x - xk / (1 - p)) W^T too: x itself where it was dropped, elsewhere -p / (1 - p) * x.
            if need_x:
                dx_rest = mm(dy, dense)
                dx = torch.where(keep, dx.sub_(dx_rest, alpha=p / (1 - p)), dx_rest)
            if need_weight:
                dweight += mm(dy.t(), torch.sub(x, kept_x, alpha=1 / (1 - p)))
        dgain = sums / (1 - p) if need_gain else None
        return [dx, dweight, dA, dB, dgain, _bias_gradient(dy, bias) if need_bias else None]


def _bias_gradient(dy: Tensor, bias: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32)).to(bias.dtype)


class _Kernels:
    """The order of the steps that CUDA and Triton share. Backward has no gain * dy: the gain goes into B, into the rows
    of dB, and for the gradient of x into the weight or dy, whichever is smaller."""

    name: str
    lora: type[lora.Cuda] | type[lora.Triton]

    @classmethod
    def forward(cls, x, weight, A, B, gain, bias, scaling, p, seed, training) -> tuple[Tensor, Tensor | None, Tensor]:
        x, gain = x.contiguous(), gain.float()
        bias = None if bias is None else bias.to(x.dtype)
        xa = cls.lora.down(x, A, p, seed)
        if p == 0:
            return *cls.with_gain(x, weight, xa, B, gain, bias, scaling, training), xa
        weight = lora.dense(weight, x.dtype, cls.name)  # once for two products
        y = cls.lora.base(x, weight, bias, xa, B, scaling / (1 - p))
        kept_x = cls.add(torch.empty_like(x), x, None, None, p, seed)
        z = cls.lora.base(kept_x, weight, None, xa, B, scaling)
        return cls.add(y, z, (gain - 1) / (1 - p), y), z, xa

    @classmethod
    def backward(cls, dy, x, z, xa, weight, A, B, gain, bias, scaling, p, seed, needs) -> list[Tensor | None]:
        need_x, need_weight, need_A, need_B, need_gain, need_bias = needs
        dy, gain, scale = dy.contiguous(), gain.float(), scaling / (1 - p)
        dx = dweight = dA = dB = dgain = u = None
        if need_x or need_A or need_B:
            u, dB = cls.lora.up_grad(dy, gain.unsqueeze(1) * B, xa, scale, need_x or need_A, need_B)
        if need_B:
            dB = (gain.unsqueeze(1) * dB).to(B.dtype)
        if need_A:
            dA = cls.lora.down_grad(x.contiguous(), u, A, scale, p, seed)
        if need_x:
            dx = cls.dx(dy, weight, u, A, gain, scale, p, seed)
        if need_weight:
            dweight = cls.dweight(dy, x.contiguous(), gain, p, seed).to(weight.dtype)
        if need_gain:
            dgain = cls.gain_grad(dy, z) / (1 - p)
        return [dx, dweight, dA, dB, dgain, _bias_gradient(dy, bias) if need_bias else None]

    @classmethod
    def dx(cls, dy, weight, u, A, gain, scale, p, seed) -> Tensor:
        if p == 0:
            return cls.lora.dx(*cls.scaled(dy, weight, gain), u, A, scale, 0.0, None)
        weight = lora.dense(weight, dy.dtype, cls.name)
        dx = cls.lora.dx(dy, weight, u, A, scale, p, seed)
        through_z = mm(*cls.scaled(dy, weight, (gain - 1) / (1 - p)))
        return cls.add(dx, through_z, None, dx, p, seed)

    @classmethod
    def dweight(cls, dy, x, gain, p, seed) -> Tensor:
        if p == 0:
            return gain.unsqueeze(1) * mm(dy.t(), x)
        kept_x = cls.add(torch.empty_like(x), x, None, None, p, seed)
        return mm(dy.t(), x) + ((gain - 1) / (1 - p)).unsqueeze(1) * mm(dy.t(), kept_x)

    @classmethod
    def scaled(cls, dy, weight, gain) -> tuple[Tensor, Tensor | NF4Weight]:
        """(dy, weight) with the gain of the rows of W in the smaller of the two, rounded once."""
        if dy.shape[0] <= weight.shape[1]:
            return cls.add(torch.empty_like(dy), dy, gain), weight
        weight = lora.dense(weight, dy.dtype, cls.name)
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        return dy, torch.mul(weight, gain.unsqueeze(1), out=out)  # one pass on a GPU, in float32


class Cuda(_Kernels):
    """The native module; without gradients, few tokens go through one kernel for the whole layer."""

    name = "cuda"
    lora = lora.Cuda

    @classmethod
    def forward(cls, x, weight, A, B, gain, bias, scaling, p, seed, training):
        x = x.contiguous()
        if not training and p == 0 and lora.decodes(x, weight, A):
            return lora.decode(x, weight, A, B, bias, scaling, gain.float()), None, None
        return super().forward(x, weight, A, B, gain, bias, scaling, p, seed, training)

    @classmethod
    def with_gain(cls, x, weight, xa, B, gain, bias, scaling, keep_z) -> tuple[Tensor, Tensor | None]:
        z = linear(x, lora.dense(weight, x.dtype, "cuda"))
        y = torch.empty_like(z) if keep_z else z
        cls.lora.add(z, xa, B, False, scaling, 0.0, None, gain=gain, bias=bias, out=y)
        return y, z if keep_z else None

    @classmethod
    def scaled(cls, dy, weight, gain) -> tuple[Tensor, Tensor]:
        if type(weight) is not NF4Weight:
            return super().scaled(dy, weight, gain)
        nothing = dy.new_empty(0, weight.shape[1]), dy.new_empty(weight.shape[0], 0)
        return dy, nf4_merge(weight, *nothing, 0.0, gain, dy.dtype, backend="cuda")  # where it is dequantized anyway

    @staticmethod
    def add(out, x, gain=None, offset=None, p=0.0, seed=None) -> Tensor:
        """`out = gain * keep * x + offset`, rounded once; all [M, N] but the gain, [N]."""
        sizes = dict(M=x.shape[0], N=x.shape[1])
        lora.call("dora_linear_add", x, sizes, x=x, gain=gain, offset=offset, out=out, seed=seed, dropout_p=p)
        return out

    @staticmethod
    def gain_grad(dy, z) -> Tensor:
        """`sum_m dy * z` [N], in float32."""
        dgain = dy.new_empty(dy.shape[1], dtype=torch.float32)
        lora.call("dora_linear_gain_grad", dy, dict(M=dy.shape[0], N=dy.shape[1]), dy=dy, z=z, d_gain=dgain)
        return dgain


class Triton(_Kernels):
    """Triton kernels; y goes through the gain in a pass of its own."""

    name = "triton"
    lora = lora.Triton

    @classmethod
    def with_gain(cls, x, weight, xa, B, gain, bias, scaling, keep_z) -> tuple[Tensor, Tensor]:
        z = cls.lora.base(x, weight, None, xa, B, scaling)
        return cls.add(torch.empty_like(z) if keep_z else z, z, gain, bias), z

    @staticmethod
    def add(out, x, gain=None, offset=None, p=0.0, seed=None) -> Tensor:
        """`out = gain * keep * x + offset`, rounded once; all [M, N] but the gain, [N], and the offset, either."""
        if x.numel():
            with _native.stream_on(x.device):
                _triton().dora_linear_add(x, gain, offset, seed, p, out)
        return out

    @staticmethod
    def gain_grad(dy, z) -> Tensor:
        dgain = dy.new_zeros(dy.shape[1], dtype=torch.float32)
        if dy.numel():
            with _native.stream_on(dy.device):
                _triton().dora_linear_gain_grad(dy, z, dgain)
        return dgain


def _triton():
    from fastpeft.triton_kernels import dora_linear

    return dora_linear


RUNNERS = {"cuda": Cuda, "triton": Triton, "eager": Eager}
