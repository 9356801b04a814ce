"""Branches, exits and the barrier of a block."""

from ..actions import Barrier, Branch, Compute, Exit
from ..formats import U32
from ..parse import Immediate, PtxError
from . import instruction


@instruction("bra[.uni]")
def bra(uni):
    return lambda kernel, label: Branch(kernel.label(label))


@instruction("ret[.uni]")
def ret(uni):
    return lambda kernel: Exit()


@instruction("exit")
def exit():
    return lambda kernel: Exit()


@instruction("bar[.cta].sync")
def bar(cta):
    return _block_barrier


@instruction("barrier[.cta].sync.aligned")
def barrier(cta):
    return _block_barrier


def _block_barrier(kernel, which, threads=None):
    if which != Immediate("0"):
        raise PtxError("only barrier 0 is implemented")
    return Barrier(kernel.source(threads, U32) if threads else None)


@instruction("griddepcontrol.{what}", what=("launch_dependents", "wait"))
def griddepcontrol(what):
    """Nothing to do: launches run one after the other here."""
    return lambda kernel: Compute(lambda warp, lanes: None)
