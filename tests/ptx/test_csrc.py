"""The NF4 kernels of csrc/, as nvcc compiles them for each architecture, through their own launchers."""

import math
from functools import cache

import pytest
import torch

from fastpeft.quant import NF4Weight
from fastpeft.reference import nf4 as formula
from tests.parity import assert_parity

from .faults import registers_swapped, replaced, waits_off_by_one
from .memory import Memory
from .native import Native
from .nvcc import CSRC, each_arch, needs_nvcc, ptx_of
from .parse import PtxError

pytestmark = [needs_nvcc, pytest.mark.slow]

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POISON = {torch.uint8: 0xA5}  # what an output holds before the launch; NaN where the dtype has one

FILES = "nf4_*.cu"
native = cache(Native)


def output(shape, dtype, unaligned=False):
    begin, numel = int(unaligned), math.prod(shape)
    return torch.full((numel + 1,), POISON.get(dtype, torch.nan), dtype=dtype)[begin : begin + numel].view(shape)


def same_bits(actual, expected) -> bool:
    """Of a NaN only that it is one."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    number = ~expected.isnan()
    return torch.equal(actual.isnan(), ~number) and torch.equal(actual[number].view(bits), expected[number].view(bits))


def random_weight(shape, blocksize, nested) -> NF4Weight:
    """Codes of every value, blocks of any magnitude, and a NaN and an infinity among them if not nested."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    absmax = torch.randn(blocks).exp()
    second = {}
    if nested:
        code, offset = formula.absmax_code(torch.device("cpu")), absmax.mean()
        absmax, scale = formula.quantize_absmax(absmax, offset, code)
        second = dict(absmax_code=code, absmax_scale=scale, absmax_offset=offset)
    packed = torch.randint(256, (-(-numel // 2),), dtype=torch.uint8)
    return NF4Weight(packed=packed, absmax=absmax, shape=shape, blocksize=blocksize, dtype=torch.float32, **second)


def storage(csrc: Native, memory: Memory, weight: NF4Weight):
    make, p = csrc.cuda.Nf4Storage, memory.pointer
    if not weight.nested:
        return make.plain(p(weight.packed), p(weight.absmax), weight.blocksize)
    second = (weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
    return make.nested(p(weight.packed), p(weight.absmax), *map(p, second), weight.blocksize)


# Each returns the names of the kernels that were executed, after it has checked what they wrote.


def dequantize(csrc, shape, dtype, blocksize=64, nested=False, unaligned=False):
    weight, memory, out = random_weight(shape, blocksize, nested), Memory(), output(shape, dtype, unaligned)
    if not nested:
        weight.absmax[0], weight.absmax[-1] = torch.nan, -torch.inf
    arguments = dict(out=memory.pointer(out), out_dtype=getattr(csrc.cuda.DType, DTYPES[dtype]), numel=out.numel())
    executed = csrc.run(memory, "nf4_dequantize", weight=storage(csrc, memory, weight), **arguments)
    assert same_bits(out, formula.nf4_dequantize(weight, dtype))
    return executed


def quantize(csrc, shape, dtype, blocksize=64, unaligned=False):
    weight, memory = output(shape, dtype, unaligned), Memory()
    weight.copy_(torch.randn(shape))
    weight[0, 0], weight[-1, -1] = torch.inf, torch.nan
    expected_packed, expected_absmax = formula.nf4_quantize(weight, blocksize)
    packed, absmax = output(expected_packed.shape, torch.uint8), output(expected_absmax.shape, torch.float32)
    executed = csrc.run(
        memory,
        "nf4_quantize",
        weight=memory.pointer(weight),
        weight_dtype=getattr(csrc.cuda.DType, DTYPES[dtype]),
        packed=memory.pointer(packed),
        absmax=memory.pointer(absmax),
        numel=weight.numel(),
        blocksize=blocksize,
    )
    assert torch.equal(packed, expected_packed) and same_bits(absmax, expected_absmax)
    return executed


def quantize_absmax(csrc, blocks):
    absmax, code, memory = torch.randn(blocks).exp(), formula.absmax_code(torch.device("cpu")), Memory()
    absmax[256:512] = absmax.mean()  # a group of zeros
    offset = absmax.mean()
    codes, scale = formula.quantize_absmax(absmax, offset, code)
    outputs = dict(absmax_u8=output(codes.shape, torch.uint8), absmax2=output(scale.shape, torch.float32))
    tensors = dict(absmax=absmax, offset=offset, absmax_code=code, **outputs)
    pointers = {name: memory.pointer(tensor) for name, tensor in tensors.items()}
    executed = csrc.run(memory, "nf4_quantize_absmax", **pointers, blocks=blocks)
    assert torch.equal(outputs["absmax_u8"], codes) and same_bits(outputs["absmax2"], scale)
    return executed


def merge(csrc, shape, R, dtype, blocksize=64, nested=False, scaling=1.7, factor=True, gain=True, unaligned=False):
    (N, K), memory = shape, Memory()
    weight, out = random_weight(shape, blocksize, nested), output(shape, dtype, unaligned)
    A, B = torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype)
    factor = torch.tensor(0.5) if factor else None
    gain = torch.rand(N) + 0.5 if gain else None
    executed = csrc.run(
        memory,
        "nf4_merge",
        weight=storage(csrc, memory, weight),
        lora_a=memory.pointer(A),
        lora_b=memory.pointer(B),
        scaling=scaling,
        scaling_tensor=memory.pointer(factor),
        gain=memory.pointer(gain),
        out=memory.pointer(out),
        dtype=getattr(csrc.cuda.DType, DTYPES[dtype]),
        N=N,
        K=K,
        R=R,
    )
    s = scaling if factor is None else scaling * factor
    plain = formula.nf4_merge(weight, A, B, s, gain, dtype)
    exact = formula.nf4_merge(weight, A.double(), B.double(), s, gain, torch.float64)
    assert_parity(out, plain, exact, f"nf4_merge {shape} R={R} {dtype} on sm_{csrc.arch}")
    return executed


@each_arch
def test_every_kernel_on_every_architecture(arch):
    csrc, executed = native(arch, FILES), []
    for nested in (False, True):
        for dtype in DTYPES:
            executed += dequantize(csrc, (33, 35), dtype, nested=nested)  # vectors, and a tail of one to seven elements
        for dtype in (torch.bfloat16, torch.float16):
            executed += merge(csrc, (50, 72), 24, dtype, nested=nested)
            executed += merge(csrc, (9, 43), 13, dtype, nested=nested)  # no whole vectors
    for dtype in DTYPES:
        executed += quantize(csrc, (9, 70), dtype)
        executed += quantize(csrc, (5, 30), dtype, unaligned=True)
    executed += quantize_absmax(csrc, 700)
    assert set(executed) == csrc.kernels()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_dequantize_tiles_blocksizes_and_views(dtype):
    csrc = native("80", FILES)
    dequantize(csrc, (97, 100), dtype, blocksize=32)  # more than a tile
    dequantize(csrc, (3, 1500), dtype, blocksize=4096, nested=True)
    dequantize(csrc, (7, 41), dtype, unaligned=True)
    dequantize(csrc, (1, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_quantize_tiles_blocksizes_and_views(dtype):
    csrc = native("80", FILES)
    quantize(csrc, (97, 100), dtype, blocksize=32)
    quantize(csrc, (3, 1500), dtype, blocksize=4096)
    quantize(csrc, (7, 41), dtype, unaligned=True)
    quantize(csrc, (1, 1), dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=DTYPES.get)
@pytest.mark.parametrize("R", (0, 1, 8, 64, 72, 136))
def test_merge_over_ranks(R, dtype):
    merge(native("80", FILES), (70, 136), R, dtype)


def test_merge_shapes_blocksizes_and_views():
    csrc = native("80", FILES)
    merge(csrc, (130, 72), 16, torch.float16, blocksize=32)
    merge(csrc, (3, 1500), 8, torch.bfloat16, blocksize=4096, nested=True)
    merge(csrc, (20, 64), 8, torch.bfloat16, unaligned=True)
    merge(csrc, (20, 64), 8, torch.bfloat16, factor=False, gain=False)


# ---- faults: another result, or an error

NO_BARRIER = replaced(r"bar\.sync\s+0;", "")
FAULTS = {
    "barrier missing": NO_BARRIER,
    "wait missing": replaced(r"cp\.async\.wait_group 0;", ""),
    "wait off by one": waits_off_by_one,
    "commit missing": replaced(r"cp\.async\.commit_group;", ""),
    "trans missing": replaced(r"\.trans", ""),
    "ldmatrix 1 and 2 swapped": registers_swapped("ldmatrix", 0, 1, 2),
    "mma d1 and d2 swapped": registers_swapped("mma", 0, 1, 2),
    "mma a1 and a2 swapped": registers_swapped("mma", 1, 1, 2),
    "mma b0 and b1 swapped": registers_swapped("mma", 2, 0, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_merge_is_caught(fault):
    csrc = Native("80", FILES, FAULTS[fault])
    merge_ptx = ptx_of(CSRC / "nf4_merge.cu", "80")
    assert FAULTS[fault](merge_ptx) != merge_ptx
    with pytest.raises((PtxError, AssertionError), match="PTX line|nf4_merge.* error"):
        merge(csrc, (30, 40), 72, torch.bfloat16)


def test_an_error_names_the_kernel_and_its_line():
    csrc = Native("80", FILES, NO_BARRIER)
    with pytest.raises(
        PtxError, match=r"race: (?s:.*)nf4_merge\.cu:\d+(?s:.*)nf4_merge_kernel.*, block \(0, 0, 0\), thread"
    ):
        merge(csrc, (16, 64), 8, torch.bfloat16)


def test_writing_past_the_end_is_an_error():
    csrc, memory, weight = native("80", FILES), Memory(), random_weight((8, 64), 64, False)
    out = output((8 * 64 - 1,), torch.float32)
    with pytest.raises(PtxError, match="bytes at offset 20.. of a buffer of 2044 bytes"):
        csrc.run(
            memory,
            "nf4_dequantize",
            weight=storage(csrc, memory, weight),
            out=memory.pointer(out),
            out_dtype=csrc.cuda.DType.fp32,
            numel=8 * 64,
        )
