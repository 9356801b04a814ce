"""State spaces, bounds and alignment, races, asynchronous copies."""

import ctypes

import numpy as np
import pytest
import torch

from .machine import launch, load
from .memory import Memory
from .parse import PtxError
from .snippets import execute

pytestmark = pytest.mark.slow

LANES = np.arange(32, dtype="u4")
SHARED = ".shared .align 16 .b8 tile[1024];"
REGISTERS = ".reg .pred p; .reg .b32 s, x, y, z, w; .reg .b64 g;"

# s = tile + 4 * thread
PLACE = "mov.u32 x, tile; mad.lo.u32 s, thread, 4, x;"


def run(body, threads=32, declarations=SHARED, **values):
    return execute(PLACE + body, declarations=declarations, registers=REGISTERS, threads=threads, **values)


def kernel(body: str, parameters: str = ".param .u64 out", declarations: str = ""):
    return load(
        f"""
        .version 8.0
        .target sm_80
        .address_size 64
        {declarations}
        .visible .entry k({parameters}) {{
            .reg .pred p; .reg .b16 h; .reg .b32 t, x, y, z, w; .reg .b64 o, l, m;
            ld.param.u64 o, [out];
            mov.u32 t, %tid.x;
            {body}
            ret;
        }}
        """,
        "k",
    )


def test_widths_signs_and_vectors():
    a = np.arange(32, dtype="u8") * np.uint64(0x8182838485868788)
    data = np.concatenate([a, a])
    memory, out = Memory(), np.zeros((32, 6), "u4")
    body = """
        ld.param.u64 l, [in];
        mad.wide.u32 l, t, 8, l;
        mad.wide.u32 o, t, 24, o;
        ld.global.s8 x, [l+7];      st.global.u32 [o], x;
        ld.global.u8 x, [l+7];      st.global.u32 [o+4], x;
        ld.global.nc.s16 x, [l+6];  st.global.u32 [o+8], x;
        ld.global.v2.u32 {y, z}, [l];
        ld.global.L1::evict_last.v2.u32 {x, _}, [l];
        st.global.v2.b32 [o+16], {z, y};
        st.global.u16 [o+12], x;
        st.global.u8 [o+14], z;
    """
    launch(
        kernel(body, ".param .u64 out, .param .u64 in"),
        memory,
        (1,),
        (32,),
        [memory.pointer(out), memory.pointer(data)],
    )
    assert np.array_equal(out[:, 0].view("i4"), a.view("i1")[7::8])
    assert np.array_equal(out[:, 1], a.view("u1")[7::8])
    assert np.array_equal(out[:, 2].view("i4"), a.view("i2")[3::4])
    low, high = a.view("u4")[0::2], a.view("u4")[1::2]
    assert np.array_equal(out[:, 3], low & np.uint32(0xFFFF) | (high & np.uint32(0xFF)) << np.uint32(16))
    assert np.array_equal(out[:, 4], high) and np.array_equal(out[:, 5], low)


def test_a_struct_parameter_holds_pointers_and_numbers():
    class Arguments(ctypes.Structure):
        _fields_ = [("out", ctypes.c_uint64), ("factor", ctypes.c_float), ("small", ctypes.c_int8)]

    memory, out = Memory(), torch.zeros(32, 2, dtype=torch.int32)
    text = """
        .version 8.0
        .target sm_80
        .address_size 64
        .visible .entry k(.param .align 8 .b8 s[16], .param .f32 f) {
            .reg .b32 t, x, y; .reg .b64 o;
            ld.param.u64 o, [s];
            ld.param.f32 x, [f];
            ld.param.s8 y, [s+12];
            mov.u32 t, %tid.x;
            mad.wide.u32 o, t, 8, o;
            st.global.v2.u32 [o], {x, y};
            ret;
        }
    """
    arguments = Arguments(out=memory.pointer(out), factor=2.5, small=-3)
    launch(load(text, "k"), memory, (1,), (32,), [arguments, 2.5])
    assert (out[:, 0].view(torch.float32) == 2.5).all() and (out[:, 1] == -3).all()
    with pytest.raises(PtxError, match="has 16 bytes"):
        launch(load(text, "k"), memory, (1,), (32,), [bytes(12), 2.5])


