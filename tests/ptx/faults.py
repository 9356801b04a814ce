"""Faults to plant in PTX: each is a function from right text to wrong text."""

from __future__ import annotations

import re
from collections.abc import Callable

Fault = Callable[[str], str]


def registers_swapped(opcode: str, vector: int, i: int, j: int) -> Fault:
    """In every instruction that begins with `opcode`, two registers of its vector-th operand."""

    def swap(match: re.Match) -> str:
        registers = match[2].split(",")
        registers[i], registers[j] = registers[j], registers[i]
        return f"{match[1]}{{{','.join(registers)}}}"

    braces = r"\{([^}]*)\}"
    return replaced(rf"(\n\s*{opcode}\.[^;{{]*(?:\{{[^}}]*\}}[^;{{]*){{{vector}}}){braces}", swap)


def replaced(pattern: str, by: str | Callable) -> Fault:
    return lambda ptx: re.sub(pattern, by, ptx)


def waits_off_by_one(ptx: str) -> str:
    return re.sub(r"(?<=cp\.async\.wait_group )\d+", lambda groups: str(int(groups[0]) + 1), ptx)
