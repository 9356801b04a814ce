"""A built module: its functions, the order of its threads, the kernels in it and those that ran."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
from functools import cached_property
from pathlib import Path

from . import build

ORDERS = ("forward", "reverse", "random")
COPIES = ("lazy", "eager")


def kernel_name(signature: str) -> str:
    """`void fastpeft::(anonymous namespace)::f_kernel<ns::T, true>(int)` -> `f_kernel<T, true>`."""
    name = signature.replace("(anonymous namespace)::", "")
    depth = 0
    for i, char in enumerate(name):  # the parameters begin at the first parenthesis outside <>
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\w+::", "", name)
    return re.sub(r"^.*? (?=\w+(<.*>)?$)", "", name)  # the return type, which templates have


class Emulation:
    """Loads the module at `path`. Several may be loaded in one process; each has its own settings and counts."""

    def __init__(self, path: Path | str):
        self.path = Path(path).resolve()
        # pybind11 answers with an earlier module of the same name; Python looks for PyInit_ + the last part of it.
        spec = importlib.util.spec_from_file_location(f"{self.path.parent.name}._cuda", self.path)
        try:
            self.module = importlib.util.module_from_spec(spec)
        except ImportError as error:
            if "__asan_" not in str(error):
                raise
            raise ImportError(
                f"{self.path} needs libasan: start the process with {build.asan_environment()} in its environment"
            ) from error
        spec.loader.exec_module(self.module)
        self._c = ctypes.CDLL(str(self.path))
        self._c.emulation_configure.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self._c.emulation_name.argtypes = [ctypes.c_size_t, ctypes.c_char_p]
        self._c.emulation_counter.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
        self._c.emulation_launched.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.POINTER(ctypes.c_uint64)]
        for function in (self._c.emulation_counter, self._c.emulation_launched):
            function.restype = ctypes.c_char_p
        for offset, name in self._symbols.items():
            self._c.emulation_name(offset, name.encode())

    @cached_property
    def _symbols(self) -> dict[int, str]:
        command = ["nm", "--demangle", "--defined-only", str(self.path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found = {}
        for line in lines:
            address, kind, signature = line.split(" ", 2)
            name = kernel_name(signature)
            is_part = "[clone" in signature or "{lambda" in signature
            if kind in "tTwWuV" and re.fullmatch(r"\w+_kernel(<.*>)?", name) and not is_part:
                found[int(address, 16)] = name
        return found

    @property
    def kernels(self) -> list[str]:
        """Every kernel instance in the module, as `nf4_dequantize_kernel<__nv_bfloat16, true>`."""
        return sorted(self._symbols.values())

    def configure(self, order: str = "forward", seed: int = 1, cp_async: str = "lazy", sms: int = 4) -> None:
        """The order of lanes, warps and blocks ("forward", "reverse", or "random" by `seed`); when a cp.async copies:
        as late as it may ("lazy") or at once ("eager"); how many SMs launchers find: few keep tests small."""
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; allowed are {', '.join(ORDERS)}")
        if cp_async not in COPIES:
            raise ValueError(f"cp_async is {cp_async!r}; allowed are {', '.join(COPIES)}")
        if sms < 1:
            raise ValueError(f"sms is {sms}; there has to be at least one")
        self._c.emulation_configure(ORDERS.index(order), seed, COPIES.index(cp_async), sms)

    def reset(self) -> None:
        """Sets the counts to zero."""
        self._c.emulation_reset()

    def executed(self) -> dict[str, int]:
        """Launches per kernel instance since the last reset."""
        return self._enumerate(lambda i, value: self._c.emulation_launched(i, False, value))

    def dynamic_shared_bytes(self) -> dict[str, int]:
        """The most that a launch of the kernel instance asked for since the last reset."""
        return self._enumerate(lambda i, value: self._c.emulation_launched(i, True, value))

    def counters(self) -> dict[str, int]:
        """Barriers, mma instructions, bank conflicts of ldmatrix and more (engine/state.h) since the last reset."""
        return self._enumerate(self._c.emulation_counter)

    @staticmethod
    def _enumerate(function) -> dict[str, int]:
        found, value = {}, ctypes.c_uint64()
        while (name := function(len(found), ctypes.byref(value))) is not None:
            found[name.decode()] = value.value
        return found
