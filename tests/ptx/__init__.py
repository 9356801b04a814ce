"""Runs PTX on the CPU: see README.md."""

from .machine import launch, load
from .memory import Memory
from .nvcc import ptx_of
from .parse import PtxError

__all__ = ["Memory", "PtxError", "launch", "load", "ptx_of"]