def test_constants_globals_and_local_memory():
    declarations = """
        .const .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 255, 255, 255};
        .const .align 4 .f32 half = 0f3F000000;
        .global .align 4 .u32 counters[2] = {5, 6};
    """
    body = """
        .local .align 4 .b8 depot[16];
        mov.b64 l, depot;
        cvta.local.u64 m, l;
        st.local.u32 [l+8], t;                    // each thread has its own
        ld.u32 x, [m+8];
        mad.wide.u32 o, t, 16, o;
        st.global.u32 [o], x;
        ld.const.s32 x, [table+4];
        st.global.u32 [o+4], x;
        mov.u64 l, table;
        cvta.const.u64 l, l;
        ld.u32 x, [l];
        st.global.u32 [o+8], x;
        mov.u64 l, counters;
        atom.global.add.u32 x, [l+4], 1;
        st.global.u32 [o+12], x;
        ld.const.f32 x, [half];
    """
    out, memory = np.zeros((32, 4), "i4"), Memory()
    launch(kernel(body, declarations=declarations), memory, (1,), (32,), [memory.pointer(out)])
    assert np.array_equal(out, np.stack([LANES, -np.ones(32), np.ones(32), 6 + LANES], 1))


def test_tensors_are_used_in_place_with_their_strides_and_alignment():
    memory, base = Memory(), torch.zeros(100, dtype=torch.int32)
    view = base[1:65:2]
    body = "mad.wide.u32 o, t, 8, o; st.global.u32 [o], t;"
    launch(kernel(body), memory, (1,), (32,), [memory.pointer(view)])
    assert torch.equal(view, torch.arange(32, dtype=torch.int32)) and not base[0::2].any()
    assert memory.pointer(base) % 16 == 0 and memory.pointer(base[1:]) % 16 == 4
    assert memory.pointer(None) == 0
    with pytest.raises(PtxError, match="offset 248 of a buffer of 244 bytes"):  # 31 elements, 8 bytes apart
        launch(kernel(body), memory, (1,), (32,), [memory.pointer(view[:-1])])


@pytest.mark.parametrize(
    "body, message",
    (
        ("ld.global.u32 x, [o+128];", "4 bytes at offset 128 of a buffer of 128 bytes"),
        ("ld.global.u32 x, [o+-4];", "offset -4"),
        ("st.global.u8 [o+128], h;", "offset 128"),
        ("ld.global.u32 x, [o+2];", "misaligned: 4 bytes"),
        ("ld.global.v4.u32 {x, y, z, w}, [o+8];", "misaligned: 16 bytes"),
        ("mov.u64 l, 0; ld.global.u32 x, [l];", "in no buffer"),
        ("mov.u64 l, 0; ld.u32 x, [l+8];", "in no buffer"),
        ("cvta.shared.u64 l, o; ld.u32 x, [l];", "belong to no variable"),
        ("mov.u32 x, 0; ld.shared.u32 y, [x];", "belong to no variable"),
        ("ld.shared.u32 x, [o];", "belong to no variable"),  # a generic address where a shared one belongs
        ("ld.const.u32 x, [o];", "belong to no variable"),
        ("ld.param.u64 l, [out+8];", "belong to no variable"),
        ("mov.u32 x, first; ld.shared.v2.u32 {y, z}, [x+8];", "belong to no variable"),  # into its neighbour
    ),
)
def test_wild_and_misaligned_accesses_are_errors(body, message):
    memory, out = Memory(), np.zeros(32, "u4")
    shared = ".shared .align 8 .b8 first[12]; .shared .align 4 .b8 second[12];"
    with pytest.raises(PtxError, match=message):
        launch(kernel(body, declarations=shared), memory, (1,), (32,), [memory.pointer(out)])


def test_dynamic_shared_memory_is_as_long_as_the_launch_says():
    declarations = ".extern .shared .align 16 .b8 dynamic[];"
    body = "mov.u32 x, dynamic; mad.lo.u32 x, t, 4, x; st.shared.u32 [x], t;"
    memory, out = Memory(), np.zeros(1, "u4")
    k = kernel(body, declarations=declarations)
    launch(k, memory, (1,), (32,), [memory.pointer(out)], 128)
    with pytest.raises(PtxError, match=r"belong to no variable(?s:.*)thread \(31, 0, 0\)"):
        launch(k, memory, (1,), (32,), [memory.pointer(out)], 124)
    with pytest.raises(PtxError, match="declares none"):
        launch(kernel(""), memory, (1,), (32,), [memory.pointer(out)], 128)


