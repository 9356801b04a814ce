"""Other people's packages as sides of lora_linear. Each is imported when its side is prepared, and only if installed.

Their names here were read in the sources of these versions: unsloth 2026.10, axolotl 0.21, torchao 0.18, gemlite 0.6,
liger-kernel 0.8. An exception of theirs is reported in the results and stops nothing; a wrong result is one.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness import Absent


def module(name: str, package: str) -> ModuleType:
    """The module `name`; raises Absent when `package`, as pip calls it, is not installed."""
    if find_spec(name.partition(".")[0]) is None:
        raise Absent(f"{package} is not installed")
    return import_module(name)


def unsloth_layer(layer):
    """layer: a LoRA linear of peft -> a function of x [M, K]. Importing unsloth patches transformers and peft."""
    kernels = module("unsloth.kernels.fast_lora", "unsloth")
    holder = SimpleNamespace(o_proj=layer)
    return lambda x: kernels.apply_lora_o(holder, x.unsqueeze(0)).squeeze(0)


def unsloth_decode(layer):
    """The same for one token of each of M sequences."""
    kernels = module("unsloth.kernels.utils", "unsloth")
    return lambda x: kernels.fast_linear_forward(layer, x.unsqueeze(1)).squeeze(1)


def axolotl_layer(layer):
    kernels = module("axolotl.kernels.lora", "axolotl")
    holder = SimpleNamespace(o_proj=layer, training=True)
    return lambda x: kernels.apply_lora_o(holder, x.unsqueeze(0)).squeeze(0)


def torchao_nf4(weight: Tensor):
    """weight: [N, K] -> (its NF4 tensor, which has blocks of its own, and the function of x and it)."""
    nf4 = module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao")
    return nf4.to_nf4(weight), nf4.linear_nf4


def torchao_dequantized(weight: Tensor) -> Tensor:
    return torchao_nf4(weight)[0].get_original_weight()


_GROUP = 64


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded to the nearest of sixteen equal steps between the ends of each group: codes, scales, zeros."""
    groups = weight.float().view(-1, _GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scales = ((high - low) / 15).to(weight.dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15).to(weight.dtype)
    codes = (groups / scales.float() + zeros.float()).round().clamp(0, 15).to(torch.uint8)
    return codes.view(weight.shape), scales, zeros


def gemlite_int4(weight: Tensor):
    """Integers with a zero point a group of 64, not NF4, and no adapter: what an inference kernel reaches."""
    helper = module("gemlite.helper", "gemlite")
    if not weight.is_cuda:
        raise Absent("gemlite needs a GPU")
    codes, scales, zeros = _int4(weight)
    processor = helper.A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    return processor.from_weights(codes, scales.view(len(codes), -1), zeros.view(len(codes), -1))


def gemlite_dequantized(weight: Tensor) -> Tensor:
    codes, scales, zeros = _int4(weight)
    groups = (codes.double().view(-1, _GROUP) - zeros.double()) * scales.double()
    return groups.view(weight.shape)


def flute(_inputs):
    if find_spec("flute") is None:
        raise Absent("flute-kernel is not installed")
    raise Absent("no side is written for flute-kernel: it repacks and tunes for a shape and a GPU, inference only")


def plain_lora(base: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """What a package without an adapter of its own leaves to its user."""
    return base + scaling * linear(linear(x, A.to(x.dtype)), B.to(x.dtype))
