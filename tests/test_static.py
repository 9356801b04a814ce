"""The models of the static report against NVIDIA's calculator, numbers computed by hand, and code that is known."""

import importlib.util
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from benchmarks import costs, sass, static

# A loop that copies 16 bytes, a detour around one instruction, a loop that copies two, and padding.
TWO_LOOPS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDC R1, c[0x0][0x28] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FMUL R4, R4, 2 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   IADD3 R2, P1, R2, 0x10, RZ ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/               @P2 BRA 0x90 ;
        /*0080*/                   MOV R7, RZ ;
        /*0090*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00b0*/                   BRA.U UP0, 0x90 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""
FIRST_LOOP = ["LDG.E.128", "FMUL", "STG.E.128", "IADD3", "BRA"]
UNROLLED = TWO_LOOPS.replace("@!P0 BRA 0x20", "NOP")


def listing(*lines: str) -> str:
    return "".join(f"  /*{16 * n:04x}*/  {line} ;\n" for n, line in enumerate(lines))


def opcodes(text: str, **options) -> list[str]:
    return [instruction.opcode for instruction in sass.hot_path(text, **options)]


def test_the_hot_path_is_the_loop_that_moves_most():
    assert opcodes(TWO_LOOPS) == FIRST_LOOP


def test_the_hot_path_is_the_straight_line_where_the_loop_is_a_tail():
    # The second loop is stepped over, and so is the instruction that a branch goes around.
    assert opcodes(UNROLLED) == ["S2R", "LDC", *FIRST_LOOP[:-1], "NOP", "BRA", "EXIT"]


def test_a_loop_runs_as_often_as_it_is_said_to():
    guarded = listing("@P0 BRA 0x40", "FMUL", "IADD3", "@P1 BRA 0x10", "STG.E.64", "EXIT")
    assert opcodes(guarded) == ["BRA", "STG.E.64", "EXIT"]
    assert opcodes(guarded, trips={"FMUL": 2}) == ["BRA", *2 * ["FMUL", "IADD3", "BRA"], "STG.E.64", "EXIT"]


def test_a_loop_in_a_loop_runs_that_often_in_each():
    nested = listing("S2R", "MOV", "FMUL", "@P0 BRA 0x20", "IADD3", "@P1 BRA 0x10", "STG.E.64", "EXIT")
    count = Counter(opcodes(nested, trips={"FMUL": 4, "MOV": 2}))
    assert count == {"S2R": 1, "MOV": 2, "FMUL": 8, "BRA": 10, "IADD3": 2, "STG.E.64": 1, "EXIT": 1}


def test_of_two_ways_that_move_the_same_the_one_with_fewer_accesses_is_hot():
    either = listing("@P0 BRA 0x30", "STG.E.64", "EXIT", "STG.E", "STG.E", "EXIT")
    assert opcodes(either) == ["BRA", "STG.E.64", "EXIT"]
    assert opcodes(either, cold=("STG.E.64",)) == ["BRA", "STG.E", "STG.E", "EXIT"]
    with pytest.raises(ValueError, match="keeps clear of STG"):
        opcodes(either, cold=("STG",))


def test_the_hot_path_multiplies_where_it_can():
    idle_warps_skip_it = listing("LDGSTS.E.128", "@P0 BRA 0x30", "HMMA.16816", "@P1 BRA 0x0", "STG.E.128", "EXIT")
    assert opcodes(idle_warps_skip_it) == ["LDGSTS.E.128", "BRA", "HMMA.16816", "BRA"]


def test_a_call_is_a_jump_where_nothing_returns():
    left_by_a_call = listing("HMMA.16816", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "STG.E", "EXIT")
    assert opcodes(left_by_a_call, trips={"HMMA": 1}) == ["HMMA.16816", "BRA", "STG.E", "EXIT"]
    subroutine = listing("@P0 CALL.REL.NOINC 0x30", "STG.E", "EXIT", "LDG.E.128", "RET")
    assert opcodes(subroutine) == ["CALL.REL.NOINC", "STG.E", "EXIT"]


def test_a_guarded_exit_may_end_the_hot_path():
    assert opcodes(listing("STG.E", "@P0 EXIT", "MOV", "EXIT")) == ["STG.E", "EXIT"]
    assert opcodes(listing("MOV", "@P0 EXIT", "STG.E", "EXIT")) == ["MOV", "EXIT", "STG.E", "EXIT"]