def test_atomics_update_one_after_the_other():
    body = """
        mov.u32 w, tile;
        setp.eq.u32 p, thread, 0;
        @p st.shared.u32 [w], 100;
        bar.sync 0;
        atom.shared.add.u32 d, [w], 1;
        red.shared.max.u32 [w], 0;
        bar.sync 0;
        ld.shared.u32 e, [w];
    """
    d, e = run(body, threads=64, d="u4", e="u4")
    assert np.array_equal(np.sort(d), 100 + np.arange(64)) and (e == 164).all()
    d = run("st.shared.u32 [s], 7; atom.shared.cas.b32 d, [s], 7, thread; ld.shared.u32 d, [s];", d="u4")
    assert np.array_equal(d, LANES)


# ---- races

REVERSED = "xor.b32 y, thread, 63; mad.lo.u32 y, y, 4, x;"  # where the other warp writes
NEIGHBOUR = "xor.b32 y, thread, 1; mad.lo.u32 y, y, 4, x;"  # where the lane beside writes


def test_barriers_order_accesses():
    body = f"{REVERSED} st.shared.u32 [s], thread; bar.sync 0; ld.shared.u32 d, [y]; bar.sync 0; st.shared.u32 [s], 0;"
    assert np.array_equal(run(body, threads=64, d="u4"), 63 - np.arange(64))
    body = f"{NEIGHBOUR} st.shared.u32 [s], thread; bar.warp.sync -1; ld.shared.u32 d, [y];"
    body += "bar.warp.sync -1; st.shared.u32 [s], 0;"
    assert np.array_equal(run(body, d="u4"), LANES ^ 1)


@pytest.mark.parametrize(
    "body, message",
    (
        # Two warps: the first is through before the second begins, whose first access is the race.
        (f"{REVERSED} st.shared.u32 [s], thread; ld.shared.u32 d, [y];", "the thread wrote .* thread 31 read it"),
        (
            f"{REVERSED} st.shared.u32 [s], thread; bar.warp.sync -1; ld.shared.u32 d, [y];",
            "wrote .* thread 31 read it",
        ),
        (f"{REVERSED} ld.shared.u32 d, [y]; st.shared.u32 [s], thread;", "the thread read .* thread 31 wrote it"),
        (f"{REVERSED} st.shared.u32 [s], thread; st.shared.u32 [y], thread;", "the thread wrote .* wrote it"),
        (
            "ld.shared.u32 d, [tile]; st.shared.u32 [s], thread;",
            "the thread wrote .* read it",
        ),  # all have read what one writes
        (f"{NEIGHBOUR} st.shared.u32 [s], thread; ld.shared.u32 d, [y];", "the thread read .* wrote it"),
        (f"{NEIGHBOUR} ld.shared.u32 d, [y]; st.shared.u32 [s], thread;", "the thread wrote .* read it"),
        ("st.shared.u32 [tile], thread;", "different values to one shared address at once"),
    ),
)
def test_accesses_without_a_barrier_between_are_races(body, message):
    with pytest.raises(PtxError, match=message):
        run(body, threads=64, d="u4")


def test_what_is_no_race():
    assert (run("st.shared.u32 [tile], 7; bar.warp.sync -1; ld.shared.u32 d, [tile];", d="u4") == 7).all()
    run("ld.shared.u32 d, [tile]; ld.shared.u32 d, [s]; ld.shared.u32 d, [tile];", threads=64, d="u4")
    run("st.shared.u32 [s], 1; ld.shared.u32 d, [s]; st.shared.u32 [s], 2;", threads=64, d="u4")


def test_uninitialized_shared_memory_is_nan():
    assert np.isnan(run("ld.shared.f32 d, [s];", d="f4")).all()


# ---- cp.async

SOURCE = np.arange(128, dtype="u4")
COPY = "ld.param.u64 g, [p_a]; mad.wide.u32 g, thread, 16, g; mad.lo.u32 s, thread, 16, x; mov.u32 d, 0;"


def copies(body: str, **values):
    """32 threads with 16 bytes each: `s` in shared, `g` in global memory."""
    values = values or {"d": "u4"}
    return run(COPY + body, a=SOURCE, **values)


