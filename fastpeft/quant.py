"""NF4Weight: a frozen [N, K] weight in the 4-bit storage of bitsandbytes, held without a copy."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft import backend as backends
from fastpeft.reference import nf4 as formula

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

REPACKED = (
    "bitsandbytes has repacked this 4-bit weight for CPU inference (an eval() forward without gradients does it) and "
    "training on it gives wrong gradients; reload the model and call fastpeft.accelerate before the first evaluation"
)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """`W[n, k] = values[index[n, k]] * absmax[block]`, two indices a byte (see `fastpeft.reference.nf4`).

    packed: [ceil(N*K / 2)] uint8, a view of the storage, whatever dtype the storage was declared with.
    absmax: [blocks] float32; or uint8 when the absmax vector is itself quantized (double quantization), and then
    absmax_code: [256] float32, absmax_scale: [ceil(blocks / 256)] float32, absmax_offset: 0-d float32.
    shape: (N, K). blocksize: elements that share an absmax. dtype: what the weight was before, the default of
    `dequantize`.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype
    absmax_code: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nested(self) -> bool:
        return self.absmax_code is not None

    @property
    def storage_bytes(self) -> int:
        tensors = (self.packed, self.absmax, self.absmax_code, self.absmax_scale, self.absmax_offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @classmethod
    def from_bnb(cls, layer) -> NF4Weight:
        """View of a bitsandbytes `Linear4bit` or `Params4bit`; no byte is copied.

        Raises ValueError for fp4, for a weight that is not quantized yet, for storage that bitsandbytes has repacked
        for CPU inference, and where the sizes of weight, absmax and declared shape disagree.
        """
        weight = getattr(layer, "weight", layer)
        state = bnb_quant_state(layer)
        if state is None and not hasattr(weight, "quant_state"):
            raise TypeError(f"a Linear4bit or Params4bit of bitsandbytes is needed; got {type(layer).__name__}")
        if state is None:
            raise ValueError(
                f"{type(layer).__name__} is not quantized yet: move it to its device first (`.to(device)`)"
            )
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type is {state.quant_type!r}; only 'nf4' is supported: load the model with "
                             "BitsAndBytesConfig(bnb_4bit_quant_type='nf4')")  # fmt: skip
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(REPACKED)
        return cls._from_state(weight, state, getattr(layer, "out_features", None), getattr(layer, "in_features", None))

    @classmethod
    def _from_state(cls, weight: Tensor, state, out_features: int | None, in_features: int | None) -> NF4Weight:
        shape = tuple(state.shape)
        if len(shape) != 2 or out_features not in (None, shape[0]) or in_features not in (None, shape[1]):
            raise ValueError(f"quant_state.shape is {shape}, but the layer is [{out_features}, {in_features}]")
        nested = state.state2
        if nested is not None and nested.blocksize != formula.ABSMAX_BLOCKSIZE:
            raise ValueError(f"nested blocksize is {nested.blocksize}; only {formula.ABSMAX_BLOCKSIZE} is supported")
        packed = weight.data.view(torch.uint8).view(-1)
        result = cls(
            packed=packed,
            absmax=state.absmax if nested is not None else state.absmax.float(),
            shape=shape,
            blocksize=state.blocksize,
            dtype=state.dtype,
            absmax_code=None if nested is None else nested.code,
            absmax_scale=None if nested is None else nested.absmax,
            absmax_offset=None if nested is None else state.offset,
        )
        result._check_sizes()
        return result

    def _check_sizes(self) -> None:
        if self.blocksize not in formula.BLOCKSIZES:
            raise ValueError(f"blocksize is {self.blocksize}; allowed are {formula.BLOCKSIZES}")
        numel = self.shape[0] * self.shape[1]
        blocks = -(-numel // self.blocksize)
        wanted = {"packed": -(-numel // 2), "absmax": blocks}
        if self.nested:
            wanted |= {"absmax_code": 256, "absmax_scale": -(-blocks // formula.ABSMAX_BLOCKSIZE), "absmax_offset": 1}
        for name, size in wanted.items():
            if getattr(self, name).numel() != size:
                raise ValueError(f"{name} has {getattr(self, name).numel()} elements; a weight of shape {self.shape} "
                                 f"in blocks of {self.blocksize} needs {size}")  # fmt: skip

    @classmethod
    def quantize(
        cls, weight: Tensor, blocksize: int = 64, double_quant: bool = True, *, backend: str | None = None
    ) -> NF4Weight:
        """weight: [N, K] bf16|fp16|fp32. The bytes are those that bitsandbytes writes on a CPU, by every backend."""
        if weight.dim() != 2 or weight.dtype not in _FLOATS:
            raise ValueError(f"weight must be [N, K] in bf16, fp16 or fp32; got {tuple(weight.shape)} {weight.dtype}")
        if blocksize not in formula.BLOCKSIZES:
            raise ValueError(f"blocksize is {blocksize}; allowed are {formula.BLOCKSIZES}")
        weight = weight.detach()
        quantize, quantize_absmax = _QUANTIZE[backends.choose("nf4_quantize", _RULES, weight, backend=backend)]
        packed, absmax = quantize(weight, blocksize)
        common = dict(packed=packed, shape=tuple(weight.shape), blocksize=blocksize, dtype=weight.dtype)
        if not double_quant:
            return cls(absmax=absmax, **common)
        # The mean is torch's in every backend: its order of summation is part of the stored bits.
        offset, code = absmax.mean(), formula.absmax_code(weight.device)
        codes, scale = quantize_absmax(absmax, offset, code)
        return cls(absmax=codes, absmax_code=code, absmax_scale=scale, absmax_offset=offset, **common)

    def absmax_float(self) -> Tensor:
        """The block maxima in float32, [blocks]."""
        if not self.nested:
            return self.absmax
        if self.absmax.device.type == "cpu" and _bitsandbytes_is_loaded():
            decode = torch.ops.bitsandbytes.dequantize_blockwise.default
            codes = decode(self.absmax, self.absmax_scale, self.absmax_code, formula.ABSMAX_BLOCKSIZE, torch.float32)
            return codes.add_(self.absmax_offset)
        return formula.dequantize_absmax(self.absmax, self.absmax_code, self.absmax_scale, self.absmax_offset)

    def dequantize(self, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
        """[N, K] in `dtype` (default: `self.dtype`), formed in float32 and rounded once; all backends are bit-equal."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}; it must be floating point")
        name = backends.choose("nf4_dequantize", _RULES, self.packed, backend=backend)
        return _DEQUANTIZE[name](self, dtype or self.dtype)

    def to(self, device: torch.device | str) -> NF4Weight:
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return NF4Weight(**moved)


def bnb_quant_state(layer):
    """The quantization state of a Linear4bit or Params4bit, None before it is quantized.

    The weight's own comes first: the module's may belong to the model that this one was deep-copied from. After FSDP2's
    unshard the weight is a plain Parameter, and only the module knows.
    """
    return getattr(getattr(layer, "weight", layer), "quant_state", None) or getattr(layer, "quant_state", None)


def _bitsandbytes_is_loaded() -> bool:
    # Whoever holds 4-bit weights of bitsandbytes has imported it; importing it for anyone else would cost a second.
    return sys.modules.get("bitsandbytes") is not None


def _dequantize_eager(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    # On a CPU bitsandbytes 0.50 returns garbage where a block crosses a row, and compiles a slow fallback for the
    # largest blocks.
    aligned = weight.shape[1] % weight.blocksize == 0 and weight.blocksize < 2048
    if _bitsandbytes_is_loaded() and dtype in _FLOATS and (aligned or weight.device.type != "cpu"):
        decode = torch.ops.bitsandbytes.dequantize_4bit.default
        return decode(weight.packed, weight.absmax_float(), weight.blocksize, "nf4", weight.shape, dtype)
    return formula.nf4_dequantize(weight, dtype)


def _dequantize_triton(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    from fastpeft.triton_kernels import nf4 as kernels

    if dtype not in _FLOATS:
        return _dequantize_triton(weight, torch.float32).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    nested = (weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
    with _native.stream_on(weight.device):
        kernels.nf4_dequantize(weight.packed, weight.absmax, *nested, weight.blocksize, out)
    return out


def _dequantize_cuda(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    if dtype not in _FLOATS:
        return _dequantize_cuda(weight, torch.float32).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    with _native.stream_on(weight.device) as stream:
        _native.cuda.nf4_dequantize(native_storage(weight), out.data_ptr(), native_dtype(dtype), out.numel(), stream)
    return out


def _empty_codes(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    packed = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8, device=weight.device)
    return packed, torch.empty(-(-weight.numel() // blocksize), dtype=torch.float32, device=weight.device)


def _empty_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    scale = absmax.new_empty(-(-absmax.numel() // formula.ABSMAX_BLOCKSIZE))
    return torch.empty_like(absmax, dtype=torch.uint8), scale


def _quantize_triton(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    from fastpeft.triton_kernels import nf4 as kernels

    packed, absmax = _empty_codes(weight, blocksize)
    with _native.stream_on(weight.device):
        kernels.nf4_quantize(weight.contiguous(), blocksize, packed, absmax)
    return packed, absmax


def _quantize_absmax_triton(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    from fastpeft.triton_kernels import nf4 as kernels

    codes, scale = _empty_absmax(absmax)
    with _native.stream_on(absmax.device):
        kernels.nf4_quantize_absmax(absmax, offset, code, codes, scale)
    return codes, scale


def _quantize_cuda(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    packed, absmax = _empty_codes(weight, blocksize)
    source = (weight.data_ptr(), native_dtype(weight.dtype))
    with _native.stream_on(weight.device) as stream:
        _native.cuda.nf4_quantize(*source, packed.data_ptr(), absmax.data_ptr(), weight.numel(), blocksize, stream)
    return packed, absmax


def _quantize_absmax_cuda(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _empty_absmax(absmax)
    addresses = (tensor.data_ptr() for tensor in (absmax, offset, code, codes, scale))
    with _native.stream_on(absmax.device) as stream:
        _native.cuda.nf4_quantize_absmax(*addresses, absmax.numel(), stream)
    return codes, scale


def native_storage(weight: NF4Weight):
    """The native module's view of `weight`: addresses only, so the weight must outlive the call."""
    storage = _native.cuda.Nf4Storage
    if not weight.nested:
        return storage.plain(weight.packed.data_ptr(), weight.absmax.data_ptr(), weight.blocksize)
    tensors = (weight.packed, weight.absmax, weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
    return storage.nested(*(tensor.data_ptr() for tensor in tensors), weight.blocksize)


def native_dtype(dtype: torch.dtype):
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return getattr(_native.cuda.DType, names[dtype])


_RULES = {
    "cuda": backends.needs_cuda_module,
    "triton": backends.needs_triton,
    "eager": backends.always,
    "reference": backends.always,
}
_DEQUANTIZE = {
    "cuda": _dequantize_cuda,
    "triton": _dequantize_triton,
    "eager": _dequantize_eager,
    "reference": formula.nf4_dequantize,
}
_QUANTIZE = {
    "cuda": (_quantize_cuda, _quantize_absmax_cuda),
    "triton": (_quantize_triton, _quantize_absmax_triton),
    "eager": (formula.nf4_quantize, formula.quantize_absmax),
    "reference": (formula.nf4_quantize, formula.quantize_absmax),
}
