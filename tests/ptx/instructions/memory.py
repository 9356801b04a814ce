"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ..actions import Compute
from ..formats import U32, Type
from ..parse import Immediate, PtxError, integer
from . import instruction

SPACES = ("global", "shared::cta", "shared", "local", "const", "param")
TYPED = (*(f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)), "f32", "f64")
SCOPES = ("cta", "cluster", "gpu", "sys")
# Hints for the caches: they change no value.
CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
L1 = tuple(f"L1::{how}" for how in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate"))
L2 = tuple(f"L2::{how}" for how in ("evict_normal", "evict_first", "evict_last"))
PREFETCH = tuple(f"L2::{size}B" for size in (64, 128, 256))


def _space(name: str | None) -> str | None:
    return name and name.split(":")[0]


_LOAD = "[.{space}][.{cache}][.nc][.{l1}][.{l2}][.{hint}][.{prefetch}][.{vector}].{type}"
_CHOICES = {
    "space": SPACES,
    "cache": CACHE,
    "l1": L1,
    "l2": L2,
    "hint": ("L2::cache_hint",),
    "vector": ("v2", "v4", "v8"),
    "type": TYPED,
}


@instruction(
    "ld[.{order}][.{scope}]" + _LOAD, order=("weak", "relaxed", "acquire"), scope=SCOPES, prefetch=PREFETCH, **_CHOICES
)
@instruction("ld.volatile" + _LOAD, prefetch=PREFETCH, **_CHOICES)
def ld(space, vector, type, hint, **hints):
    def bind(kernel, destination, address, *policy):
        targets = kernel.elements(destination)
        _check_operands(targets, vector, policy, hint)
        writes = [kernel.destination(target, type, wider=True) for target in targets]
        read_address, size, where = kernel.address(address), len(writes) * type.bits // 8, _space(space)

        def run(warp, lanes):
            rows, threads = warp.active(lanes)
            values = np.empty((len(lanes), size), np.uint8)
            values[rows] = warp.spaces.load(where, read_address(warp)[rows], size, threads)
            values = values.view(type.dtype)
            for i, write in enumerate(writes):
                write(warp, lanes, values[:, i].copy())

        return Compute(run)

    return bind


_STORE = "[.{space}][.{cache}][.{l1}][.{l2}][.{hint}][.{vector}].{type}"


@instruction("st[.{order}][.{scope}]" + _STORE, order=("weak", "relaxed", "release"), scope=SCOPES, **_CHOICES)
@instruction("st.volatile" + _STORE, **_CHOICES)
def st(space, vector, type, hint, **hints):
    def bind(kernel, address, source, *policy):
        elements = kernel.elements(source)
        _check_operands(elements, vector, policy, hint)
        reads = [kernel.source(element, type, wider=True) for element in elements]
        read_address, where = kernel.address(address), _space(space)

        def run(warp, lanes):
            rows, threads = warp.active(lanes)
            values = np.stack([read(warp)[rows] for read in reads], 1).view(np.uint8)
            warp.spaces.store(where, read_address(warp)[rows], values, threads)

        return Compute(run)

    return bind


def _check_operands(elements: list, vector: str | None, policy: tuple, hint) -> None:
    if len(elements) != int(vector[1:] if vector else 1):
        raise PtxError(f"{len(elements)} registers for .{vector or 'a scalar'}")
    if len(policy) != (hint is not None):
        raise PtxError("a cache policy goes with .L2::cache_hint")


_UPDATES = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: new if old == compare else old,
}
_ATOMIC = "[.{order}][.{scope}][.{space}].{op}.{type}"
_ATOMICS = {
    "order": ("relaxed", "acquire", "release", "acq_rel"),
    "scope": SCOPES,
    "space": ("global", "shared::cta", "shared"),
}


@instruction("atom" + _ATOMIC, op=("add", "min", "max"), type=("u32", "s32", "u64", "s64"), **_ATOMICS)
@instruction("atom" + _ATOMIC, op=("add",), type=("f32",), **_ATOMICS)
@instruction("atom" + _ATOMIC, op=("and", "or", "xor", "exch", "cas"), type=("b32", "b64"), **_ATOMICS)
def atom(order, scope, space, op, type):
    def bind(kernel, destination, address, *operands):
        write = kernel.destination(destination, type)
        update = _atomic(kernel, space, op, type, address, operands)
        return Compute(lambda warp, lanes: write(warp, lanes, update(warp, lanes)))

    return bind


