"""The ops: functional, checked, differentiable, each with its formula in `fastpeft.reference`."""

from fastpeft.ops.bottleneck import bottleneck
from fastpeft.ops.bottleneck_backends import TABLE as _BOTTLENECK
from fastpeft.ops.cross_entropy import cross_entropy
from fastpeft.ops.dora_linear import dora_linear
from fastpeft.ops.dora_norm import dora_norm
from fastpeft.ops.ia3 import TABLE as _IA3_LINEAR
from fastpeft.ops.ia3 import ia3_linear
from fastpeft.ops.lora_linear import lora_linear
from fastpeft.ops.lora_linear_backends import TABLE as _LORA_LINEAR
from fastpeft.ops.nf4 import nf4_dequantize, nf4_merge, nf4_quantize
from fastpeft.ops.prefix_attention import prefix_attention
from fastpeft.ops.prefix_attention_backends import TABLE as _PREFIX_ATTENTION

__all__ = [
    "bottleneck",
    "cross_entropy",
    "dora_linear",
    "dora_norm",
    "ia3_linear",
    "lora_linear",
    "nf4_dequantize",
    "nf4_merge",
    "nf4_quantize",
    "prefix_attention",
]

# op -> how it chooses its backend on a GPU
TABLES = {
    "lora_linear": _LORA_LINEAR,
    "ia3_linear": _IA3_LINEAR,
    "bottleneck": _BOTTLENECK,
    "prefix_attention": _PREFIX_ATTENTION,
}