def test_out_of_line_code_that_branches_back_is_a_detour_and_no_loop():
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT"
    waits = listing(wait, "@!P0 BRA 0x50", "STG.E.64", "EXIT", "NOP", wait, "@!P0 BRA 0x50", "BRA 0x20")
    graph = sass.blocks(sass.instructions(waits))
    assert [graph[head].instructions[0].address for head in sass.loops(graph)] == [0x50]
    assert opcodes(waits) == [wait, "BRA", "STG.E.64", "EXIT"]


def test_a_kernel_without_global_memory_is_an_error():
    with pytest.raises(ValueError, match="no way through this kernel loads or stores global memory"):
        sass.hot_path(TWO_LOOPS.replace("LDG", "LDS").replace("STG", "STS"))


def test_an_indirect_branch_is_an_error():
    with pytest.raises(ValueError, match="indirect branch at 0x10"):
        sass.hot_path(TWO_LOOPS.replace("LDC R1, c[0x0][0x28]", "BRX R2 -0x10"))


def test_instructions_of_an_element():
    subject = replace(static.SUBJECTS[0], counted=("STG", 2), trips={}, cold=())
    assert static.instructions_per_element(subject, TWO_LOOPS) == 5 / 8  # 16 bytes are 8 elements of bf16
    with pytest.raises(ValueError, match="no instruction of the hot path matches RED"):
        static.instructions_per_element(replace(subject, counted=("RED", 2)), TWO_LOOPS)


@pytest.mark.parametrize(
    "opcode, moved",
    [("STG.E.128", 16), ("STG.E.64", 8), ("STG.E", 4), ("STG.E.U16", 2), ("STG.E.U8", 1), ("STG.E.ENL2.256", 32)],
)
def test_bytes_of_an_instruction(opcode, moved):
    assert sass.moved_bytes(sass.Instruction(0, "", opcode, "")) == moved
    assert sass.moved_bytes(sass.Instruction(0, "", opcode.replace("G", "S"), "")) == 0


THREADS = (32, 96, 128, 160, 256, 384, 512, 1024)
REGISTERS = (16, 24, 32, 33, 40, 64, 65, 96, 128, 168, 255)
SHARED_KB = (0, 1, 8.5, 24, 47, 48, 64, 99, 100, 163, 164, 227, 228)

CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, warps, shared_per_sm, threads, registers, shared;
  while (scanf("%d %d %d %d %d %d %d", &major, &minor, &warps, &shared_per_sm, &threads, &registers, &shared) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor, device.warpSize = 32, device.numSms = 1;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared_per_sm;
    device.sharedMemPerBlockOptin = shared_per_sm - 1024, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    """cuda_occupancy.h, which the CUDA runtime and Nsight use; Triton's wheel brings it."""
    triton = importlib.util.find_spec("triton")
    include = triton and Path(triton.origin).parent / "backends" / "nvidia" / "include"
    if include is None or not (include / "cuda_occupancy.h").exists() or shutil.which("g++") is None:
        pytest.skip("needs g++ and Triton's copy of cuda_occupancy.h")
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    subprocess.run(["g++", f"-I{include}", source, "-o", program], check=True)

    cases = [
        (arch, threads, registers, int(kb * 1024))
        for arch, threads, registers, kb in product(static.MULTIPROCESSORS, THREADS, REGISTERS, SHARED_KB)
    ]
    lines = []
    for arch, threads, registers, shared in cases:
        sm, capability = static.MULTIPROCESSORS[arch], arch.rstrip("a")
        lines.append(f"{capability[:-1]} {capability[-1]} {sm.warps} {sm.shared_bytes} {threads} {registers} {shared}")
    run = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    theirs = [int(line) for line in run.stdout.split()]
    assert len(theirs) == len(cases) and set(theirs) > {0, 1, 2, 16}
    wrong = [(case, n) for case, n in zip(cases, theirs, strict=True) if static.resident_ctas(*case) != n]
    assert not wrong, wrong[:10]


def test_occupancy_of_an_example_by_hand():
    # 8 warps of 40 registers: 1280 a warp, 12 warps a quarter, 48 an SM, 6 CTAs; 48 of 64 warps.
    assert static.resident_ctas("90a", threads=256, registers=40, shared_bytes=1088) == 6
    assert static.occupancy("90a", threads=256, registers=40, shared_bytes=1088) == 0.75
    # 100 kB and the system's 1 kB of 228 kB: two CTAs of four warps.
    assert static.occupancy("90a", threads=128, registers=32, shared_bytes=100 * 1024) == 8 / 64


def test_dequantize_moves():
    # 4096 x 4096 in blocks of 64, nested: 8 MiB of codes, 256 Ki codes of absmax, 1 Ki scales, the code and the offset.
    cost = costs.nf4_dequantize(4096 * 4096, itemsize=2)
    assert cost.read_bytes == 8_388_608 + 262_144 + 4_096 + 1_024 + 4
    assert cost.written_bytes == 33_554_432
    assert cost.cuda_core_ops == 16_777_216 + 2 * 262_144
    assert cost.tensor_core_ops == 0
    # 5 elements: 3 bytes of codes, one float32 absmax.
    assert costs.nf4_dequantize(5, itemsize=4, nested=False).bytes == 3 + 4 + 20


def test_quantize_moves():
    cost = costs.nf4_quantize(576 * 1536, itemsize=2)
    assert (cost.read_bytes, cost.written_bytes) == (1_769_472, 442_368 + 13_824 * 4)
    assert cost.cuda_core_ops == 6 * 884_736 + 13_824
    cost = costs.nf4_quantize_absmax(13_824)
    assert (cost.read_bytes, cost.written_bytes) == (55_296 + 1_024 + 4, 13_824 + 54 * 4)


def test_merge_moves():
    plain = costs.nf4_dequantize(4096 * 14336, itemsize=2)
    cost = costs.nf4_merge(4096, 14336, 16, itemsize=2, gain=True)
    assert cost.read_bytes == plain.read_bytes + 16 * (4096 + 14336) * 2 + 4096 * 4
    assert cost.written_bytes == 117_440_512
    assert cost.tensor_core_ops == 1_879_048_192
    assert cost.cuda_core_ops == plain.cuda_core_ops + 3 * 58_720_256
    assert costs.nf4_merge(4096, 14336, 0, itemsize=2) == plain


def test_norm_moves():
    cost = costs.dora_norm(4096, 14336, 16, adapter_itemsize=4)
    dequantize = costs.nf4_dequantize(4096 * 14336, itemsize=4)
    assert (cost.read_bytes, cost.written_bytes) == (dequantize.read_bytes + 16 * (4096 + 14336) * 4, 4096 * 4)
    assert cost.cuda_core_ops == dequantize.cuda_core_ops + 4 * 58_720_256
    assert cost.tensor_core_ops == 6 * 1_879_048_192
    dense = costs.dora_norm(4096, 14336, 0, adapter_itemsize=2, blocksize=None)
    assert (dense.bytes, dense.cuda_core_ops, dense.tensor_core_ops) == (117_440_512 + 4096 * 4, 2 * 58_720_256, 0)


def test_the_passes_of_dora_move():
    matrix = 8192 * 4096 * 2
    plain, gained = costs.lora_add(8192, 4096, 16, 2), costs.lora_add(8192, 4096, 16, 2, gain=True)
    assert (gained.written_bytes, gained.read_bytes - plain.read_bytes) == (2 * matrix, 4096 * 6)
    assert costs.dora_linear_gain_grad(8192, 4096, 2).bytes == 2 * matrix + 4096 * 4
    assert costs.dora_linear_add(8192, 4096, 2, operands=1).bytes == 2 * matrix + 4096 * 4


def test_decode_moves():
    # The storage of 4096 x 4096 (above), A and B of rank 16, x and y of two tokens.
    cost = costs.lora_linear_decode(2, 4096, 4096, 16, itemsize=2)
    assert cost.read_bytes == 8_655_876 + 16 * 8192 * 2 + 2 * 4096 * 2
    assert cost.written_bytes == 2 * 4096 * 2
    assert cost.tensor_core_ops == 2 * 2 * (4096 * 4096 + 16 * 8192)
    assert cost.cuda_core_ops == 16_777_216 + 2 * 262_144 + 2 * 2 * 4096
    dense = costs.lora_linear_decode(1, 1024, 4096, 0, itemsize=2, dense=True)
    assert (dense.bytes, dense.cuda_core_ops) == ((1024 * 4096 + 4096 + 1024) * 2, 0)


def test_low_rank_passes_move():
    x, A, xa = 8192 * 4096 * 2, 64 * 4096 * 2, 8192 * 64 * 2
    down, grad = costs.lora_down(8192, 4096, 64, 2), costs.lora_down_grad(8192, 4096, 64, 2)
    assert (down.read_bytes, down.written_bytes) == (x + A, xa)
    assert (grad.read_bytes, grad.written_bytes) == (x + xa, A)
    up, add = costs.lora_up_grad(8192, 4096, 64, 2), costs.lora_add(8192, 4096, 64, 2)
    assert (up.read_bytes, up.written_bytes) == (x + A + xa, A + xa)
    assert (add.read_bytes, add.written_bytes) == (x + A + xa, x)
    assert down.tensor_core_ops == grad.tensor_core_ops == add.tensor_core_ops == up.tensor_core_ops // 2
    assert down.tensor_core_ops == 4_294_967_296


def test_costs_of_prefix_attention():
    scores = costs.prefix_attention_scores(2, 4, S=3, T=5, P=7)
    assert scores == 2 * 4 * (3 * 7 + 3 + 4 + 5)  # the last query sees all five keys
    assert costs.prefix_attention_scores(2, 4, S=3, T=5, P=7, causal=False) == 2 * 4 * 3 * 12
    sizes = dict(H=4, Hkv=2, S=3, T=5, D=64, itemsize=2)
    forward, dq, dkv = (
        costs.prefix_attention(2, P=7, **sizes),
        costs.prefix_attention_dq(2, P=7, **sizes),
        costs.prefix_attention_dkv(2, **sizes),
    )
    q, k, prefix, row = 2 * 4 * 3 * 64 * 2, 2 * 2 * 5 * 64 * 2, 2 * 7 * 64 * 2, 2 * 4 * 3 * 4
    assert (forward.read_bytes, forward.written_bytes) == (q + 2 * k + 2 * prefix, q + row)
    assert (dq.read_bytes, dq.written_bytes) == (3 * q + 2 * k + 2 * prefix + row, q + row)
    assert (dkv.read_bytes, dkv.written_bytes) == (2 * q + 2 * k + 2 * row, 2 * k)
    assert (forward.tensor_core_ops, dq.tensor_core_ops) == (4 * 64 * scores, 6 * 64 * scores)
    assert dkv.tensor_core_ops == 8 * 64 * (2 * 4 * (3 + 4 + 5))


def test_floors_of_the_h100():
    (merge,) = [subject for subject in static.SUBJECTS if subject.title.startswith("nf4_merge")]
    row = static.shape_row(merge, per_element=33.0, layer="Llama-3-8B q, o", gpu=static.H100_SXM)
    moved = 8_655_876 + 64 * 8192 * 2 + 33_554_432  # storage, A and B, out
    assert row["modelled_read_bytes"] + row["modelled_written_bytes"] == moved
    assert row["modelled_memory_floor_us"] == pytest.approx(moved / 3.0e6)
    assert row["modelled_memory_floor_at_peak_us"] == pytest.approx(moved / 3.35e6)
    assert row["modelled_tensor_floor_us"] == pytest.approx(2 * 4096 * 4096 * 64 / 800e6)
    # 4096 * 4096 * 33 / 32 warp instructions, 528 a cycle, 1755 cycles a microsecond
    assert row["modelled_issue_floor_us"] == pytest.approx(17_301_504 / 528 / 1755)
    assert row["modelled_bound"] == "issue"


def test_the_table_is_aligned():
    columns = [("|name", "{name}"), ("modelled|us", "{us:.1f}")]
    rows = [{"name": "a", "us": 1.0}, {"name": "long name", "us": 123.45}]
    assert static.text_table(columns, rows).splitlines() == [
        "           modelled",
        "name             us",
        "a               1.0",
        "long name     123.5",
    ]


def test_the_summary_has_a_row_a_kernel():
    common = {"language": "cuda", "arch": "90a", "threads": "256"}
    table = [
        {**common, "name": "a_kernel<float>", "registers": "32", "shared_bytes": "64", "spill_store_bytes": "0"},
        {**common, "name": "a_kernel<int>", "registers": "128", "shared_bytes": "0", "spill_store_bytes": "8"},
        {**common, "name": "a_kernel<int>", "registers": "16", "shared_bytes": "0", "spill_store_bytes": "0"},
    ]
    table[2]["arch"] = "80"
    (row,) = static.summary_rows(table, "90a")
    assert (row["kernel"], row["instances"], row["fewest_registers"], row["most_registers"]) == ("a_kernel", 2, 32, 128)
    assert (row["most_shared_bytes"], row["spills"], row["modelled_least_occupancy"]) == (64, 1, 0.25)


def test_cost_of_scaled_columns_and_bottlenecks():
    scaled = costs.scale_columns(8, 4096, itemsize=2)
    assert scaled.read_bytes == 2 * 8 * 4096 * 2 + 4096 * 4 and scaled.written_bytes == 8 * 4096 * 2 + 4096 * 4
    cost = costs.bottleneck(8, 4096, 64, itemsize=2)
    assert cost.read_bytes == (8 + 2 * 64) * 4096 * 2 and cost.written_bytes == 8 * (4096 + 64) * 2
    assert cost.tensor_core_ops == 2 * (2 * 8 * 4096 * 64)
    gradient = costs.bottleneck_grad(8, 4096, 64, itemsize=2)
    assert gradient.read_bytes == 8 * (4096 + 64) * 2 and gradient.written_bytes == 65 * 4096 * 4
