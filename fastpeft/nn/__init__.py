"""Modules over the ops, and the functions that put them into a model and onto a disk."""

from fastpeft.nn.adapter_files import load_adapter, save_adapter
from fastpeft.nn.bottleneck import BottleneckAdapter
from fastpeft.nn.bottleneck_model import (
    BottleneckConfig,
    active_bottleneck,
    add_bottleneck,
    delete_bottleneck,
    load_bottleneck,
    merge_bottlenecks,
    save_bottleneck,
    set_bottleneck,
)
from fastpeft.nn.convert import convert
from fastpeft.nn.dora import DoRALinear
from fastpeft.nn.ia3 import IA3Linear
from fastpeft.nn.lora import LoRALinear
from fastpeft.nn.prefix import PrefixEncoder

__all__ = [
    "BottleneckAdapter",
    "BottleneckConfig",
    "DoRALinear",
    "IA3Linear",
    "LoRALinear",
    "PrefixEncoder",
    "active_bottleneck",
    "add_bottleneck",
    "convert",
    "delete_bottleneck",
    "load_adapter",
    "load_bottleneck",
    "merge_bottlenecks",
    "save_adapter",
    "save_bottleneck",
    "set_bottleneck",
]
