"""Shared memory, with a check for races, and the asynchronous copies into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .memory import Bytes, Fault, Layout, Spaces, Threads


class Shared(Bytes):
    """The shared memory of a block. It raises where the value of an access depends on who comes first:

    - two threads touch a byte, one of them writes, and no bar.sync lies between the accesses; within a warp a
      bar.warp.sync is enough. Two writes of the same value are let pass: compilers do that.
    - anyone touches a byte that a cp.async in flight will still write.
    """

    _SEVERAL, _ANY_WARP = 1 << 20, 1 << 30  # readers: several threads of warp (n - _SEVERAL); of several warps

    def __init__(self, layout: Layout, extern_bytes: int, warps: int):
        super().__init__(layout, extern_bytes)
        size = len(self.data)
        self.clock = 1  # counts barriers
        self.block_synced, self.warp_synced = 1, np.ones(warps, np.int32)
        self.writer, self.write_time = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.reader, self.read_time = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.in_flight = np.zeros(size, bool)

    def synchronize_block(self) -> None:
        self.clock += 1
        self.block_synced = self.clock
        self.warp_synced[:] = self.clock

    def synchronize_warp(self, warp: int) -> None:
        self.clock += 1
        self.warp_synced[warp] = self.clock

    def load(self, addresses: ndarray, size: int, threads: Threads) -> ndarray:
        index = self.index(addresses, size, "shared")
        self.refuse_in_flight(index, "read")
        thread = threads.numbers[:, None]
        self.refuse_race(index, thread, self.writer[index], self.write_time[index], threads.warp, "read", "wrote")
        # Whoever read since the last barrier is remembered exactly if it was one thread, else as a group.
        old, several = self.reader[index], self._SEVERAL + threads.warp
        fresh_block = self.read_time[index] >= self.block_synced
        fresh_warp = self.read_time[index] >= self.warp_synced[threads.warp]
        same_warp = (old == several) | (old // 32 == threads.warp)
        alone = np.where(
            fresh_block & ~same_warp, self._ANY_WARP, np.where(fresh_warp & (old != thread), several, thread)
        )
        self.reader[index] = alone
        shared_now = self.reader[index] != alone  # lanes of this very access that read the same byte
        if shared_now.any():
            self.reader[index[shared_now]] = np.where(alone[shared_now] == self._ANY_WARP, self._ANY_WARP, several)
        self.read_time[index] = self.clock
        return self.data[index]

    def store(self, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        index = self.index(addresses, values.shape[1], "shared")
        self.refuse_in_flight(index, "written")
        self.write(index, values, threads)

    def write(self, index: ndarray, values: ndarray, threads: Threads) -> None:
        thread = threads.numbers[:, None]
        self.refuse_race(index, thread, self.reader[index], self.read_time[index], threads.warp, "wrote", "read")
        changes = self.data[index] != values
        written = np.where(changes, self.writer[index], thread)  # an equal value is no conflict
        self.refuse_race(index, thread, written, self.write_time[index], threads.warp, "wrote", "wrote")
        self.data[index] = values
        if (self.data[index] != values).any():
            row = int(np.argmax((self.data[index] != values).any(1)))
            raise Fault("two threads of a warp write different values to one shared address at once", row)
        self.writer[index] = thread
        self.write_time[index] = self.clock

    def update(self, addresses: ndarray, size: int, function) -> None:
        """A read-modify-write. Atomic accesses race with nothing here."""
        index = self.index(addresses, size, "shared")
        self.refuse_in_flight(index, "updated")
        self.data[index] = function(self.data[index])

    def begin_copy(self, addresses: ndarray, size: int, threads: Threads) -> None:
        """cp.async: from now until `end_copy` the bytes have no value and must not be touched."""
        index = self.index(addresses, size, "shared")
        self.refuse_in_flight(index, "written by another cp.async")
        self.write(index, np.full(index.shape, 0xFF, np.uint8), threads)
        self.in_flight[index] = True

    def end_copy(self, addresses: ndarray, values: ndarray, threads: Threads) -> None:
        index = self.index(addresses, values.shape[1], "shared")
        self.in_flight[index] = False
        self.write(index, values, threads)

    def refuse_in_flight(self, index: ndarray, how: str) -> None:
        busy = self.in_flight[index]
        if busy.any():
            raise Fault(f"shared memory {how} while a cp.async into it is in flight", int(np.argmax(busy.any(1))))

    def refuse_race(self, index, thread, other, time, warp: int, does: str, did: str) -> None:
        same_warp = (other // 32 == warp) | (other == self._SEVERAL + warp)
        synced = np.where(same_warp, self.warp_synced[warp], self.block_synced)
        race = (time >= synced) & (other != thread)
        if race.any():
            row, column = np.argwhere(race)[0]
            who, address = int(other[row, column]), int(index[row, column])
            whom = (
                f"thread {who}" if who < self._SEVERAL else "several threads" if who == self._ANY_WARP else "its warp"
            )
            raise Fault(
                f"race: the thread {does} shared address {address:#x}, {whom} {did} it; no barrier between", row
            )


@dataclass
class _Copy:
    lanes: ndarray  # bool: whose copy is not complete
    group: ndarray  # how many groups a lane had committed before: the number of the group that the copy is in
    target: ndarray
    source: ndarray
    size: int
    source_sizes: ndarray  # bytes that are read; zeros fill the rest


class AsyncCopies:
    """The cp.async of a warp. They happen as late as allowed: at the wait that needs them."""

    def __init__(self):
        self.committed = np.zeros(32, np.int64)  # groups, by lane
        self.copies: list[_Copy] = []

    def begin(self, spaces: Spaces, lanes, threads: Threads, target, source, size: int, source_sizes) -> None:
        rows = threads.lanes
        copy = _Copy(lanes.copy(), self.committed.copy(), target, source, size, source_sizes)
        self.read(spaces, copy, rows)  # faults belong to this instruction, not to the wait
        spaces.shared.begin_copy(spaces.aligned(target[rows], size), size, threads)
        self.copies.append(copy)

    def read(self, spaces: Spaces, copy: _Copy, rows: ndarray) -> ndarray:
        values = np.zeros((len(rows), copy.size), np.uint8)
        for size in set(copy.source_sizes[rows].tolist()) - {0}:
            if size > copy.size:
                raise Fault(f"cp.async reads {size} bytes to write {copy.size}", 0)
            some = np.flatnonzero(copy.source_sizes[rows] == size)
            addresses = spaces.aligned(copy.source[rows][some], copy.size)
            values[some, :size] = spaces.load_unaligned("global", addresses, size, Threads(0, rows[some]))
        return values

    def commit(self, lanes: ndarray) -> None:
        self.committed[lanes] += 1

    def wait(self, spaces: Spaces, lanes: ndarray, threads: Threads, keep: int) -> None:
        """Completes all but the last `keep` groups of each lane; keep = -1: also what is in no group yet."""
        first = threads.numbers[0] - threads.lanes[0]
        for copy in self.copies:
            rows = np.flatnonzero(lanes & copy.lanes & (copy.group < self.committed - keep))
            if len(rows):
                values = self.read(spaces, copy, rows)
                spaces.shared.end_copy(copy.target[rows], values, Threads(threads.warp, first + rows))
                copy.lanes[rows] = False
        self.copies = [copy for copy in self.copies if copy.lanes.any()]
