"""Branches, divergence, barriers, and how errors name their place."""

import numpy as np
import pytest

from .machine import launch, load
from .memory import Memory
from .parse import PtxError
from .snippets import execute

pytestmark = pytest.mark.slow

LANES = np.arange(32, dtype="u4")
PREDICATES = ".reg .pred p, q; .reg .b32 x, i;"


def test_branches_meet_again_behind_an_if():
    body = """
        setp.lt.u32 p, a, 10;
        @p bra THEN;
        mov.u32 d, 1;
        bra JOIN;
    THEN:
        mov.u32 d, 2;
    JOIN:
        activemask.b32 e;
    """
    d, e = execute(body, registers=PREDICATES, a=LANES, d="u4", e="u4")
    assert np.array_equal(d, np.where(LANES < 10, 2, 1))
    assert (e == 0xFFFFFFFF).all()


def test_branches_meet_again_if_one_side_stands_behind_the_join():
    body = """
        mov.u32 d, 0;
        setp.lt.u32 p, a, 10;
        @p bra AWAY;
    JOIN:
        shfl.sync.idx.b32 d, a, 3, 31, -1;
        bra END;
    AWAY:
        add.u32 a, a, 100;
        bra JOIN;
    END:
    """
    assert (execute(body, registers=PREDICATES, a=LANES, d="u4") == 103).all()


def test_a_loop_that_lanes_leave_at_different_times():
    """Collatz: each lane counts its own steps."""
    body = """
        mov.u32 d, 0;
    LOOP:
        setp.eq.u32 p, a, 1;
        @p bra DONE;
        and.b32 x, a, 1;
        setp.eq.u32 q, x, 0;
        @q shr.u32 a, a, 1;
        @!q mad.lo.u32 a, a, 3, 1;
        add.u32 d, d, 1;
        bra.uni LOOP;
    DONE:
    """

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    actual = execute(body, registers=PREDICATES, threads=80, a=np.arange(1, 81, dtype="u4"), d="u4")
    assert actual.tolist() == [steps(n) for n in range(1, 81)]


KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out) {{
    .reg .pred p; .reg .b32 t, x; .reg .b64 o;
    ld.param.u64 o, [out];
    mov.u32 t, %tid.x;
    {body}
    ret;
}}
"""


def run(body: str, block=(32,), grid=(1,), size=256):
    out, memory = np.zeros(size, "u4"), Memory()
    launch(load(KERNEL.format(body=body), "k"), memory, grid, block, [memory.pointer(out)])
    return out


def test_threads_that_have_ended_are_not_waited_for():
    out = run("""
        setp.lt.u32 p, t, 40;
        @p ret;
        bar.sync 0;
        mad.wide.u32 o, t, 4, o;
        st.global.u32 [o], t;
    """, block=(96,))  # fmt: skip
    assert np.array_equal(out[:96], np.where(np.arange(96) < 40, 0, np.arange(96)))


@pytest.mark.parametrize(
    "body",
    (
        "setp.lt.u32 p, t, 7; @p bar.sync 0; bar.warp.sync -1;",
        "setp.lt.u32 p, t, 7; @p bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
        "setp.lt.u32 p, t, 7; @p shfl.sync.bfly.b32 x, t, 1, 31, -1; bar.sync 0;",
    ),
)
def test_a_warp_that_does_not_come_together_is_an_error(body):
    with pytest.raises(PtxError, match=r"divergent warp: lanes \[.*\] wait at .* for lanes \["):
        run(body)


def test_a_loop_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.MAX_STEPS", 1000)
    with pytest.raises(PtxError, match="1000 instructions and no end"):
        run("L: bra L;")


def test_positions_in_grid_and_block():
    out = run("""
        .reg .b32 a, b;
        mov.u32 a, %ctaid.z; mov.u32 b, %nctaid.y; mul.lo.u32 a, a, b; mov.u32 b, %ctaid.y; add.u32 a, a, b;
        mov.u32 b, %nctaid.x; mul.lo.u32 a, a, b; mov.u32 b, %ctaid.x; add.u32 a, a, b;   // number of the block
        mov.u32 b, %ntid.z; mul.lo.u32 a, a, b; mov.u32 b, %tid.z; add.u32 a, a, b;
        mov.u32 b, %ntid.y; mul.lo.u32 a, a, b; mov.u32 b, %tid.y; add.u32 a, a, b;
        mov.u32 b, %ntid.x; mul.lo.u32 a, a, b; add.u32 a, a, t;                          // number of the thread
        mad.wide.u32 o, a, 4, o;
        add.u32 a, a, 1;
        st.global.u32 [o], a;
    """, block=(3, 5, 2), grid=(2, 1, 3), size=180)  # fmt: skip
    assert np.array_equal(out, np.arange(1, 181))


def test_errors_name_the_thread_the_instruction_and_the_line_of_the_source():
    body = """
        .reg .b32 y;
        mov.u32 y, %tid.y;
        mad.lo.u32 t, y, 8, t;
        .loc 1 10 3
        mad.wide.u32 o, t, 4, o;
        .loc 2 77 1, function_name $x, inlined_at 1 10 3
        st.global.u32 [o], t;
    """
    text = KERNEL.format(body=body) + '.file 1 "/somewhere/kernel.cu"\n.file 2 "/elsewhere/header.cuh"\n'
    out, memory = np.zeros(50, "u4"), Memory()
    with pytest.raises(PtxError) as raised:
        launch(load(text, "k"), memory, (1,), (8, 8), [memory.pointer(out)])
    fault, instruction, place = str(raised.value).split("\n")
    assert fault == "4 bytes at offset 200 of a buffer of 200 bytes (buffer 1)"
    assert instruction.strip() == "st.global.u32 [o], t (header.cuh:77, inlined at kernel.cu:10, PTX line 16)"
    assert place.strip() == "k, block (0, 0, 0), thread (2, 6, 0)"


def test_scopes_of_inline_assembly_keep_their_names_apart():
    body = """
        mov.u32 x, 1;
        { .reg .b32 x; .reg .pred p; mov.u32 x, 5; setp.eq.u32 p, t, 3; @p bra L; mov.u32 x, 6; L: add.u32 t, t, x; }
        { .reg .b32 x; .reg .pred p; mov.u32 x, 50; setp.eq.u32 p, t, 8; @p bra L; mov.u32 x, 60; L: add.u32 t, t, x; }
        mov.u32 %tmp, %tid.x;
        mad.wide.u32 o, %tmp, 4, o;
        add.u32 t, t, x;
        st.global.u32 [o], t;
    """
    t = np.arange(32)
    t = t + np.where(t == 3, 5, 6)
    t = t + np.where(t == 8, 50, 60)
    assert np.array_equal(run(".reg .b32 %tmp;" + body)[:32], t + 1)


def test_bounds_of_the_launch_are_kept():
    text = KERNEL.format(body="").replace(") {", ") .maxntid 64, 1, 1 {")
    with pytest.raises(PtxError, match="65 threads a block, allowed are 1 to 64"):
        launch(load(text, "k"), Memory(), (1,), (65,), [0])
    text = KERNEL.format(body="").replace(") {", ") .reqntid 64 {")
    with pytest.raises(PtxError, match="32 threads a block, allowed are 64 to 64"):
        launch(load(text, "k"), Memory(), (1,), (32,), [0])
    with pytest.raises(PtxError, match="2 arguments for 1 parameters"):
        launch(load(text, "k"), Memory(), (1,), (64,), [0, 0])


@pytest.mark.parametrize(
    "text",
    (
        ".entry k() { add.u32 %r1, %r1, %r1 }",  # no semicolon
        ".entry k() { .reg .b32 a; mov.u32 a, [b+c]; }",
        ".entry k() .maxclusterrank 4 { ret; }",
        ".alias f, g;",
    ),
)
def test_syntax_that_is_not_understood_is_refused(text):
    with pytest.raises(PtxError, match="PTX line"):
        load(text, "k")
