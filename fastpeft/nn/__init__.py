"""Modules over the ops, and the functions that put them into a model and onto a disk."""

from fastpeft.nn.adapter_files import load_adapter, save_adapter
from fastpeft.nn.convert import convert
from fastpeft.nn.dora import DoRALinear
from fastpeft.nn.lora import LoRALinear
from fastpeft.nn.prefix import PrefixEncoder

__all__ = ["DoRALinear", "LoRALinear", "PrefixEncoder", "convert", "load_adapter", "save_adapter"]
