"""Kernels around the wrappers of csrc/ptx.cuh, as nvcc compiles them for each architecture; the same with faults."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .faults import registers_swapped, replaced, waits_off_by_one
from .machine import launch, load
from .memory import Memory
from .nvcc import CSRC, each_arch, needs_nvcc, ptx_of
from .parse import PtxError

pytestmark = [needs_nvcc, pytest.mark.slow]

SOURCE = Path(__file__).with_name("kernels") / "tensor_core.cu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(ptx: str, name: str, grid, threads: int, *arguments) -> None:
    memory = Memory()
    values = [memory.pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    launch(load(ptx, name), memory, grid, (threads,), values)


def nan(*shape):
    return torch.full(shape, torch.nan)


def multiplies(ptx: str, type: str = "bf16") -> bool:
    a, b, d = random((16, 16), DTYPES[type]), random((16, 8), DTYPES[type], 1), nan(16, 8)
    run(ptx, f"mma_{type}_kernel", (1,), 32, a, b, d)
    return torch.allclose(d.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def loads_matrices(ptx: str, trans: bool) -> bool:
    tiles = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(4, 32, dtype=torch.int32)
    run(ptx, "ldmatrix_trans_kernel" if trans else "ldmatrix_kernel", (1,), 32, tiles, out)
    expected = tiles.mT.contiguous() if trans else tiles
    return torch.equal(out, expected.view(4, 64).view(torch.int32))  # a lane has two neighbours of a row


def multiplies_large(ptx: str, type: str = "bf16", shape=(50, 40, 72)) -> bool:
    M, N, K = shape
    a, b, out = random((M, K), DTYPES[type]), random((K, N), DTYPES[type], 1), nan(M, N)
    run(ptx, f"gemm_{type}_kernel", (-(-N // 32), -(-M // 32)), 64, a, b, out, M, N, K)
    return torch.allclose(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@each_arch
def test_the_wrappers_do_what_they_say(arch):
    ptx = ptx_of(SOURCE, arch)
    for type in DTYPES:
        assert multiplies(ptx, type), type
    for trans in (False, True):
        assert loads_matrices(ptx, trans), trans


@each_arch
@pytest.mark.parametrize("type", DTYPES)
def test_a_pipelined_product(type, arch):
    assert multiplies_large(ptx_of(SOURCE, arch), type)


@pytest.mark.parametrize("shape", ((1, 8, 8), (32, 32, 16), (33, 8, 40), (16, 72, 24)))
def test_a_pipelined_product_of_other_shapes(shape):
    assert multiplies_large(ptx_of(SOURCE, "80"), shape=shape)


# ---- faults, planted in the PTX. Each must be refused or give another result.


def pairs(n: int):
    return itertools.combinations(range(n), 2)


FRAGMENT_FAULTS = {
    f"mma {name}{i} and {name}{j} swapped": registers_swapped("mma", vector, i, j)
    for vector, (name, n) in enumerate((("d", 4), ("a", 4), ("b", 2), ("c", 4)))
    for i, j in pairs(n)
    if name != "c"  # zeros here; the product below adds to sums
}
LDMATRIX_FAULTS = {f"ldmatrix {i} and {j} swapped": registers_swapped("ldmatrix", 0, i, j) for i, j in pairs(4)}
PIPELINE_FAULTS = {
    **{f"mma c{i} and c{j} swapped": registers_swapped("mma", 3, i, j) for i, j in pairs(4)},
    **LDMATRIX_FAULTS,
    "trans missing": replaced(r"\.trans", ""),
    "trans where none belongs": replaced(r"x4\.shared", "x4.trans.shared"),
    "wait_group off by one": waits_off_by_one,
    "wait_group missing": replaced(r"cp\.async\.wait_group \d+;", ""),
    "commit missing": replaced(r"cp\.async\.commit_group;", ""),
    "barrier missing": replaced(r"bar\.sync\s+0;", ""),
    "zeros not filled": replaced(r"(cp\.async[^;]*, 16), %r\d+;", r"\1, 16;"),
    "bf16 read as fp16": replaced(r"bf16\.bf16", "f16.f16"),
}


def is_caught(ptx: str, check: Callable[[str], bool]) -> bool:
    try:
        return not check(ptx)
    except PtxError:
        return True


@pytest.mark.parametrize("fault", FRAGMENT_FAULTS)
def test_a_fault_in_a_fragment_is_caught(fault):
    ptx = ptx_of(SOURCE, "80")
    spoiled = FRAGMENT_FAULTS[fault](ptx)
    assert spoiled != ptx and multiplies(ptx)
    assert is_caught(spoiled, multiplies)


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_a_fault_in_a_pipeline_is_caught(fault):
    ptx = ptx_of(SOURCE, "80")
    spoiled = PIPELINE_FAULTS[fault](ptx)
    assert spoiled != ptx
    assert is_caught(spoiled, multiplies_large)


@pytest.mark.parametrize(
    "fault, message",
    (
        ("wait_group off by one", "while a cp.async into it is in flight"),
        ("commit missing", "while a cp.async into it is in flight"),
        ("barrier missing", "race: .*no barrier between"),
    ),
)
def test_the_error_names_the_fault_and_the_line(fault, message):
    spoiled = PIPELINE_FAULTS[fault](ptx_of(SOURCE, "80"))
    with pytest.raises(PtxError, match=rf"(?s){message}.*tensor_core.cu:\d+.*gemm_bf16_kernel, block"):
        multiplies_large(spoiled)


# What is wrong with the constraints shows in what the compiler makes of them, so these are planted in the wrapper.
CONSTRAINT_FAULTS = {
    "sums written, not read": ('"+f"(d[0])', '"=f"(d[0])'),
    "a generic pointer for a shared address": ('"r"(shared_address(row))', '"l"(row)'),
    "a register of 16 bits": ('"r"(b[0])', '"h"(static_cast<uint16_t>(b[0]))'),
    "a copy from the address of its target": ('"l"(gmem)', '"l"(smem)'),
    "an operand twice": ('"r"(a[2]), "r"(a[3])', '"r"(a[2]), "r"(a[2])'),
}


@pytest.mark.parametrize("fault", CONSTRAINT_FAULTS)
def test_a_wrong_constraint_is_caught(fault, tmp_path):
    right, wrong = CONSTRAINT_FAULTS[fault]
    header = (CSRC / "ptx.cuh").read_text()
    assert right in header, "the wrapper was rewritten: plant the fault anew"
    (tmp_path / "ptx.cuh").write_text(header.replace(right, wrong))
    assert is_caught(ptx_of(SOURCE, "80", includes=[tmp_path, CSRC]), multiplies_large)
