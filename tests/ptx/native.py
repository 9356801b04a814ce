"""The launchers of csrc/ as they are, but what they launch is interpreted, from the PTX of one architecture."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pybind11

from .kernel import Kernel
from .machine import launch
from .memory import Memory
from .nvcc import CSRC, SETUP, cached, nvcc_version, ptx_of, run_compiler
from .parse import Entry, Module, PtxError, demangled, parse

_WRAPPED = (
    "cudaLaunchKernelExC",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaDeviceGetAttribute",
    "__cudaRegisterFunction",
)
_OnLaunch = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


def build(csrc: Path = CSRC) -> Path:
    """fastpeft._cuda whose launches go to launches.cpp."""
    sources = [*sorted(csrc.glob("*.cu")), csrc / "bindings.cpp", Path(__file__).with_name("launches.cpp")]
    # Its own device code is never used, so it is made as fast as can be: for one architecture, not optimized (-G).
    flags = ["-std=c++17", "-O0", "-G", "-gencode=arch=compute_80,code=compute_80", "-shared", "-cudart=static"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-Xlinker=--wrap={name}" for name in _WRAPPED)]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", '-DFASTPEFT_CUDA_ARCHS="80"']
    headers = sorted(csrc.glob("*.*h"))
    key = [*flags, nvcc_version(), *(f"{path.name}\n{path.read_text()}" for path in (*sources, *headers))]

    def compile(folder: Path) -> None:
        run_compiler([SETUP["find_nvcc"](), *flags, f"-I{csrc}", *sources, "-o", folder / "out"])

    return cached("_cuda.so", key, compile)


@functools.cache
def _load() -> tuple[ModuleType, ctypes.CDLL]:
    path = build()
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


class Native:
    """csrc/ on one architecture, such as "90a".

    `cuda` is the module of csrc/bindings.cpp, for its types: a launch outside of `run` is an error.
    """

    def __init__(self, arch: str, files: str = "*.cu", edit: Callable[[str], str] = lambda ptx: ptx):
        """files: those whose kernels are wanted; the others are not compiled. edit: changes the PTX of each, to plant a
        fault."""
        self.arch, self.files, self.edit = arch, files, edit
        self.cuda, self._library = _load()
        self._kernels: dict[str, Kernel] = {}

    @functools.cached_property
    def _entries(self) -> dict[str, tuple[Module, Entry]]:
        """By demangled name: nvcc names an anonymous namespace differently in each compilation."""
        modules = [parse(self.edit(ptx_of(source, self.arch))) for source in sorted(CSRC.glob(self.files))]
        return {entry.name: (module, entry) for module in modules for entry in module.entries}

    def kernels(self) -> set[str]:
        """Every kernel instance of the files, like `nf4_dequantize_kernel<float, false>`."""
        return set(map(_unqualified, self._entries))

    def _kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = Kernel(*self._entries[name])
        return self._kernels[name]

    def run(self, memory: Memory, operation: str, **arguments) -> list[str]:
        """Calls cuda.<operation>, then executes what it launched, in order. Addresses among the arguments are those of
        `memory`. Returns the names of the kernels."""
        launches, failures = [], []

        def on_launch(symbol, grid, block, dynamic_shared, values):
            try:  # an exception cannot pass through C++
                kernel = self._kernel(*demangled([symbol.decode()]))
                sizes = [parameter.size for parameter in kernel.entry.parameters]
                copies = [ctypes.string_at(values[i], size) for i, size in enumerate(sizes)]
                launches.append((kernel, tuple(grid[0]), tuple(block[0]), copies, dynamic_shared))
            except Exception as error:
                failures.append(error)

        callback = _OnLaunch(on_launch)
        self._library.set_on_launch(callback)
        try:
            getattr(self.cuda, operation)(**arguments, stream=0)
        finally:
            self._library.set_on_launch(_OnLaunch())
        if failures:
            raise PtxError(f"{operation}: {failures[0]}") from failures[0]
        for kernel, grid, block, copies, dynamic_shared in launches:
            launch(kernel, memory, grid, block, copies, dynamic_shared)
        return [_unqualified(kernel.entry.name) for kernel, *_ in launches]


def _unqualified(name: str) -> str:
    return re.sub(r"\(anonymous namespace\)::|\w+::", "", name)