@instruction("red" + _ATOMIC, op=("add", "min", "max"), type=("u32", "s32", "u64", "s64"), **_ATOMICS)
@instruction("red" + _ATOMIC, op=("add",), type=("f32",), **_ATOMICS)
@instruction("red" + _ATOMIC, op=("and", "or", "xor"), type=("b32", "b64"), **_ATOMICS)
def red(order, scope, space, op, type):
    return lambda kernel, address, *operands: Compute(_atomic(kernel, space, op, type, address, operands))


def _atomic(kernel, space: str | None, op: str, type: Type, address, operands: tuple):
    if len(operands) != 1 + (op == "cas"):
        raise PtxError(f"{len(operands)} operands of an atomic {op}")
    read_address, reads = kernel.address(address), [kernel.source(operand, type) for operand in operands]

    def run(warp, lanes) -> ndarray:
        """Lane by lane; returns what was there before."""
        addresses, values = read_address(warp), [read(warp) for read in reads]
        before = np.zeros(len(lanes), type.dtype)
        for lane in np.flatnonzero(lanes):

            def updated(data: ndarray, lane=lane) -> ndarray:
                before[lane] = data.view(type.dtype)[0, 0]
                after = _UPDATES[op](before[lane], *(value[lane] for value in values))
                return np.array([[after]], type.dtype).view(np.uint8)

            warp.spaces.update(_space(space), addresses[lane : lane + 1], type.bits // 8, updated)
        return before

    return run


@instruction("membar.{scope}", scope=("cta", "gl", "sys"))
@instruction("fence[.{kind}].{scope}", kind=("sc", "acq_rel"), scope=SCOPES)
def fence(scope, kind=None):
    """Nothing to do: a store is seen by everybody at once here."""
    return lambda kernel: Compute(lambda warp, lanes: None)


@instruction("prefetch.global.{cache}", cache=("L1", "L2"))
def prefetch(cache):
    """Nothing to do; an address out of bounds is ignored on a GPU, too."""

    def bind(kernel, address):
        kernel.address(address)
        return Compute(lambda warp, lanes: None)

    return bind


# ---- asynchronous copies


@instruction("cp.async.{cache}.{space}.global[.{prefetch}]", cache=("ca", "cg"), space=SPACES[1:3], prefetch=PREFETCH)
def cp_async(cache, space, prefetch):
    """Of `size` bytes, the first source_size are read and the others are zeros."""

    def bind(kernel, target, source, size, source_size=None):
        allowed = (16,) if cache == "cg" else (4, 8, 16)
        if not isinstance(size, Immediate) or integer(size.text) not in allowed:
            raise PtxError(f"cp.async.{cache} copies one of {allowed} bytes, not {size}")
        read_target, read_source = kernel.address(target), kernel.address(source)
        read_size, size = kernel.source(source_size or size, U32), integer(size.text)

        def run(warp, lanes):
            _, threads = warp.active(lanes)
            copy = read_target(warp), read_source(warp), size, read_size(warp).astype(np.int64)
            warp.copies.begin(warp.spaces, lanes, threads, *copy)

        return Compute(run)

    return bind


@instruction("cp.async.commit_group")
def cp_async_commit():
    return lambda kernel: Compute(lambda warp, lanes: warp.copies.commit(lanes))


@instruction("cp.async.wait_group")
def cp_async_wait():
    def bind(kernel, keep):
        if not isinstance(keep, Immediate):
            raise PtxError("cp.async.wait_group takes a constant")
        return _wait(integer(keep.text))

    return bind


@instruction("cp.async.wait_all")
def cp_async_wait_all():
    return lambda kernel: _wait(-1)


def _wait(keep: int) -> Compute:
    def run(warp, lanes):
        _, threads = warp.active(lanes)
        warp.copies.wait(warp.spaces, lanes, threads, keep)

    return Compute(run)
