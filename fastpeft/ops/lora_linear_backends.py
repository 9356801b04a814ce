"""How each backend computes lora_linear, arguments checked already, and which one is chosen.

x: [M, K] and dy: [M, N], one dtype, the compute type. `weight`: dense or NF4Weight. `scale`: scaling / (1 - dropout_p),
a number. `seed`: 0-d int64 tensor, or None without dropout. xa = dropout(x) A^T [M, R], without dropout's 1 / (1 - p),
is what the gradient of B needs; it may be None where `keep_xa` is False. `needs`: which gradients of (x, weight, A, B,
bias) are wanted.

A dequantized weight lives for one product: torch's allocator hands the same memory to the next layer, in the order of
the stream, so it is a workspace that layers and streams share safely. So are the workspaces of the native kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.backend import Row
from fastpeft.ops.nf4 import nf4_merge
from fastpeft.ops.products import addmm, addmm_, linear, mm
from fastpeft.quant import NF4Weight, native_dtype, native_storage
from fastpeft.reference.dropout import keep_mask

DECODE_TOKENS = 64  # the most that the native kernel of a whole layer takes

# Bounds of tokens are crossovers of the model of an H100 (instructions and bytes in the kernels' headers).
TABLE = (
    Row(
        "cuda",
        tokens=DECODE_TOKENS,
        training=False,
        reason="one kernel for the layer: the weight is read once, at 2.5 to 4.3 instructions for one of 4 bits",
    ),
    Row(
        "triton",
        storage="nf4",
        tokens=512,
        reason="dequantizes in registers; to write the weight out and read it again costs more until here",
    ),
    Row("cuda", reason="dequantize, cuBLAS, and one pass over x or dy for each low-rank product"),
    Row("triton", reason="the same plan where the native module is not built"),
    Row("eager", dtypes=None, capability=(0, 0), reason="float32, float64, older GPUs, CPUs"),
)


def _needs_16_bits(x: Tensor) -> str | None:
    return None if x.dtype in backends.HALF_TYPES else f"x is {x.dtype}; the kernels take bf16 and fp16"


RULES = {
    "cuda": lambda x: _needs_16_bits(x) or backends.needs_cuda_module(x),
    "triton": lambda x: _needs_16_bits(x) or backends.needs_triton(x),
    "eager": backends.always,
}


def choose(
    x: Tensor, weight: Tensor | NF4Weight, training: bool, backend: str | None, rules=RULES, op: str = "lora_linear"
) -> str:
    """The backend's name; x: [..., K]."""
    if not x.is_cuda:
        return backends.choose(op, rules, x, backend=backend)
    storage = "nf4" if type(weight) is NF4Weight else "dense"
    order = backends.preferred(TABLE, x, math.prod(x.shape[:-1]), storage, training)
    return backends.choose(op, rules, x, backend=backend, order=order)


def _weight_and_bias_gradients(dy, x, weight, bias, needs) -> tuple[Tensor | None, Tensor | None]:
    dweight = mm(dy.t(), x).to(weight.dtype) if needs[1] else None
    if not needs[4]:
        return dweight, None
    return dweight, dy.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32)).to(bias.dtype)


class Eager:
    """PyTorch operations in the cheapest arrangement; any device and dtype."""

    @staticmethod
    def forward(x, weight, A, B, bias, scale, dropout_p, seed, keep_xa) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        y = linear(x, dense(weight, dtype), None if bias is None else bias.to(dtype))
        if dropout_p > 0:
            x = x * keep_mask(seed, *x.shape, dropout_p)
        xa = linear(x, A.to(dtype))
        addmm_(y, xa, B.to(dtype).t(), alpha=scale)
        return y, xa

    @staticmethod
    def backward(dy, x, xa, weight, A, B, bias, scale, dropout_p, seed, needs) -> list[Tensor | None]:
        """Every product has the compute type and float32 accumulation; the scale goes into the small factors."""
        need_x, _, need_A, need_B, _ = needs
        dtype = dy.dtype
        dx = dA = dB = None
        keep = keep_mask(seed, dy.shape[0], A.shape[1], dropout_p) if dropout_p > 0 and (need_x or need_A) else None
        if need_x or need_A:
            u = mm(dy, B.to(dtype))  # [M, R]; the scale follows in dx and dA
        if need_x:
            dx = mm(dy, dense(weight, dtype))
            if keep is None:
                addmm_(dx, u, A.to(dtype), alpha=scale)
            else:
                dx.addcmul_(mm(u, A.to(dtype)), keep.to(dtype), value=scale)
        if need_A:
            dA = mm(u.t(), x if keep is None else x * keep).to(A.dtype).mul_(scale)
        if need_B:
            # xa^T dy is the faster order on a CPU; the small result is transposed while it is cast.
            dB = torch.empty_like(B, memory_format=torch.contiguous_format)
            dB.copy_(mm(xa.t(), dy).t()).mul_(scale)
        dweight, dbias = _weight_and_bias_gradients(dy, x, weight, bias, needs)
        return [dx, dweight, dA, dB, dbias]


