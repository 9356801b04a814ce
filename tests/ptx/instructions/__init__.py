"""The instructions that are implemented, as a table of patterns.

    @instruction("add[.{rounding}][.ftz].{type}", rounding=ROUNDINGS, type=("f32",))
    def add(rounding, ftz, type): ...

An opcode must match a pattern wholly, so no modifier is ever ignored: `[...]` is optional, `{name}` one of the choices
given by name, the same one wherever the name stands again. The function gets the choices (None where an optional one is
absent; a Type where the choice is one; True or None for a literal in brackets) and returns
`bind(kernel, *operands) -> Action`.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable

from ..actions import Action, Compute
from ..formats import TYPES, Type
from ..parse import PtxError

Bind = Callable[..., Action]

_table: dict[str, list[tuple[re.Pattern, Callable[..., Bind]]]] = defaultdict(list)


def instruction(pattern: str, **choices: tuple[str, ...]):
    regex = re.escape(pattern).replace(r"\[", "(?:").replace(r"\]", ")?").replace(r"\{", "{").replace(r"\}", "}")
    regex = re.sub(r"\(\?:\\\.(\w+)\)\?", r"(?P<\1>\\.\1)?", regex)  # a literal in brackets
    for name, values in choices.items():
        regex = regex.replace(f"{{{name}}}", f"(?P<{name}>{'|'.join(map(re.escape, values))})", 1)
        regex = regex.replace(f"{{{name}}}", f"(?P={name})")
    assert "{" not in regex, f"{pattern}: a choice without its values"

    def register(function):
        root = pattern.split(".")[0].split("[")[0]
        for name in choices[root.strip("{}")] if root.startswith("{") else (root,):
            _table[name].append((re.compile(regex), function))
        return function

    return register


@functools.cache
def find(opcode: str) -> Bind:
    for regex, function in _table[opcode.split(".")[0]]:
        if match := regex.fullmatch(opcode):
            return function(**{name: _choice(value) for name, value in match.groupdict().items()})
    raise PtxError(f"{opcode} is not implemented")


def _choice(text: str | None):
    if text is not None and text.startswith("."):
        return True
    return TYPES.get(text, text)


def compute(out: Type, sources: tuple[Type, ...], function: Callable, wider: bool = False) -> Bind:
    """An instruction that is a function of its operands, lane by lane. wider: registers may exceed their types."""

    def bind(kernel, destination, *operands):
        if len(operands) != len(sources):
            raise PtxError(f"{len(operands)} source operands where {len(sources)} belong")
        write = kernel.destination(destination, out, wider)
        reads = [kernel.source(operand, type, wider) for operand, type in zip(operands, sources, strict=True)]
        return Compute(lambda warp, lanes: write(warp, lanes, function(*[read(warp) for read in reads])))

    return bind


# Each fills its part of the table.
from . import arithmetic, bits, collectives, control, conversion, memory, tensor_core  # noqa: E402, F401
