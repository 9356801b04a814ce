"""Triton's own launcher with its kernels interpreted: `kernel[grid](...)` on CPU tensors compiles to PTX and runs that.

For a process in which TRITON_INTERPRET is off (test_triton.py starts one).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .kernel import Kernel
from .machine import launch, load
from .memory import Memory
from .parse import PtxError

_SHARED_BYTES = 99 * 1024  # what a block may have on sm_86, 89 and 120, the least of those that are built for


class Driver:
    """What triton.runtime asks of a driver: a device, how to load what was compiled for it, how to launch that.

    arch: 80 for sm_80. edit: changes the PTX, to plant a fault.
    """

    _devices = itertools.count()  # a number for each: Triton keeps loaded kernels by it

    def __init__(self, arch: int, edit: Callable[[str], str] = lambda ptx: ptx):
        self.arch, self.edit, self.device = arch, edit, next(self._devices)
        self.utils, self.launcher_cls = self, _Launcher

    def use(self) -> None:
        triton.runtime.driver.set_active(self)
        triton.knobs.runtime.kernel_load_start_hook = self._before_load

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": _SHARED_BYTES}

    def _before_load(self, module, function, name: str, files: dict[str, str], hash: str) -> None:
        self._ptx = Path(files[f"{name}.ptx"]).read_text()

    def load_binary(self, name: str, binary: bytes, shared: int, device: int):
        """(module, function, registers, spills, most threads of a block)"""
        return None, load(self.edit(self._ptx), name), 0, 0, 1024

    def unload_module(self, module) -> None:
        pass


class _Launcher:
    def __init__(self, source, metadata):
        self.types, self.metadata = list(source.signature.values()), metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise PtxError(f"{metadata.name}: scratch memory and clusters are not implemented")

    def __call__(self, x, y, z, stream, kernel: Kernel, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        memory = Memory()
        given = [a for a, type in zip(arguments, self.types, strict=True) if type != "constexpr"]
        values = [memory.pointer(a) if isinstance(a, Tensor) else a for a in given]
        values += [0] * (
            len(kernel.entry.parameters) - len(values)
        )  # pointers to scratch memory, of which there is none
        launch(kernel, memory, (x, y, z), (32 * self.metadata.num_warps,), values, self.metadata.shared)
