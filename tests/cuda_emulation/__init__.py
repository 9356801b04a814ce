"""Runs the kernels of csrc/ on the CPU; README.md says how and what it can see."""

from .build import MODES
from .emulation import Emulation

__all__ = ["MODES", "Emulation"]