def dense(weight: Tensor | NF4Weight, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    return weight.dequantize(dtype, backend=backend) if type(weight) is NF4Weight else weight.to(dtype)


class _Kernels:
    """The order of the steps that CUDA and Triton share: x and dy are read once for all that is low-rank."""

    @classmethod
    def forward(cls, x, weight, A, B, bias, scale, dropout_p, seed, keep_xa) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        xa = cls.down(x, A, dropout_p, seed)
        return cls.base(x, weight, None if bias is None else bias.to(x.dtype), xa, B, scale), xa

    @classmethod
    def backward(cls, dy, x, xa, weight, A, B, bias, scale, dropout_p, seed, needs) -> list[Tensor | None]:
        need_x, _, need_A, need_B, _ = needs
        dy = dy.contiguous()
        dx = dA = dB = u = None
        if need_x or need_A or need_B:
            u, dB = cls.up_grad(dy, B, xa, scale, need_x or need_A, need_B)
        if need_x:
            dx = cls.dx(dy, weight, u, A, scale, dropout_p, seed)
        if need_A:
            dA = cls.down_grad(x.contiguous(), u, A, scale, dropout_p, seed)
        dweight, dbias = _weight_and_bias_gradients(dy, x, weight, bias, needs)
        return [dx, dweight, dA, dB, dbias]


class Cuda(_Kernels):
    """The native module; without gradients, few tokens go through one kernel for the whole layer."""

    @classmethod
    def forward(cls, x, weight, A, B, bias, scale, dropout_p, seed, keep_xa) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        if not keep_xa and dropout_p == 0 and decodes(x, weight, A):
            return decode(x, weight, A, B, bias, scale), None
        return super().forward(x, weight, A, B, bias, scale, dropout_p, seed, keep_xa)

    @staticmethod
    def down(x, A, dropout_p, seed) -> Tensor:
        (M, K), R = x.shape, A.shape[0]
        if K == 0:
            return x.new_zeros(M, R)
        xa = x.new_empty(M, R)
        call("lora_down", x, dict(M=M, K=K, R=R), x=x, xa=xa, **_adapter("lora_a", A, x), **_mask(seed, dropout_p))
        return xa

    @classmethod
    def base(cls, x, weight, bias, xa, B, scale) -> Tensor:
        y = linear(x, dense(weight, x.dtype, "cuda"), bias)
        return cls.add(y, xa, B, False, scale, 0.0, None)

    @classmethod
    def dx(cls, dy, weight, u, A, scale, dropout_p, seed) -> Tensor:
        dx = mm(dy, dense(weight, dy.dtype, "cuda"))
        return cls.add(dx, u, A, True, scale, dropout_p, seed)

    @staticmethod
    def add(y, xa, factor, transposed, scale, dropout_p, seed, **gain_bias_and_out) -> Tensor:
        """Adds to y in place; with a gain, DoRA's, `out` is made of it (csrc/ops.h)."""
        (M, N), R = y.shape, xa.shape[1]
        options = dict(transposed=transposed, scale=scale, **_mask(seed, dropout_p), **gain_bias_and_out)
        call("lora_add", y, dict(M=M, N=N, R=R), y=y, xa=xa, **_adapter("lora_b", factor, y), **options)
        return y

    @staticmethod
    def up_grad(dy, B, xa, scale, need_u, need_dB) -> tuple[Tensor | None, Tensor | None]:
        (M, N), R = dy.shape, B.shape[1]
        u = dy.new_empty(M, R) if need_u else None
        adapter = _adapter("lora_b", B, dy)
        dB = torch.empty_like(adapter["lora_b"]) if need_dB else None
        call("lora_up_grad", dy, dict(M=M, N=N, R=R), dy=dy, xa=xa, u=u, d_b=dB, scale=scale, **adapter)
        return u, None if dB is None else dB.to(B.dtype)

    @staticmethod
    def down_grad(x, u, A, scale, dropout_p, seed) -> Tensor:
        (M, K), R = x.shape, A.shape[0]
        dA = x.new_empty(R, K, dtype=_adapter_dtype(A, x))
        mask = _mask(seed, dropout_p)
        sizes = dict(M=M, K=K, R=R)
        call("lora_down_grad", x, sizes, x=x, u=u, d_a=dA, adapter_dtype=dA.dtype, scale=scale, **mask)
        return dA.to(A.dtype)


def decodes(x: Tensor, weight: Tensor | NF4Weight, A: Tensor) -> bool:
    """Whether the kernel for few tokens takes these: its copies are of 16 bytes."""
    aligned = [x, A] if type(weight) is NF4Weight else [x, A, weight]
    return (
        0 < x.shape[0] <= DECODE_TOKENS
        and x.shape[1] > 0
        and x.shape[1] % 8 == 0
        and all(t.data_ptr() % 16 == 0 for t in aligned)
        and (weight.packed.data_ptr() % 4 == 0 if type(weight) is NF4Weight else weight.is_contiguous())
    )


def decode(x, weight, A, B, bias, scale, gain=None) -> Tensor:
    """`gain * (x W^T + scale * (x A^T) B^T) + bias`, rounded once.

    x: [M, K] with M up to DECODE_TOKENS, as `decodes` wants it. gain: [N] float32, or None for ones.
    """
    (M, K), (N, R) = x.shape, B.shape
    nf4 = type(weight) is NF4Weight
    call(
        "lora_linear_decode",
        x,
        dict(M=M, N=N, K=K, R=R),
        x=x,
        weight=None if nf4 else weight.to(x.dtype),
        nf4=native_storage(weight) if nf4 else None,
        lora_b=_as_adapter(B, _adapter_dtype(A, x)),
        scaling=scale,
        scaling_tensor=None,
        gain=gain,
        bias=None if bias is None else bias.to(x.dtype),
        y=(y := x.new_empty(M, N)),
        **_adapter("lora_a", A, x),
    )
    return y


def _adapter_dtype(parameter: Tensor, x: Tensor) -> torch.dtype:
    """Kernels read an adapter in the compute type, or as a float32 master copy."""
    return parameter.dtype if parameter.dtype in (x.dtype, torch.float32) else x.dtype


def _as_adapter(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.detach().to(dtype).contiguous()


def _adapter(name: str, parameter: Tensor, x: Tensor) -> dict:
    dtype = _adapter_dtype(parameter, x)
    return {name: _as_adapter(parameter, dtype), "adapter_dtype": dtype}


def _mask(seed: Tensor | None, dropout_p: float) -> dict:
    return {"seed": seed, "dropout_p": dropout_p}


# Those of the native functions' arguments that are addresses, 0 for None.
_INPUTS = {"x", "dy", "xa", "u", "z", "weight", "lora_a", "lora_b", "bias", "gain", "offset", "scaling_tensor", "seed"}
_ADDRESSES = _INPUTS | {"y", "d_a", "d_b", "out", "d_gain", "norm"}


def call(name: str, like: Tensor, sizes: dict[str, int], *, dtype: torch.dtype | None = None, **arguments) -> None:
    """Calls the native `name` on the device of `like`, in its dtype or `dtype`, with the workspace that it asks for.

    The tensors live until the launch; memory that is freed afterwards goes to later work of the same stream only.
    """
    module = _native.cuda
    native = {
        key: (0 if value is None else value.data_ptr()) if key in _ADDRESSES else value
        for key, value in arguments.items()
    }
    if "adapter_dtype" in native:
        native["adapter_dtype"] = native_dtype(native["adapter_dtype"])
    with _native.stream_on(like.device) as stream:
        workspace_bytes = getattr(module, f"{name}_workspace_bytes", None)
        if workspace_bytes is not None:
            workspace = torch.empty(workspace_bytes(**sizes), dtype=torch.uint8, device=like.device)
            native["workspace"] = workspace.data_ptr()
        getattr(module, name)(**native, **sizes, dtype=native_dtype(dtype or like.dtype), stream=stream)


class Triton(_Kernels):
    """Triton kernels. Up to so many tokens also the big product: a 4-bit weight is then never written out."""

    FUSED_TOKENS = {"nf4": 512, "dense": 64}

    @staticmethod
    def down(x, A, dropout_p, seed) -> Tensor:
        xa = x.new_zeros(x.shape[0], A.shape[0])
        if x.numel() and A.numel():
            with _native.stream_on(x.device):
                _triton().lora_down(x, A.contiguous(), seed, dropout_p, xa)
        return xa

    @classmethod
    def base(cls, x, weight, bias, xa, B, scale) -> Tensor:
        if not cls._fuses(x, weight):
            y = linear(x, dense(weight, x.dtype, "triton"), bias)
            return addmm_(y, xa, B.to(x.dtype).t(), alpha=scale)
        y = x.new_empty(x.shape[0], B.shape[0])
        with _native.stream_on(x.device):
            _triton().lora_linear_fwd(x, storage(weight, x.dtype), xa, B.contiguous(), bias, scale, y)
        return y

    @classmethod
    def dx(cls, dy, weight, u, A, scale, dropout_p, seed) -> Tensor:
        if cls._fuses(dy, weight):
            dx = dy.new_empty(dy.shape[0], A.shape[1])
            with _native.stream_on(dy.device):
                _triton().lora_linear_dx(dy, storage(weight, dy.dtype), u, A.contiguous(), scale, seed, dropout_p, dx)
            return dx
        dx = mm(dy, dense(weight, dy.dtype, "triton"))
        if dropout_p == 0:
            return addmm_(dx, u, A.to(dy.dtype), alpha=scale)
        keep = keep_mask(seed, *dx.shape, dropout_p).to(dy.dtype)
        return dx.addcmul_(mm(u, A.to(dy.dtype)), keep, value=scale)

    @staticmethod
    def up_grad(dy, B, xa, scale, need_u, need_dB) -> tuple[Tensor | None, Tensor | None]:
        u = dy.new_zeros(dy.shape[0], B.shape[1]) if need_u else None
        dB = torch.zeros_like(B, memory_format=torch.contiguous_format) if need_dB else None
        if dy.numel() and B.numel():
            with _native.stream_on(dy.device):
                _triton().lora_up_grad(dy, B.contiguous(), xa, u, dB, scale)
        return u, dB

    @staticmethod
    def down_grad(x, u, A, scale, dropout_p, seed) -> Tensor:
        dA = torch.zeros_like(A, memory_format=torch.contiguous_format)
        if x.numel() and dA.numel():
            with _native.stream_on(x.device):
                _triton().lora_down_grad(x, u, seed, dropout_p, scale, dA)
        return dA

    @classmethod
    def _fuses(cls, x: Tensor, weight: Tensor | NF4Weight) -> bool:
        """Whether one kernel makes the big product and the update. Not of a 4-bit weight whose rows are no whole words:
        its codes would come one by one, and Triton 3.6 does not compile that."""
        if type(weight) is NF4Weight:
            if _triton().why_no_words(weight.packed, weight.shape[1]):
                return False
            return 0 < x.shape[0] <= cls.FUSED_TOKENS["nf4"] and x.shape[1] > 0
        return 0 < x.shape[0] <= cls.FUSED_TOKENS["dense"] and weight.is_contiguous() and x.shape[1] > 0


def _triton():
    from fastpeft.triton_kernels import lora_linear

    return lora_linear


def storage(weight: Tensor | NF4Weight, dtype: torch.dtype):
    if type(weight) is not NF4Weight:
        return weight.to(dtype)
    w = weight
    return w.packed, w.absmax, w.absmax_code, w.absmax_scale, w.absmax_offset, w.blocksize


class Folded:
    """The update inside the weight, for the product with x and with dy; the gradients of A and B by `runner`.

    `W + scale * B A` is as close to the exact one as the sum of two products is, on average. But a rounding error of
    the weight is the same for every token: where the update is smaller than a unit in the last place of W (2^-8 of it
    in bf16) part of it is lost, and an outlier channel of x, the same one in all tokens, multiplies what was lost.
    """

    def __init__(self, runner):
        self.runner = runner

    def forward(self, x, weight, A, B, bias, scale, dropout_p, seed, keep_xa) -> tuple[Tensor, None]:
        return linear(x, _folded(weight, A, B, scale, x.dtype), None if bias is None else bias.to(x.dtype)), None

    def backward(self, dy, x, xa, weight, A, B, bias, scale, dropout_p, seed, needs) -> list[Tensor | None]:
        xa = linear(x, A.to(x.dtype)) if needs[3] else None
        needs_of_others = (False, *needs[1:])
        grads = self.runner.backward(dy, x, xa, weight, A, B, bias, scale, dropout_p, seed, needs_of_others)
        if needs[0]:
            grads[0] = mm(dy, _folded(weight, A, B, scale, dy.dtype))
        return grads


def _folded(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    if type(weight) is NF4Weight:
        return nf4_merge(weight, A, B, scale, dtype=dtype)
    return addmm(weight.to(dtype), B.to(dtype), A.to(dtype), alpha=scale)


RUNNERS = {"cuda": Cuda, "triton": Triton, "eager": Eager}
