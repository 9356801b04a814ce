"""PTX text -> Module. Knows the syntax of PTX (the PTX ISA manual, chapters 4 and 5), not what an instruction means."""

from __future__ import annotations

import functools
import re
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from .formats import TYPES


class PtxError(RuntimeError):
    """A program that is not understood, or that does what no correct kernel does. The message names the place."""


@dataclass(frozen=True)
class Location:
    """A line of the source, as `.loc` tells it, and the line that inlined it."""

    file: str
    line: int
    inlined_at: Location | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f", inlined at {self.inlined_at}" if self.inlined_at else "")


@dataclass(frozen=True)
class Variable:
    """Memory with a name: a parameter of a kernel, a shared, local, constant or global array. Sizes in bytes."""

    name: str
    type: str  # of one element: "b8", "u64", "f32"
    size: int  # 0: an extern array, as long as the launch says
    align: int
    initial: bytes = b""


# Operands. A register's name is unique in its entry: a scope of inline PTX that declares it anew renames it.
@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # !%p, of predicates only


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A variable, a label, a special register such as %tid.x, or the sink `_`."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    elements: tuple


@dataclass(frozen=True)
class Pair:
    """`d|p`: a result and a predicate."""

    first: Register | Symbol
    second: Register | Symbol


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass
class Instruction:
    opcode: str  # with its modifiers
    operands: list[Operand]
    guard: Register | None
    text: str
    ptx_line: int
    location: Location | None

    def __str__(self) -> str:
        place = f"{self.location}, " if self.location else ""
        return f"{self.text} ({place}PTX line {self.ptx_line})"


@dataclass
class Body:
    registers: dict[str, int] = field(default_factory=dict)  # bits; a predicate has 1
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction that follows


@dataclass
class Entry:
    """A kernel."""

    name: str  # demangled, without the parameters: `fastpeft::(anonymous namespace)::some_kernel<float, true>`
    symbol: str
    parameters: list[Variable]
    parse_body: Callable[[], Body]  # when it is wanted: a program has many kernels, a test runs few of them
    max_threads: int | None = None
    exact_threads: int | None = None


@dataclass
class Module:
    target: str = ""
    constants: list[Variable] = field(default_factory=list)
    globals: list[Variable] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def find(self, name: str) -> Entry:
        """The one kernel whose name, demangled or not, contains `name`."""
        found = [entry for entry in self.entries if name in entry.name or name in entry.symbol]
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found or self.entries)
            raise PtxError(f"{len(found)} kernels are called {name!r}: {names}")
        return found[0]


_NAME = r"[A-Za-z_$%][\w$]*"
_NUMBER = r"-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+\.\d+|\d+U?)"
_STATEMENT = re.compile(
    rf"\s*(?:(?P<label>{_NAME})\s*:(?!:)|(?P<instruction>[@A-Za-z][^;]*);|\.loc\s+(?P<loc>[^\n]*)"
    r"|\.reg\s+\.(?P<type>\w+)\s+(?P<registers>[^;]*);|\.(?P<space>shared|local)\s+(?P<variable>[^;]*);"
    r"|\.pragma\s+[^;]*;|(?P<open>\{)|(?P<close>\})|;)"
)
_INSTRUCTION = re.compile(rf"(?:@\s*(!?\s*{_NAME})\s+)?([\w.:]+)\s*(.*)")
_VARIABLE = re.compile(
    rf"(?P<words>(?:\.\w+\s+(?:\d+\s+)?)*)\.(?P<type>\w+)\s+(?P<ptr>\.ptr\s+(?:\.\w+\s+(?:\d+\s+)?)*)?"
    rf"(?P<name>{_NAME})\s*(?P<array>\[\s*\d*\s*\])?\s*(?:=\s*(?P<initial>.+))?",
    re.DOTALL,
)


def parse(text: str) -> Module:
    module = _Parser(text).module()
    for entry, name in zip(module.entries, demangled([entry.symbol for entry in module.entries]), strict=True):
        entry.name = name
    return module


def demangled(symbols: list[str]) -> list[str]:
    """The names of C++ functions without their parameters; a symbol that is none stays as it is."""
    if not any(symbol.startswith("_Z") for symbol in symbols):
        return symbols
    run = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def integer(text: str) -> int:
    text = text.removesuffix("U")
    digits = text.lstrip("-").lower()
    base = 16 if digits.startswith("0x") else 2 if digits.startswith("0b") else 8 if re.match("0[0-7]", digits) else 10
    return int(text, base)


