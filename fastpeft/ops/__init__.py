"""The ops: functional, checked, differentiable, each with its formula in `fastpeft.reference`."""

from fastpeft.ops.cross_entropy import cross_entropy
from fastpeft.ops.dora_linear import dora_linear
from fastpeft.ops.dora_norm import dora_norm
from fastpeft.ops.lora_linear import lora_linear
from fastpeft.ops.lora_linear_backends import TABLE as _LORA_LINEAR
from fastpeft.ops.nf4 import nf4_dequantize, nf4_merge, nf4_quantize
from fastpeft.ops.prefix_attention import prefix_attention
from fastpeft.ops.prefix_attention_backends import TABLE as _PREFIX_ATTENTION

__all__ = [
    "cross_entropy",
    "dora_linear",
    "dora_norm",
    "lora_linear",
    "nf4_dequantize",
    "nf4_merge",
    "nf4_quantize",
    "prefix_attention",
]

# op -> how it chooses its backend on a GPU
TABLES = {"lora_linear": _LORA_LINEAR, "prefix_attention": _PREFIX_ATTENTION}
