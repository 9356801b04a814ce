"""Runs a few hand-written instructions: the tests of the interpreter itself."""

from __future__ import annotations

import numpy as np

from .machine import launch, load
from .memory import Memory

_KERNEL = """
.version 8.0
.target sm_80
.address_size 64
{declarations}
.visible .entry snippet({parameters})
{{
{registers}
    .reg .b64 pointer, offset;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
{loads}
{body}
{stores}
    ret;
}}
"""


def execute(body: str, *, declarations: str = "", registers: str = "", dynamic_shared=0, threads=32, **values):
    """One block runs `body`. `values` are registers by name: an array is loaded, an element a thread, before the body
    runs; a dtype such as "u4" makes the register a result. Returns the result, or the results in order."""
    memory, names = Memory(), list(values)
    inputs = {name: np.ascontiguousarray(v) for name, v in values.items() if not isinstance(v, str)}
    outputs = {name: np.full(threads, 0x5A, np.dtype(v)) for name, v in values.items() if isinstance(v, str)}
    arrays = {**inputs, **outputs}

    def line(name: str, instruction: str) -> str:
        size = arrays[name].itemsize
        return (
            f"mul.wide.u32 offset, thread, {size}; ld.param.u64 pointer, [p_{name}]; "
            f"add.u64 pointer, pointer, offset; {instruction.format(bits=8 * size, name=name)};"
        )

    text = _KERNEL.format(
        declarations=declarations,
        parameters=", ".join(f".param .u64 p_{name}" for name in names),
        registers=registers + "".join(f".reg .b{max(8 * array.itemsize, 16)} {n};" for n, array in arrays.items()),
        loads="\n".join(line(name, "ld.global.b{bits} {name}, [pointer]") for name in inputs),
        body=body,
        stores="\n".join(line(name, "st.global.b{bits} [pointer], {name}") for name in outputs),
    )
    kernel = load(text, "snippet")
    launch(kernel, memory, (1,), (threads,), [memory.pointer(arrays[name]) for name in names], dynamic_shared)
    results = list(outputs.values())
    return results[0] if len(results) == 1 else results