def split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class _Scope:
    """A pair of braces: the registers and labels that it declares, and those around it."""

    def __init__(self, parent: _Scope | None = None):
        self.parent, self.registers, self.labels = parent, {}, {}

    def find(self, kind: str, name: str) -> str | None:
        scope = self
        while scope is not None:
            if name in getattr(scope, kind):
                return getattr(scope, kind)[name]
            scope = scope.parent
        return None


class _Parser:
    def __init__(self, text: str):
        # Comments go, their line ends stay, so that positions still tell lines. Strings may contain slashes.
        comment = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
        self.text = comment.sub(lambda m: m[0] if m[0][0] == '"' else "\n" * m[0].count("\n"), text)
        self.line_starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        self.position = 0
        self.files = {int(number): name for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self.text)}
        self.inlined: dict[tuple, tuple | None] = {}  # (file, line, column) -> where it was inlined, from .loc

    def line(self, position: int) -> int:
        return bisect_right(self.line_starts, position)

    def error(self, what: str) -> PtxError:
        self.take(r"\s*")
        shown = self.text[self.position : self.position + 80].split("\n")[0]
        return PtxError(f"PTX line {self.line(self.position)}: {what}: {shown}")

    def take(self, pattern: str) -> re.Match | None:
        match = re.compile(pattern, re.DOTALL).match(self.text, self.position)
        if match:
            self.position = match.end()
        return match

    def need(self, pattern: str, what: str) -> re.Match:
        match = self.take(pattern)
        if not match:
            raise self.error(f"expected {what}")
        return match

    def braces(self) -> None:
        """Skips a block whose contents do not matter."""
        self.need(r"\s*\{", "{")
        depth = 1
        while depth:
            depth += 1 if self.need(r"[^{}]*([{}])", "}")[1] == "{" else -1

    def module(self) -> Module:
        module = Module()
        while self.take(r"\s*") and self.position < len(self.text):
            if match := self.take(r"\.target\s+(\w+)[^\n]*"):
                module.target = match[1]
            elif self.take(r"\.(version|address_size|file)\b[^\n]*") or self.take(_NAME + r":"):
                pass
            elif self.take(r"\.section\s+[.\w]+"):
                self.braces()
            elif self.take(r"(?:\.(?:visible|weak)\s+)?\.entry\b"):
                module.entries.append(self.entry())
            elif self.take(r"(?:\.(?:visible|weak|extern)\s+)*\.func\b[^;{]*"):
                if not self.take(";"):  # a body: whoever calls it is refused when that call is decoded
                    self.braces()
            elif match := self.take(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(const|global|shared)\s+([^;]*);"):
                places = {"const": module.constants, "global": module.globals, "shared": module.shared}
                places[match[1]].append(self.variable(match[2]))
            else:
                raise self.error("not understood")
        return module

    def variable(self, declaration: str) -> Variable:
        """`.align 16 .b8 name[64] = {1, 2}`, without the state space."""
        match = _VARIABLE.fullmatch(declaration.strip())
        if not match or match["type"] not in TYPES:
            raise self.error(f"declaration {declaration!r} not understood")
        element = TYPES[match["type"]].bits // 8
        align = re.search(r"\.align\s+(\d+)", match["words"])
        count = integer(match["array"].strip("[] ") or "0") if match["array"] else 1
        values = split(match["initial"].strip("{} \n")) if match["initial"] else []
        initial = b"".join(self.encode(value, match["type"]) for value in values)
        return Variable(match["name"], match["type"], element * count, int(align[1]) if align else element, initial)

    def encode(self, value: str, type: str) -> bytes:
        if not re.fullmatch(_NUMBER, value):
            raise self.error(f"initial value {value!r} is no number")
        if value[:2] in ("0f", "0F", "0d", "0D"):
            return bytes.fromhex(value[2:])[::-1]
        if type in ("f32", "f64"):
            return struct.pack("<f" if type == "f32" else "<d", float(value))
        bits = TYPES[type].bits
        return (integer(value) % (1 << bits)).to_bytes(bits // 8, "little")

    def entry(self) -> Entry:
        symbol, parameters = self.need(rf"\s*({_NAME})\s*(?:\(([^)]*)\))?", "the name of a kernel").groups()
        declarations = [re.sub(r"^\.param\s+", "", p) for p in split(parameters or "")]
        entry = Entry(symbol, symbol, [self.variable(p) for p in declarations], Body)
        while match := self.take(r"\s*\.(\w+)\s+([\d, ]+)"):
            threads = 1
            for extent in match[2].split(","):
                threads *= int(extent)
            if match[1] == "maxntid":
                entry.max_threads = threads
            elif match[1] == "reqntid":
                entry.exact_threads = threads
            elif match[1] not in ("minnctapersm", "maxnreg"):
                raise self.error(f"directive .{match[1]} of a kernel is not understood")
        entry.parse_body = functools.partial(self.body, self.position)
        self.braces()
        return entry

    def body(self, begin: int) -> Body:
        self.position = begin
        self.need(r"\s*\{", "the body of a kernel")
        body = Body()
        scope, location, found = _Scope(), None, []
        while scope is not None:
            match = _STATEMENT.match(self.text, self.position)
            if not match:
                raise self.error("statement not understood")
            self.position = match.end()
            if text := match["instruction"]:
                found.append((text, self.line(match.start("instruction")), location, scope))
            elif text := match["loc"]:
                location = self.location(text)
            elif label := match["label"]:
                unique = f"{label}#{len(body.labels)}"
                scope.labels[label] = unique
                body.labels[unique] = len(found)
            elif match["open"]:
                scope = _Scope(scope)
            elif match["close"]:
                scope = scope.parent
            elif match["type"]:
                self.registers(body, scope, match["type"], match["registers"])
            elif match["space"]:
                getattr(body, match["space"]).append(self.variable(match["variable"]))
        # Operands last: a branch may name a label that comes later.
        body.instructions = [self.instruction(*statement) for statement in found]
        return body

    def registers(self, body: Body, scope: _Scope, type: str, names: str) -> None:
        if type not in TYPES:
            raise self.error(f"registers of type .{type} are not understood")
        for declared in split(names):
            many = re.fullmatch(rf"({_NAME})<(\d+)>", declared)
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [declared]:
                unique = name if name not in body.registers else f"{name}#{len(body.registers)}"
                scope.registers[name] = unique
                body.registers[unique] = TYPES[type].bits

    def location(self, text: str) -> Location:
        file, line, column = map(int, text.split(",")[0].split()[:3])
        inlined_at = re.search(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)", text)
        here = (file, line, column)
        self.inlined[here] = tuple(map(int, inlined_at.groups())) if inlined_at else None
        chain = [here]
        while (outer := self.inlined.get(chain[-1])) and outer not in chain:
            chain.append(outer)
        result = None
        for file, line, _ in reversed(chain):
            result = Location(self.files.get(file, f"file {file}").rsplit("/", 1)[-1], line, result)
        return result

    def instruction(self, text: str, ptx_line: int, location: Location | None, scope: _Scope) -> Instruction:
        text = " ".join(text.split())
        match = _INSTRUCTION.fullmatch(text)
        try:
            if not match:
                raise PtxError("statement not understood")
            guard = _operand(match[1], scope) if match[1] else None
            return Instruction(match[2], [_operand(o, scope) for o in split(match[3])], guard, text, ptx_line, location)
        except PtxError as error:
            raise PtxError(f"{error}: {text} (PTX line {ptx_line})") from None


def _operand(text: str, scope: _Scope) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(element, scope) for element in split(text[1:-1])))
    if text.startswith("["):
        match = re.fullmatch(rf"\[\s*({_NAME}|{_NUMBER})\s*(?:\+\s*(-?\d\w*)\s*)?\]", text)
        if not match:
            raise PtxError(f"address {text!r} not understood")
        return Address(_operand(match[1], scope), integer(match[2] or "0"))
    if text.startswith("!"):
        return Register(_operand(text[1:], scope).name, negated=True)
    if "|" in text:
        return Pair(*(_operand(half, scope) for half in text.split("|")))
    if re.fullmatch(_NUMBER, text):
        return Immediate(text)
    if register := scope.find("registers", text):
        return Register(register)
    if match := re.fullmatch(rf"({_NAME}(?:\.\w+)?)(?:\+(-?\d+))?", text):
        return Symbol(scope.find("labels", match[1]) or match[1], integer(match[2] or "0"))
    raise PtxError(f"operand {text!r} not understood")
