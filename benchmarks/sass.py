"""The hot path in the disassembly of a kernel: what a warp executes where it does its work.

SASS has no structure but branches, so the path is defined by them. A *pass* is a way through the control-flow graph
from the kernel's entry to EXIT, or from a loop's head back to it; a loop inside it is stepped over, unless the caller
says how often it runs. Of all passes, the hot one

1. runs the loops of which the caller says so,
2. issues the most tensor-core products (HMMA): a warp that has nothing to multiply may branch around them,
3. moves the most bytes between global memory and registers or shared memory: whoever takes it does all of the work,
4. by the fewest instructions: neither the version for unaligned pointers nor the one with a mask for every element,
5. and is the shortest of what remains: work of a few warps, which the others branch around, is not in it.

So its length is what a warp has to issue at least. Subroutines (CALL: the slow path of a division) are not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from math import prod


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@P0", "@!UP1" or nothing
    opcode: str  # LDG.E.128
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.opcode.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow."""
        name = self.opcode.split(".")[0]
        if name in ("EXIT", "RET"):
            return bool(self.guard)
        # BRA.U UP0, 0x190: the predicate may be an operand as well.
        return name != "BRA" or bool(self.guard) or "," in self.operands


@dataclass
class Block:
    """Instructions without a branch between them; successors are indices of blocks."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)

    @property
    def ends(self) -> bool:
        """Whether threads leave the kernel here; with a guard, not all of them."""
        return self.instructions[-1].opcode.split(".")[0] in ("EXIT", "RET")


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*?)\s*;", sass)
    return [Instruction(int(address, 16), guard, opcode, operands) for address, guard, opcode, operands in found]


def blocks(code: list[Instruction]) -> list[Block]:
    """The control-flow graph; block 0 is the entry. Raises ValueError for an indirect branch: it may go anywhere."""
    for instruction in code:
        if instruction.opcode.split(".")[0] in ("BRX", "BRXU", "JMX", "JMXU", "JMP"):
            raise ValueError(f"an indirect branch at {instruction.address:#x}: {instruction.opcode}")
    if not any(i.opcode.split(".")[0] == "RET" for i in code):  # then a CALL is a jump: ptxas leaves loops by some
        code = [replace(i, opcode="BRA") if i.opcode.startswith("CALL.REL") else i for i in code]
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    starts |= {after.address for i, after in zip(code, code[1:], strict=False) if _ends_block(i)}
    result: list[Block] = []
    at: dict[int, int] = {}
    for instruction in code:
        if instruction.address in starts:
            at[instruction.address] = len(result)
            result.append(Block([]))
        result[-1].instructions.append(instruction)
    for index, block in enumerate(result):
        last = block.instructions[-1]
        if last.target is not None:
            block.successors.append(at[last.target])
        if last.falls_through and index + 1 < len(result):
            block.successors.append(index + 1)
    return result


def _ends_block(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("BRA", "EXIT", "RET")


def loops(graph: list[Block]) -> dict[int, set[int]]:
    """Head -> blocks of the loop, head included, for every natural loop (Aho et al., "Compilers", section 9.6)."""
    back, _ = _depth_first(graph)
    predecessors: dict[int, list[int]] = {index: [] for index in range(len(graph))}
    for index, block in enumerate(graph):
        for successor in block.successors:
            predecessors[successor].append(index)
    result: dict[int, set[int]] = {}
    for tail, head in back:
        body = result.setdefault(head, {head})
        pending = [tail]
        while pending:
            if (index := pending.pop()) not in body:
                body.add(index)
                pending += predecessors[index]
    return result


def _depth_first(graph: list[Block]) -> tuple[set[tuple[int, int]], list[int]]:
    """(edges back to a block that is still open, blocks in the order in which they are closed)."""
    back, closed, opened = set(), [], {0}
    stack = [(0, iter(graph[0].successors))]
    while stack:
        index, successors = stack[-1]
        for successor in successors:
            if successor in {open_index for open_index, _ in stack}:
                back.add((index, successor))
            elif successor not in opened:
                opened.add(successor)
                stack.append((successor, iter(graph[successor].successors)))
                break
        else:
            stack.pop()
            closed.append(index)
    return back, closed


def moved_bytes(instruction: Instruction) -> int:
    """Bytes of global memory that a thread loads or stores; 0 for what is no such instruction."""
    name, *modifiers = instruction.opcode.split(".")
    if name not in ("LDG", "STG", "LDGSTS"):
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[m] for m in modifiers if m in widths), 4)


def hot_path(sass: str, trips: dict[str, int] | None = None, cold: tuple[str, ...] = ()) -> list[Instruction]:
    """The instructions of the hot pass of one kernel; see above.

    trips: {"SHFL": 3} says that a loop with an instruction of that name (up to the first dot) runs three times in a
    pass: its instructions are in the path three times. cold: beginnings of opcodes ("STG.E.U8") that only rare branches
    contain; the path keeps clear of their blocks. Raises ValueError where no pass moves anything.
    """
    graph = blocks(instructions(sass))
    back, closed = _depth_first(graph)
    closed = [index for index in closed if not any(i.opcode.startswith(cold) for i in graph[index].instructions)]
    bodies = loops(graph)
    regions = [(0, set(closed), bodies)]
    for head, body in bodies.items():
        regions.append((head, body, {h: inner for h, inner in bodies.items() if inner < body}))
    passes = [
        _best_pass(graph, back, [index for index in closed if index in region], inner, trips or {}, head)
        for head, region, inner in regions
    ]
    best = max((p for p in passes if p is not None), default=None)
    if best is None or best.moved == 0:
        avoiding = f" and keeps clear of {', '.join(cold)}" if cold else ""
        raise ValueError(f"no way through this kernel loads or stores global memory{avoiding}")
    return best.path


@dataclass(order=True)
class _Pass:
    loops: int = 0
    products: int = 0
    moved: int = 0
    minus_moves: int = 0
    minus_length: int = 0
    path: list[Instruction] = field(default_factory=list, compare=False)

    def after(self, block: Block, times: int, begins_loop: bool) -> _Pass:
        """`block`, executed `times` times, and then this."""
        moves = [moved for i in block.instructions if (moved := moved_bytes(i))]
        products = sum(i.opcode.split(".")[0].endswith("MMA") for i in block.instructions)
        return _Pass(
            self.loops + (begins_loop and times > 0),
            self.products + times * products,
            self.moved + times * sum(moves),
            self.minus_moves - times * len(moves),
            self.minus_length - times * len(block.instructions),
            times * block.instructions + self.path,
        )


def _best_pass(graph, back, closed, inner, trips, head) -> _Pass | None:
    """The best way from `head` to EXIT, or back to `head` where it is a loop's, through the blocks `closed`.

    They are in closing order, so that the successors of a block come before it.
    """
    times_of = {loop: _trips(graph, body, inner, trips) for loop, body in inner.items()}
    best: dict[int, _Pass] = {}
    for index in closed:
        block = graph[index]
        onward = [best[s] for s in block.successors if s in best and (index, s) not in back]
        if block.ends or (index, head) in back:
            onward.append(_Pass())
        if onward:
            times = prod(times_of[loop] for loop, body in inner.items() if index in body)
            best[index] = max(onward).after(block, times, index in inner)
    return best.get(head)


def _trips(graph: list[Block], body: set[int], inner: dict[int, set[int]], trips: dict[str, int]) -> int:
    """How often the loop runs: what is said of an instruction that is in it and in no loop inside it."""
    inside = set().union(*(other for other in inner.values() if other < body))
    names = {i.opcode.split(".")[0] for index in body - inside for i in graph[index].instructions}
    return max((times for name, times in trips.items() if name in names), default=0)
