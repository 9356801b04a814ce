"""The memory that kernels see: every access is checked for bounds and alignment.

A generic address tells its space by its highest bits, and buffer k of global memory begins behind k << 40, so that no
overrun of one reaches another. Memory without a value holds ones: a NaN in every floating format, a huge index.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .parse import PtxError, Variable

_WINDOW_BITS = 60
SHARED_WINDOW, LOCAL_WINDOW, CONST_WINDOW, GLOBALS_WINDOW = (i << _WINDOW_BITS for i in range(1, 5))
_BUFFER_BITS = 40
_GAP = 64  # bytes that belong to nobody after each variable
_FIRST = 1024  # bytes before the first variable, so that null is wild in every space and what comes before a buffer too


class Fault(PtxError):
    """A wrong access by the `row`-th of the threads that took part in it."""

    def __init__(self, what: str, row: int):
        super().__init__(what)
        self.row = row


@dataclass(frozen=True)
class Threads:
    """Who accesses: threads of one block, by number, all of one warp."""

    warp: int
    numbers: ndarray

    @property
    def lanes(self) -> ndarray:
        return self.numbers % 32


class Layout:
    """Variables in a row, each with a gap behind it; an extern array comes last and takes what the launch gives it."""

    def __init__(self, variables: list[Variable]):
        self.address: dict[str, int] = {}
        self.spans: list[tuple[int, bytes, int]] = []  # begin, initial value, size
        self.extern: int | None = None
        end = _FIRST
        for variable in sorted(variables, key=lambda v: v.size == 0):
            begin = -(-end // variable.align) * variable.align
            self.address[variable.name] = begin
            if variable.size:
                self.spans.append((begin, variable.initial, variable.size))
                end = begin + variable.size + _GAP
            else:
                self.extern = begin
                end = begin
        self.end = end


class Bytes:
    """A span of memory in which some bytes belong to variables and the rest to nobody."""

    def __init__(self, layout: Layout, extern_bytes: int = 0, fill: int = 0xFF):
        if extern_bytes and layout.extern is None:
            raise PtxError(f"launched with {extern_bytes} bytes of dynamic shared memory, but the kernel declares none")
        spans = layout.spans + ([(layout.extern, b"", extern_bytes)] if layout.extern is not None else [])
        size = layout.end + extern_bytes
        self.data = np.full(size, fill, np.uint8)
        self.owned = np.zeros(size, bool)
        for begin, initial, length in spans:
            self.owned[begin : begin + length] = True
            self.data[begin : begin + len(initial)] = np.frombuffer(initial, np.uint8)

    def index(self, addresses: ndarray, size: int, what: str) -> ndarray:
        """[threads, size] positions of the bytes in self.data; the addresses are uint64."""
        inside = addresses < np.uint64(len(self.data) - size + 1)
        index = np.where(inside, addresses, np.uint64(0)).astype(np.int64)[:, None] + np.arange(size)
        inside = inside & self.owned[index].all(1)
        if not inside.all():
            row = int(np.argmin(inside))
            raise Fault(f"{size} bytes at {what} address {int(addresses[row]):#x} belong to no variable", row)
        return index

    def load(self, addresses: ndarray, size: int, threads: Threads) -> ndarray:
        return self.data[self.index(addresses, size, "constant")]

    def store(self, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        raise Fault("store to constant memory", 0)


class Globals(Bytes):
    """Module-level .global variables."""

    def store(self, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        self.data[self.index(addresses, values.shape[1], "global")] = values

    def update(self, addresses: ndarray, size: int, function) -> None:
        index = self.index(addresses, size, "global")
        self.data[index] = function(self.data[index])


class Local(Bytes):
    """A copy of the local variables for each thread of a warp."""

    def __init__(self, layout: Layout):
        super().__init__(layout)
        self.copies = np.tile(self.data, (32, 1))  # [lanes, bytes]

    def load(self, addresses: ndarray, size: int, threads: Threads) -> ndarray:
        index = self.index(addresses, size, "local")
        return self.copies[threads.lanes[:, None], index]

    def store(self, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        index = self.index(addresses, values.shape[1], "local")
        self.copies[threads.lanes[:, None], index] = values


@dataclass
class _Buffer:
    base: int
    data: ndarray  # uint8
    owner: object  # keeps the memory alive


class Memory:
    """Global memory: the tensors and arrays that a launch may touch, each a buffer of its own, used in place."""

    def __init__(self):
        self.buffers: list[_Buffer] = []

    def pointer(self, array) -> int:
        """The device address of a torch tensor or numpy array of any dtype and strides; 0 for None.

        Only the bytes from its first to its last element may be touched. The address is as aligned as the real one, up
        to 256 bytes. A tensor that is given twice is two buffers over the same memory.
        """
        if array is None:
            return 0
        if isinstance(array, ndarray):
            address, itemsize, strides = array.ctypes.data, array.itemsize, array.strides
        else:
            address, itemsize = array.data_ptr(), array.element_size()
            strides = [step * itemsize for step in array.stride()]
        size = itemsize + sum((n - 1) * step for n, step in zip(array.shape, strides, strict=True))
        size = 0 if 0 in array.shape else size
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8) if size else np.zeros(0, np.uint8)
        base = (len(self.buffers) + 1 << _BUFFER_BITS) + _FIRST + address % 256
        self.buffers.append(_Buffer(base, data, array))
        return base

    def parts(self, addresses: ndarray, size: int):
        """(buffer, rows, [rows, size] positions) for each buffer that is touched."""
        numbers = addresses >> np.uint64(_BUFFER_BITS)
        for number in np.unique(numbers):
            rows = np.flatnonzero(numbers == number)
            if not 1 <= number <= len(self.buffers):
                raise Fault(
                    f"{size} bytes at global address {int(addresses[rows[0]]):#x}, which is in no buffer", rows[0]
                )
            buffer = self.buffers[int(number) - 1]
            offsets = addresses[rows].astype(np.int64) - buffer.base
            bad = (offsets < 0) | (offsets + size > len(buffer.data))
            if bad.any():
                row = int(np.argmax(bad))
                raise Fault(
                    f"{size} bytes at offset {offsets[row]} of a buffer of {len(buffer.data)} bytes (buffer {number})",
                    int(rows[row]),
                )
            yield buffer, rows, offsets[:, None] + np.arange(size)

    def load(self, addresses: ndarray, size: int, threads: Threads) -> ndarray:
        values = np.empty((len(addresses), size), np.uint8)
        for buffer, rows, index in self.parts(addresses, size):
            values[rows] = buffer.data[index]
        return values

    def store(self, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        for buffer, rows, index in self.parts(addresses, values.shape[1]):
            buffer.data[index] = values[rows]

    def update(self, addresses: ndarray, size: int, function) -> None:
        for buffer, _, index in self.parts(addresses, size):
            buffer.data[index] = function(buffer.data[index])


class Spaces:
    """What one warp sees, by the name of the state space in an instruction; None is a generic address."""

    def __init__(self, memory: Memory, shared: Bytes, local: Local, constants: Bytes, globals: Globals, params: Bytes):
        self.shared = shared
        self.by_name = {"shared": shared, "local": local, "const": constants, "param": params}
        self.windows = {0: memory, 1: shared, 2: local, 3: constants, 4: globals}

    @staticmethod
    def aligned(addresses: ndarray, size: int) -> ndarray:
        misaligned = addresses % np.uint64(size) != 0
        if misaligned.any():
            row = int(np.argmax(misaligned))
            raise Fault(f"misaligned: {size} bytes at address {int(addresses[row]):#x}", row)
        return addresses

    def each(self, space: str | None, addresses: ndarray, access: Callable) -> None:
        """access(memory, rows, addresses within the memory) for each memory that is touched."""
        if space in self.by_name:
            access(self.by_name[space], slice(None), addresses)
            return
        windows = addresses >> np.uint64(_WINDOW_BITS)
        for window in np.unique(windows):
            rows = np.flatnonzero(windows == window)
            memory = self.windows.get(int(window))
            if memory is None or (space == "global" and window not in (0, 4)):
                raise Fault(f"address {int(addresses[rows[0]]):#x} is not {space or 'generic'}", int(rows[0]))
            try:
                access(memory, rows, addresses[rows] & np.uint64((1 << _WINDOW_BITS) - 1))
            except Fault as fault:
                raise Fault(str(fault), int(rows[fault.row])) from None

    def load(self, space: str | None, addresses: ndarray, size: int, threads: Threads) -> ndarray:
        """[threads, size] bytes"""
        return self.load_unaligned(space, self.aligned(addresses, size), size, threads)

    def load_unaligned(self, space: str | None, addresses: ndarray, size: int, threads: Threads) -> ndarray:
        values = np.empty((len(addresses), size), np.uint8)

        def access(memory, rows, inside) -> None:
            values[rows] = memory.load(inside, size, Threads(threads.warp, threads.numbers[rows]))

        self.each(space, addresses, access)
        return values

    def store(self, space: str | None, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        def access(memory, rows, inside) -> None:
            memory.store(inside, values[rows], Threads(threads.warp, threads.numbers[rows]))

        self.each(space, self.aligned(addresses, values.shape[1]), access)

    def update(self, space: str | None, addresses: ndarray, size: int, function: Callable) -> None:
        """An atomic read-modify-write by one thread: function([1, size] bytes) -> [1, size] bytes."""
        self.each(space, self.aligned(addresses, size), lambda memory, _, inside: memory.update(inside, size, function))
