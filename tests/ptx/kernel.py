"""A kernel, decoded: each instruction bound to its operands."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from . import instructions
from .actions import ALL, Action, Exit, Read, Write
from .formats import LANES, PRED, U32, U64, Type, unsigned
from .memory import GLOBALS_WINDOW, Layout
from .parse import Address, Entry, Immediate, Instruction, Module, Operand, PtxError, Register, Symbol, Vector, integer

SPECIAL_REGISTERS = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *(f"%{name}" for name in ("laneid", "warpid", "nwarpid")),
    *(f"%lanemask_{which}" for which in ("eq", "le", "lt", "ge", "gt")),
)


@dataclass(frozen=True)
class Step:
    action: Action
    guard: Read | None
    source: Instruction


class Kernel:
    """Raises PtxError if the entry holds anything that is not implemented."""

    def __init__(self, module: Module, entry: Entry):
        self.entry, body = entry, entry.parse_body()
        self.layouts = {
            "param": Layout(entry.parameters),
            "shared": Layout(body.shared + module.shared),
            "local": Layout(body.local),
            "const": Layout(module.constants),
            "global": Layout(module.globals),
        }
        self.bits = list(body.registers.values())
        self.numbers = {name: i for i, name in enumerate(body.registers)}
        self.labels = body.labels
        self.special_registers: set[str] = set()  # that it reads
        self.steps = [self.decode(instruction) for instruction in body.instructions]
        # Labels may stand behind the last instruction, and a body need not end in one that leaves.
        self.steps.append(Step(Exit(), None, Instruction("exit", [], None, "end of the kernel", 0, None)))

    def decode(self, instruction: Instruction) -> Step:
        try:
            bind = instructions.find(instruction.opcode)
            guard = self.source(instruction.guard, PRED) if instruction.guard else None
            return Step(bind(self, *instruction.operands), guard, instruction)
        except PtxError as error:
            raise PtxError(f"{error}: {instruction}") from None
        except TypeError as error:  # of bind: too few or too many operands
            raise PtxError(f"operands not understood ({error}): {instruction}") from None

    # Operands become functions. Sizes must agree; `wider` allows a register with more bits than an integer type, as
    # loads, stores and cvt do.

    def register(self, operand: Register, type: Type, wider: bool) -> tuple[int, int]:
        number = self.numbers[operand.name]
        bits = self.bits[number]
        if bits != type.bits and not (wider and bits > type.bits and type.kind in "bus"):
            raise PtxError(f"register {operand.name} has {bits} bits, the instruction wants {type.bits} (.{type.name})")
        return number, bits

    def source(self, operand: Operand, type: Type, wider: bool = False) -> Read:
        dtype = type.dtype
        if isinstance(operand, Register):
            number, bits = self.register(operand, type, wider)
            if operand.negated:
                return lambda warp: ~warp.registers[number]
            if bits > type.bits:
                word = unsigned(type.bits)
                return lambda warp: warp.registers[number].astype(word).view(dtype)
            if dtype == unsigned(bits):
                return lambda warp: warp.registers[number]
            return lambda warp: warp.registers[number].view(dtype)
        if isinstance(operand, Symbol) and operand.name.startswith("%"):
            name = operand.name
            if name not in SPECIAL_REGISTERS:
                raise PtxError(f"register {name} is not declared, or a special register that is not implemented")
            self.special_registers.add(name)
            return lambda warp: warp.special[name].astype(unsigned(type.bits)).view(dtype)
        if isinstance(operand, Immediate):
            value = constant(operand.text, type)
        elif isinstance(operand, Symbol):
            value = np.full(LANES, self.variable(operand), unsigned(type.bits)).view(dtype)
        else:
            raise PtxError(f"operand {operand} is no value")
        return lambda warp: value

    def variable(self, symbol: Symbol) -> int:
        """Address of a variable in its state space; a .global one gets the generic address, which serves as both."""
        for space, layout in self.layouts.items():
            if symbol.name in layout.address:
                return layout.address[symbol.name] + symbol.offset + (GLOBALS_WINDOW if space == "global" else 0)
        raise PtxError(f"{symbol.name} is not declared")

    def destination(self, operand: Operand, type: Type, wider: bool = False) -> Write:
        if operand == Symbol("_"):
            return lambda warp, lanes, value: None
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError(f"{operand} is no register to write to")
        number, bits = self.register(operand, type, wider)
        word, own = unsigned(bits), unsigned(type.bits)
        extended = np.dtype(f"i{bits // 8}") if type.kind == "s" else word

        def write(warp, lanes: ndarray, value: ndarray) -> None:
            if bits > type.bits:
                value = (value if type.kind == "s" else value.view(own)).astype(extended)
            value = value.view(word)
            warp.registers[number] = value if lanes is ALL else np.where(lanes, value, warp.registers[number])

        return write

    def address(self, operand: Operand) -> Read:
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address")
        bits = self.bits[self.numbers[operand.base.name]] if isinstance(operand.base, Register) else 64
        base, offset = self.source(operand.base, U32 if bits == 32 else U64), np.int64(operand.offset)
        return lambda warp: (base(warp).astype(np.int64) + offset).view(np.uint64)

    def elements(self, operand: Operand) -> list[Operand]:
        return list(operand.elements) if isinstance(operand, Vector) else [operand]

    def label(self, operand: Operand) -> int:
        if not isinstance(operand, Symbol) or operand.name not in self.labels:
            raise PtxError(f"{operand} is no label")
        return self.labels[operand.name]


@functools.cache
def constant(text: str, type: Type) -> ndarray:
    """An immediate operand: `0f3F800000`, `0d...` and `1.5` are floats, all else an integer or the bits of a value."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        raw = int(text[2:], 16)
        bits = 4 * len(text[2:])
        if bits == 32 and type.name == "f64":
            return np.full(LANES, struct.unpack("<f", struct.pack("<I", raw))[0], np.float64)
        if bits != type.bits:
            raise PtxError(f"immediate {text} for an operand of type .{type.name}")
    elif "." in text:
        if type.name not in ("f32", "f64"):
            raise PtxError(f"immediate {text} for an operand of type .{type.name}")
        return np.full(LANES, float(text), type.dtype)
    else:
        raw = integer(text)
        if type.name in ("f32", "f64") or not -(1 << type.bits - 1) <= raw < 1 << type.bits:
            raise PtxError(f"immediate {text} for an operand of type .{type.name}")
    return np.full(LANES, raw % (1 << type.bits), unsigned(type.bits)).view(type.dtype)
