"""Instructions by which the lanes of a warp talk to one another."""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy import ndarray

from ..actions import LANE_NUMBERS, Compute
from ..formats import LANES, PRED, TYPES, U32, canonical
from ..memory import Fault
from ..parse import Pair, Symbol
from . import instruction
from .arithmetic import minimum_or_maximum

_BITS = np.uint32(1) << LANE_NUMBERS.astype(np.uint32)


def members(read_mask):
    """The lanes of a member mask. Every lane that executes must be in its own."""

    def team(warp, lanes: ndarray) -> ndarray:
        masks = read_mask(warp)
        stray = lanes & (masks & _BITS == 0)
        if stray.any():
            row = int(np.flatnonzero(np.flatnonzero(lanes) == np.argmax(stray))[0])
            raise Fault(f"the member mask {int(masks[np.argmax(stray)]):#010x} lacks the lane that executes", row)
        return np.bitwise_or.reduce(masks[lanes]) & _BITS != 0

    return team


@instruction("shfl.sync.{mode}.b32", mode=("up", "down", "bfly", "idx"))
def shfl(mode):
    def bind(kernel, destination, source, distance, clamp, member_mask):
        pair = destination if isinstance(destination, Pair) else Pair(destination, Symbol("_"))
        write, write_valid = kernel.destination(pair.first, U32), kernel.destination(pair.second, PRED)
        read, read_distance, read_clamp = (kernel.source(o, U32) for o in (source, distance, clamp))

        def run(warp, lanes):
            b, c = (read_(warp).astype(np.int64) & 0x1F1F for read_ in (read_distance, read_clamp))
            b, clamp_lane, segment = b & 31, c & 31, c >> 8
            last = LANE_NUMBERS & segment | clamp_lane & ~segment
            lane = {
                "up": LANE_NUMBERS - b,
                "down": LANE_NUMBERS + b,
                "bfly": LANE_NUMBERS ^ b,
                "idx": LANE_NUMBERS & segment | b & ~segment,
            }[mode]
            valid = lane >= last if mode == "up" else lane <= last
            lane = np.where(valid, lane, LANE_NUMBERS)
            # What a lane that does not take part would give is undefined.
            value = np.where(lanes[lane], read(warp)[lane], np.uint32(0xFFFFFFFF))
            write(warp, lanes, value)
            write_valid(warp, lanes, valid)

        return Compute(run, members(kernel.source(member_mask, U32)))

    return bind


@instruction("vote.sync.{mode}.{type}", mode=("all", "any", "uni"), type=("pred",))
@instruction("vote.sync.{mode}.{type}", mode=("ballot",), type=("b32",))
def vote(mode, type):
    def bind(kernel, destination, source, member_mask):
        write, read = kernel.destination(destination, type), kernel.source(source, PRED)

        def run(warp, lanes):
            votes = read(warp)
            result = {
                "all": votes[lanes].all(),
                "any": votes[lanes].any(),
                "uni": votes[lanes].all() or not votes[lanes].any(),
                "ballot": np.bitwise_or.reduce(_BITS[votes & lanes], initial=np.uint32(0)),
            }[mode]
            write(warp, lanes, np.full(LANES, result, type.dtype))

        return Compute(run, members(kernel.source(member_mask, U32)))

    return bind


@instruction("redux.sync.{op}.{type}", op=("add", "min", "max"), type=("u32", "s32"))
@instruction("redux.sync.{op}.{type}", op=("and", "or", "xor"), type=("b32",))
def redux(op, type):
    function = {
        **{"add": np.add, "min": np.minimum, "max": np.maximum},
        **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    }[op]

    def bind(kernel, destination, source, member_mask):
        write, read = kernel.destination(destination, type), kernel.source(source, type)

        def run(warp, lanes):
            write(warp, lanes, np.full(LANES, reduce(function, read(warp)[lanes]), type.dtype))

        return Compute(run, members(kernel.source(member_mask, U32)))

    return bind


@instruction("redux.sync.{op}[.NaN].{type}", op=("min", "max"), type=("f32",))
def redux_float(op, NaN, type):
    """sm_100 and its kin only."""
    function = minimum_or_maximum(op, bool(NaN))

    def bind(kernel, destination, source, member_mask):
        write, read = kernel.destination(destination, type), kernel.source(source, type)

        def run(warp, lanes):
            result = canonical(function(*read(warp)[lanes][:, None]), type)
            write(warp, lanes, np.repeat(result, LANES))

        return Compute(run, members(kernel.source(member_mask, U32)))

    return bind


@instruction("activemask.b32")
def activemask():
    def bind(kernel, destination):
        write = kernel.destination(destination, TYPES["b32"])
        return Compute(lambda warp, lanes: write(warp, lanes, np.full(LANES, np.bitwise_or.reduce(_BITS[lanes]))))

    return bind


@instruction("bar.warp.sync")
def bar_warp():
    def bind(kernel, member_mask):
        """A mask of a part of the warp counts as a barrier of the whole warp."""
        run = lambda warp, lanes: warp.spaces.shared.synchronize_warp(warp.number)  # noqa: E731
        return Compute(run, members(kernel.source(member_mask, U32)))

    return bind