def test_a_copy_arrives_at_its_wait():
    start = "cp.async.cg.shared.global [s], [g], 16; cp.async.commit_group;"
    assert np.array_equal(copies(start + "cp.async.wait_group 0; ld.shared.u32 d, [s+4];"), SOURCE[1::4])
    assert np.array_equal(copies(start + "cp.async.wait_all; ld.shared.u32 d, [s+8];"), SOURCE[2::4])
    one = "cp.async.ca.shared.global [s], [g], 4; cp.async.wait_all; ld.shared.u32 d, [s];"
    assert np.array_equal(copies(one), SOURCE[0::4])
    other = f"{start} cp.async.wait_group 0; bar.sync 0;"
    other += "xor.b32 y, thread, 1; mad.lo.u32 s, y, 16, x; ld.shared.u32 d, [s];"
    assert np.array_equal(copies(other), 4 * (LANES ^ 1))


def test_a_short_source_is_filled_with_zeros_and_no_source_is_not_read():
    body = """
        and.b32 w, thread, 3;
        mul.lo.u32 w, w, 4;
        cp.async.cg.shared.global.L2::128B [s], [g], 16, w;
        cp.async.wait_all;
        ld.shared.v4.u32 {x, y, z, w}, [s];
        add.u32 d, x, y; add.u32 d, d, z; add.u32 d, d, w;
    """
    rows = SOURCE.reshape(32, 4)
    assert np.array_equal(copies(body), [row[: lane % 4].sum() for lane, row in enumerate(rows)])
    nothing = "mov.u64 g, 0; cp.async.cg.shared.global [s], [g], 16, 0; cp.async.wait_all; ld.shared.u32 d, [s];"
    assert not copies(nothing).any()


START_TWO = """
    cp.async.ca.shared.global [s], [g], 4; cp.async.commit_group;
    cp.async.ca.shared.global [s+4], [g+4], 4; cp.async.commit_group;
"""


@pytest.mark.parametrize(
    "body",
    (
        "cp.async.cg.shared.global [s], [g], 16; ld.shared.u32 d, [s];",
        "cp.async.cg.shared.global [s], [g], 16; cp.async.commit_group; ld.shared.u32 d, [s];",
        "cp.async.cg.shared.global [s], [g], 16; cp.async.wait_group 0; ld.shared.u32 d, [s];",  # not committed
        START_TWO + "cp.async.wait_group 1; ld.shared.u32 d, [s+4];",
        START_TWO + "cp.async.wait_group 2; ld.shared.u32 d, [s];",
        "cp.async.cg.shared.global [s], [g], 16; st.shared.u32 [s], d;",
    ),
)
def test_memory_that_a_copy_will_still_write_must_not_be_touched(body):
    with pytest.raises(PtxError, match="while a cp.async into it is in flight"):
        copies(body)


def test_groups_are_counted_by_thread():
    """Lanes below 16 commit an empty group more, so that keeping one group keeps nothing of theirs."""
    body = START_TWO + "setp.lt.u32 p, thread, 16; @p cp.async.commit_group; cp.async.wait_group 1;"
    first = body + "ld.shared.u32 d, [s];"
    assert np.array_equal(copies(first), SOURCE[0::4])
    assert np.array_equal(copies(body + "@p ld.shared.u32 d, [s+4];"), np.where(LANES < 16, SOURCE[1::4], 0))
    with pytest.raises(PtxError, match=r"in flight(?s:.*)thread \(16, 0, 0\)"):
        copies(body + "ld.shared.u32 d, [s+4];")


def test_a_copy_races_like_any_other_access():
    start = "cp.async.cg.shared.global [s], [g], 16; cp.async.wait_all;"
    neighbour = "xor.b32 y, thread, 1; mad.lo.u32 y, y, 16, x;"
    with pytest.raises(PtxError, match="race: the thread read"):
        copies(f"{start} {neighbour} ld.shared.u32 d, [y];")
    with pytest.raises(PtxError, match="race: the thread wrote .* read it"):
        copies(f"{neighbour} ld.shared.u32 d, [y]; {start}")
    with pytest.raises(PtxError, match="misaligned: 16 bytes"):
        copies("cp.async.cg.shared.global [s+4], [g], 16;")
    with pytest.raises(PtxError, match="of a buffer of 512 bytes"):
        copies("cp.async.cg.shared.global [s], [g+16], 16;")
