"""The kernels on paper: bytes, operations, floors, occupancy and instructions, modelled from source and machine code.

    python -m benchmarks.static [--arch 90a] [--op nf4] [--csv FILE]

Nothing here is measured and no GPU is needed; benchmarks/results holds what was measured. The model:

- memory floor: the bytes of costs.py, each once and from DRAM, at the bandwidth of the GPU;
- tensor floor: the operations of costs.py that tensor cores do, at their rate;
- issue floor: instructions of the hot path (sass.py) for an element, times elements, at one instruction a cycle from
  each of the four schedulers of every SM;
- occupancy: resident warps as NVIDIA's calculator counts them, from threads, registers and shared memory.

No latency is in it, no bank conflict, no launch and no tail of the last wave.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import costs, machine_code, sass
from benchmarks.machine_code import Kernel

SHAPES = {  # [N, K] of the linear layers of
    "Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B k, v": (1024, 4096),
    "Llama-3-8B gate, up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "SmolLM2-135M down": (576, 1536),
}
# [queries of a sequence, slots of the prefix] of an attention with the heads of Llama-3-8B: 32, 8 of keys, of size 128;
# 8 sequences, causal.
TRAINING_ATTENTIONS = {"Llama-3-8B, P = 20": (1024, 20), "Llama-3-8B, P = 64": (4096, 64)}
# 32 sequences, over the prefix alone.
DECODING_ATTENTIONS = {"Llama-3-8B, P = 4096": (1, 4096), "Llama-3-8B, P = 16384": (1, 16384)}
_HEADS = dict(H=32, Hkv=8, D=128, itemsize=2)


@dataclass(frozen=True)
class Gpu:
    """Ceilings. `peak` is the data sheet's, the other what kernels reach at best."""

    name: str
    memory_peak: float  # bytes a second
    memory: float
    tensor_peak: float  # dense bf16 operations a second
    tensor: float
    sms: int
    clock: float  # Hz


# Peaks and SMs: NVIDIA H100 data sheet (SXM5). 90% of the bandwidth is what plain copies, and 80% of the matrix peak
# what large cuBLAS products are reported to reach. The clock is the PCIe card's boost: SXM5 may run at 1.98 GHz and
# falls under load, so the issue times are cautious.
H100_SXM = Gpu("H100 SXM", 3.35e12, 3.0e12, 989e12, 800e12, 132, 1.755e9)
GPUS = {"90a": H100_SXM}
SCHEDULERS = 4  # an SM's, on every architecture here; each issues at most one warp instruction a cycle


@dataclass(frozen=True)
class Multiprocessor:
    """What the CTAs on one SM share (CUDA Programming Guide, "Technical Specifications per Compute Capability")."""

    warps: int
    ctas: int
    shared_bytes: int

    @property
    def shared_bytes_of_cta(self) -> int:
        """What a CTA may ask for: the system keeps 1 kB of each CTA's."""
        return self.shared_bytes - _RESERVED


_RESERVED = 1024
_REGISTERS = 64 * 1024
MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "86": Multiprocessor(48, 16, 100 * 1024),
    "89": Multiprocessor(48, 24, 100 * 1024),
    "90a": Multiprocessor(64, 32, 228 * 1024),
    "100a": Multiprocessor(64, 32, 228 * 1024),
    "120a": Multiprocessor(48, 24, 100 * 1024),
}


def resident_ctas(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """CTAs that fit on an SM at once, by the rules of NVIDIA's calculator (cuda_occupancy.h of the toolkit).

    A warp gets registers by 256, out of its scheduler's quarter of the register file; a CTA gets shared memory by 128
    bytes, 1 kB for the system on top.
    """
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    registers_of_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = SCHEDULERS * (_REGISTERS // SCHEDULERS // registers_of_warp)
    shared = -(-(shared_bytes + _RESERVED) // 128) * 128
    return min(sm.warps // warps, sm.ctas, warps_by_registers // warps, sm.shared_bytes // shared)


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """Resident warps over the most that an SM can hold."""
    return resident_ctas(arch, threads, registers, shared_bytes) * -(-threads // 32) / MULTIPROCESSORS[arch].warps


@dataclass(frozen=True)
class Subject:
    """A kernel as a QLoRA run launches it, and how to count in its machine code."""

    title: str
    op: str  # the file in triton_kernels
    cuda: str | None  # the instance
    triton: str | None  # the case of launches.py
    cost: Callable[[int, int], costs.Cost]  # of N, K
    elements: Callable[[int, int], int]  # of N, K
    counted: tuple[str, float]  # elements in the hot path: bytes moved by opcodes that match, over bytes of an element
    trips: dict[str, int] = field(default_factory=dict)  # see sass.hot_path
    cold: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, int]] = field(default_factory=lambda: SHAPES)


_BLOCKSIZE = 64
_RANK = 64  # four steps of 16 for the tensor cores
_LOW_RANK = 16
_TOKENS = 8192  # of a training step

SUBJECTS = (
    Subject(
        "nf4_dequantize, bf16, nested",
        "nf4",
        cuda="nf4_dequantize_kernel<__nv_bfloat16, true>",
        triton="nf4_dequantize nested dtype=bf16 blocksize=64 numel=4096 aligned=True",
        cost=lambda N, K: costs.nf4_dequantize(N * K, 2, _BLOCKSIZE),
        elements=lambda N, K: N * K,
        counted=("STG", 2),
    ),
    Subject(
        f"nf4_merge, bf16, nested, rank {_RANK}",
        "nf4",
        cuda="nf4_merge_kernel<__nv_bfloat16, true, true>",
        triton=None,
        cost=lambda N, K: costs.nf4_merge(N, K, _RANK, 2, _BLOCKSIZE),
        elements=lambda N, K: N * K,
        counted=("STG", 2),
        trips={"HMMA": _RANK // 16, "LDG": 1},  # the product; the loop over chunks of 64 ranks, and that over absmax
        cold=("LDG.E.U16",),  # where A is not aligned
    ),
    Subject(
        "dora_norm, NF4 nested, bf16 adapters of rank 16",
        "dora_norm",
        cuda="dora_norm_kernel<Nf4Vectors<true>, __nv_bfloat16, 1>",
        triton=None,  # it loads A by the same instruction as the codes
        cost=lambda N, K: costs.dora_norm(N, K, 16, 2, _BLOCKSIZE),
        elements=lambda N, K: N * K,
        counted=(r"LDG\.E\.EF", 0.5),  # the codes alone are not to stay in the caches
    ),
    Subject(
        "nf4_quantize, bf16",
        "nf4",
        cuda="nf4_quantize_kernel<__nv_bfloat16, true>",
        triton="nf4_quantize dtype=bf16 blocksize=64 numel=4096 aligned=True",
        cost=lambda N, K: costs.nf4_quantize(N * K, 2, _BLOCKSIZE),
        elements=lambda N, K: N * K,
        counted=(r"LDG\..*128", 2),
        cold=("REDUX",),  # the last block, where it is short
    ),
    Subject(
        "nf4_quantize_absmax",
        "nf4",
        cuda="nf4_quantize_absmax_kernel",
        triton="nf4_quantize_absmax blocks=4096 aligned=True",
        cost=lambda N, K: costs.nf4_quantize_absmax(-(-N * K // _BLOCKSIZE)),
        elements=lambda N, K: -(-N * K // _BLOCKSIZE),
        counted=(r"STG\.E\.U(8|16)", 1),
    ),
    *(
        Subject(
            f"lora_linear_decode, bf16, nested, rank {_LOW_RANK}, M = {M}",
            "lora_linear",
            cuda=f"lora_linear_decode_kernel<__nv_bfloat16, Nf4Rows<__nv_bfloat16, true>, {tiles}>",
            triton=None,
            cost=lambda N, K, M=M: costs.lora_linear_decode(M, N, K, _LOW_RANK, 2, _BLOCKSIZE),
            elements=lambda N, K: N * K,
            counted=(r"LDG\..*64", 0.5),  # codes, eight bytes at a time
            cold=("STG",),  # where a sum ends
        )
        for M, tiles in ((1, 1), (16, 2), (32, 4), (64, 8))
    ),
    Subject(
        f"lora_linear_decode, bf16, dense, rank {_LOW_RANK}, M = 1",
        "lora_linear",
        cuda="lora_linear_decode_kernel<__nv_bfloat16, DenseRows<__nv_bfloat16, __nv_bfloat16>, 1>",
        triton=None,
        cost=lambda N, K: costs.lora_linear_decode(1, N, K, _LOW_RANK, 2, dense=True),
        elements=lambda N, K: N * K,
        counted=(r"LDG\..*128", 2),
        cold=("STG",),
    ),
    # What a step copies for an element of x or dy: its own two bytes and its part of the panel.
    Subject(
        f"lora_down, bf16, rank {_RANK}, M = {_TOKENS}",
        "lora_linear",
        cuda="lora_down_kernel<__nv_bfloat16, 64, false, false>",
        triton=None,
        cost=lambda N, K: costs.lora_down(_TOKENS, K, _RANK, 2),
        elements=lambda N, K: _TOKENS * K,
        counted=("LDGSTS", 2 * (64 + _RANK) / 64),
    ),
    Subject(
        f"lora_down with dropout, bf16, rank {_RANK}, M = {_TOKENS}",
        "lora_linear",
        cuda="lora_down_kernel<__nv_bfloat16, 64, false, true>",
        triton=None,
        cost=lambda N, K: costs.lora_down(_TOKENS, K, _RANK, 2),
        elements=lambda N, K: _TOKENS * K,
        counted=("LDGSTS", 2 * (64 + _RANK) / 64),
    ),
    Subject(
        f"lora_down_grad, bf16, rank {_RANK}, M = {_TOKENS}",
        "lora_linear",
        cuda="lora_grad_kernel<__nv_bfloat16, 64, (Product)0>",
        triton=None,
        cost=lambda N, K: costs.lora_down_grad(_TOKENS, K, _RANK, 2),
        elements=lambda N, K: _TOKENS * K,
        counted=("LDGSTS", 2 * (256 + _RANK) / 256),
    ),
    Subject(
        f"lora_up_grad, bf16, rank {_LOW_RANK}, M = {_TOKENS}",
        "lora_linear",
        cuda="lora_grad_kernel<__nv_bfloat16, 16, (Product)3>",
        triton=None,
        cost=lambda N, K: costs.lora_up_grad(_TOKENS, N, _LOW_RANK, 2),
        elements=lambda N, K: _TOKENS * N,
        counted=("LDGSTS", 2 * (512 + 128) / 512),  # the panel is too small for all threads: a quarter copy
    ),
    Subject(
        f"lora_add, bf16, rank {_RANK}, M = {_TOKENS}",
        "lora_linear",
        cuda="lora_add_kernel<__nv_bfloat16, false, false>",
        triton=None,
        cost=lambda N, K: costs.lora_add(_TOKENS, N, _RANK, 2),
        elements=lambda N, K: _TOKENS * N,
        counted=(r"STG\.E\.128", 2),  # the way of a float32 B, which loads most
        trips={"HMMA": _RANK // 32},  # the ranks that are in shared memory at a time
    ),
    Subject(
        f"lora_add with DoRA's gain, bf16, rank {_RANK}, M = {_TOKENS}",
        "lora_linear",
        cuda="lora_add_kernel<__nv_bfloat16, false, true>",
        triton=None,
        cost=lambda N, K: costs.lora_add(_TOKENS, N, _RANK, 2, gain=True),
        elements=lambda N, K: _TOKENS * N,
        counted=(r"STG\.E\.128", 4),  # both outputs
        trips={"HMMA": _RANK // 32},
    ),
    Subject(
        f"dora_linear_gain_grad, bf16, M = {_TOKENS}",
        "dora_linear",
        cuda="dora_linear_gain_grad_kernel<__nv_bfloat16, true>",
        triton=f"dora_linear_gain_grad dtype=bf16 M={_TOKENS} N=4096",
        cost=lambda N, K: costs.dora_linear_gain_grad(_TOKENS, N, 2),
        elements=lambda N, K: _TOKENS * N,
        counted=(r"LDG\.E\.128", 4),  # dy and z
    ),
    Subject(
        f"dora_linear_add with dropout, bf16, M = {_TOKENS}",
        "dora_linear",
        cuda="dora_linear_add_kernel<__nv_bfloat16, true>",
        triton="dora_linear_add dtype=bf16 N=4096 gain=True offset=matrix keep=True",
        cost=lambda N, K: costs.dora_linear_add(_TOKENS, N, 2),
        elements=lambda N, K: _TOKENS * N,
        counted=(r"STG\.E\.128", 2),
    ),
    # Triton. A step copies codes and a tile of x, which stays for all 128 features: for an element of the weight half a
    # byte, and two for each token of the tile over the features.
    *(
        Subject(
            f"lora_linear_{direction}, bf16, nested, rank {_LOW_RANK}, M = {M}",
            "lora_linear",
            cuda=None,
            triton=f"lora_linear_{direction} light dtype=bf16 adapter=bf16 R=16 N=32768 K=32768 weight=nested M={M}",
            cost=cost,
            elements=lambda N, K, M=M, rows=rows: N * K * M // rows,  # each tile of tokens dequantizes all of them
            counted=(r"LDGSTS\..*128", 0.5 + 2 * rows / 128),
        )
        for M, rows in ((16, 16), (512, 128))
        for direction, cost in (
            ("fwd", lambda N, K, M=M: costs.lora_linear(M, N, K, _LOW_RANK, 2, _BLOCKSIZE)),
            ("dx", lambda N, K, M=M: costs.lora_linear(M, K, N, _LOW_RANK, 2, _BLOCKSIZE)),
        )
    ),
    *(
        Subject(
            f"{pass_}, bf16, rank {_LOW_RANK}, M = {_TOKENS}, Triton",
            "lora_linear",
            cuda=None,
            triton=f"{pass_.split()[0]} {case} dtype=bf16 adapter=bf16 R=16 N=32768 K=32768 M=8192",
            cost=lambda N, K, cost=cost, width=width: cost(_TOKENS, width(N, K), _LOW_RANK, 2),
            elements=lambda N, K, width=width: _TOKENS * width(N, K),
            counted=(r"LDGSTS\..*128", 2),
        )
        for pass_, case, cost, width in (
            ("lora_down", "light", costs.lora_down, lambda N, K: K),
            ("lora_down with dropout", "heavy", costs.lora_down, lambda N, K: K),
            ("lora_down_grad", "light", costs.lora_down_grad, lambda N, K: K),
            ("lora_down_grad with dropout", "heavy", costs.lora_down_grad, lambda N, K: K),
            ("lora_up_grad", "heavy", costs.lora_up_grad, lambda N, K: N),
        )
    ),
    # Attention; an element is a score. A step copies keys and values (dkv: queries and their gradients) for as many
    # rows as a tile has: of a head, 4 bytes of each of its elements.
    *(
        Subject(
            f"prefix_attention_{name}, bf16",
            "prefix_attention",
            cuda=None,
            triton=f"prefix_attention_{name} light D=128 dtype=bf16",
            cost=cost,
            elements=lambda N, K, slots=slots: costs.prefix_attention_scores(8, 32, N, N, K if slots else 0),
            counted=(r"LDGSTS\..*128", 4 * 128 / rows),
            shapes=TRAINING_ATTENTIONS,
        )
        for name, rows, slots, cost in (
            ("fwd", 64, True, lambda N, K: costs.prefix_attention(8, S=N, T=N, P=K, **_HEADS)),
            ("dq", 64, True, lambda N, K: costs.prefix_attention_dq(8, S=N, T=N, P=K, **_HEADS)),
            ("dkv", 64, False, lambda N, K: costs.prefix_attention_dkv(8, S=N, T=N, **_HEADS)),
        )
    ),
    Subject(
        "prefix_attention_decode, bf16, 32 sequences",
        "prefix_attention",
        cuda="prefix_attention_decode_kernel<__nv_bfloat16, 128>",
        triton=None,
        cost=lambda N, K: costs.prefix_attention(32, S=N, T=0, P=K, causal=False, **_HEADS),
        elements=lambda N, K: costs.prefix_attention_scores(32, 32, N, 0, K, causal=False),
        counted=(r"LDGSTS\..*128", 4 * 128 / 64),
        cold=("LDG.E.U8", "MUFU.RCP"),  # padding, softcap
        shapes=DECODING_ATTENTIONS,
    ),
    Subject(
        f"scale_columns, dx and sums, bf16, M = {_TOKENS}",
        "ia3",
        cuda=None,
        triton="scale_columns dx+sums dtype=bf16 C=4096",
        cost=lambda N, K: costs.scale_columns(_TOKENS, K, 2),
        elements=lambda N, K: _TOKENS * K,
        counted=(r"STG\.E\.128", 2),
    ),
    # A step of a bottleneck's second loop stores a tile; its first loop is counted with it, as many elements a step.
    *(
        Subject(
            f"bottleneck_{direction}, bf16, gelu, rank {_RANK}, M = {_TOKENS}",
            "bottleneck",
            cuda=None,
            triton=f"bottleneck_{direction} dtype=bf16 bias=fp32 R=64 K=4096 activation=gelu",
            cost=lambda N, K: costs.bottleneck(_TOKENS, K, _RANK, 2),
            elements=lambda N, K: _TOKENS * K,
            counted=("STG", 2),
        )
        for direction in ("fwd", "bwd")
    ),
    *(
        Subject(
            f"bottleneck_grad of {factor}, bf16, gelu, rank {_RANK}, M = {_TOKENS}",
            "bottleneck",
            cuda=None,
            triton=f"bottleneck_grad {factor} dtype=bf16 bias=fp32 R=64 K=4096 activation=gelu",
            cost=lambda N, K: costs.bottleneck_grad(_TOKENS, K, _RANK, 2),
            elements=lambda N, K: _TOKENS * K,
            counted=(r"LDGSTS\..*128", 2 * (128 + _RANK) / 128),  # a tile of x and its part of the other operand
        )
        for factor in ("up", "down")
    ),
)


def instructions_per_element(subject: Subject, code: str) -> float:
    """What a thread issues on the hot path over the elements that it handles there."""
    path = sass.hot_path(code, subject.trips, subject.cold)
    pattern, itemsize = subject.counted
    moved = sum(sass.moved_bytes(i) for i in path if re.match(pattern, i.opcode))
    if moved == 0:
        raise ValueError(f"{subject.title}: no instruction of the hot path matches {pattern}")
    return len(path) / (moved / itemsize)


def kernels_of(subject: Subject, compiled: list[Kernel]) -> list[Kernel]:
    """Its CUDA kernel and its Triton kernel, those of them that were compiled; not what adds parts of sums up."""
    launched = [k for k in compiled if subject.triton in k.cases and k.function != "sum_partials_kernel"]
    return [k for k in compiled if k.name == subject.cuda] + launched


def compile_subjects(subjects: list[Subject], arch: str) -> list[Kernel]:
    """What the report is about and nothing else of Triton's; without nvcc it says so, and has no CUDA kernels."""
    jobs = []
    for op in dict.fromkeys(subject.op for subject in subjects):
        cases = tuple(subject.triton for subject in subjects if subject.op == op and subject.triton)
        jobs += [partial(machine_code.triton_kernels, op, arch, cases)] if cases else []
    if machine_code.SETUP["find_nvcc"]():
        jobs += [partial(machine_code.cuda_kernels, source, (arch,)) for source in machine_code.cuda_files()]
    else:
        print("nvcc is not installed (PATH, CUDA_HOME): the CUDA kernels are left out", file=sys.stderr)
    return machine_code.in_parallel(jobs)


def kernel_row(subject: Subject, kernel: Kernel) -> dict:
    resources = (kernel.arch, kernel.threads, kernel.registers, kernel.shared_bytes)
    return {
        "kernel": subject.title,
        "language": kernel.language,
        "arch": kernel.arch,
        "threads_of_cta": kernel.threads,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
        "modelled_ctas_per_sm": resident_ctas(*resources),
        "modelled_occupancy": occupancy(*resources),
        "modelled_instructions_per_element": instructions_per_element(subject, kernel.sass()),
    }


def shape_row(subject: Subject, per_element: float, layer: str, gpu: Gpu) -> dict:
    N, K = subject.shapes[layer]
    cost = subject.cost(N, K)
    warp_instructions = per_element * subject.elements(N, K) / 32
    floors = {
        "memory": cost.bytes / gpu.memory,
        "tensor": cost.tensor_core_ops / gpu.tensor,
        "issue": warp_instructions / (gpu.sms * SCHEDULERS * gpu.clock),
    }
    return {
        "layer": layer,
        "N": N,
        "K": K,
        "modelled_read_bytes": cost.read_bytes,
        "modelled_written_bytes": cost.written_bytes,
        "modelled_cuda_core_ops": cost.cuda_core_ops,
        "modelled_tensor_core_ops": cost.tensor_core_ops,
        "modelled_memory_floor_at_peak_us": cost.bytes / gpu.memory_peak * 1e6,
        "modelled_memory_floor_us": floors["memory"] * 1e6,
        "modelled_tensor_floor_at_peak_us": cost.tensor_core_ops / gpu.tensor_peak * 1e6,
        "modelled_tensor_floor_us": floors["tensor"] * 1e6,
        "modelled_issue_floor_us": floors["issue"] * 1e6,
        "modelled_bound": max(floors, key=floors.get),
    }


def text_table(columns: list[tuple[str, str]], rows: list[dict]) -> str:
    """`columns`: (header of two lines, format of a row). Numbers are aligned to the right."""
    headers = [header.split("|") for header, _ in columns]
    cells = [[cell.format(**row) for _, cell in columns] for row in rows]
    lines = [[upper for upper, _ in headers], [lower for _, lower in headers], *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [cell[:1].isdigit() for cell in cells[0]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


_KERNEL_COLUMNS = [
    ("|kernel", "{kernel}"),
    ("|language", "{language}"),
    ("compiled|threads", "{threads_of_cta}"),
    ("compiled|registers", "{registers}"),
    ("compiled|shared B", "{shared_bytes}"),
    ("modelled|CTAs/SM", "{modelled_ctas_per_sm}"),
    ("modelled|occupancy", "{modelled_occupancy:.0%}"),
    ("modelled|instructions/element", "{modelled_instructions_per_element:.1f}"),
]
_SHAPE_COLUMNS = [
    ("|kernel", "{kernel}"),
    ("|language", "{language}"),
    ("|layer", "{layer}"),
    ("|[N, K]", "[{N}, {K}]"),
    ("modelled|MB read", "{read:.2f}"),
    ("modelled|MB written", "{written:.2f}"),
    ("modelled|Mop", "{cuda_core:.1f}"),
    ("modelled|tensor Mop", "{tensor_core:.0f}"),
    ("modelled|memory us", "{modelled_memory_floor_us:.2f}"),
    ("modelled|at peak us", "{modelled_memory_floor_at_peak_us:.2f}"),
    ("modelled|tensor us", "{modelled_tensor_floor_us:.2f}"),
    ("modelled|issue us", "{modelled_issue_floor_us:.2f}"),
    ("modelled|bound by", "{modelled_bound}"),
]


def summary_rows(table: list[dict], arch: str) -> list[dict]:
    """Every kernel of the CSV of machine_code.py for `arch`, all its instances in a row."""
    instances: dict[tuple[str, str], list[dict]] = {}
    for row in table:
        if row["arch"] == arch:
            instances.setdefault((re.match(r"\w+", row["name"])[0], row["language"]), []).append(row)
    rows = []
    for (name, language), found in sorted(instances.items()):
        sizes = [[int(row[column]) for column in ("threads", "registers", "shared_bytes")] for row in found]
        rows.append(
            {
                "kernel": name,
                "language": language,
                "instances": len(found),
                "fewest_registers": min(registers for _, registers, _ in sizes),
                "most_registers": max(registers for _, registers, _ in sizes),
                "most_shared_bytes": max(shared for _, _, shared in sizes),
                "spills": sum(row["spill_store_bytes"] != "0" for row in found),
                "modelled_least_occupancy": min(occupancy(arch, *size) for size in sizes),
            }
        )
    return rows


_SUMMARY_COLUMNS = [
    ("|kernel", "{kernel}"),
    ("|language", "{language}"),
    ("compiled|instances", "{instances}"),
    ("compiled|registers", "{fewest_registers}-{most_registers}"),
    ("compiled|most shared B", "{most_shared_bytes}"),
    ("compiled|that spill", "{spills}"),
    ("modelled|least occupancy", "{modelled_least_occupancy:.0%}"),
]


def summary(arch: str) -> str:
    table = machine_code.read_record()
    rows = summary_rows(table, arch)
    compilers = " and ".join(sorted({row["compiler"] for row in table}))
    title = f"Every instance, as {compilers} compiled it into {machine_code.RECORD.relative_to(machine_code.ROOT)}"
    return "\n".join([title, "", text_table(_SUMMARY_COLUMNS, rows)]) if rows else ""


def report(rows: list[dict], arch: str) -> str:
    kernels = list({(row["kernel"], row["language"]): row for row in rows}.values())
    title = f"Kernels on sm_{arch}: modelled, nothing measured"
    parts = [title, "", text_table(_KERNEL_COLUMNS, kernels)]
    gpu = GPUS.get(arch)
    if gpu is None:
        return "\n".join([*parts, "", f"No ceilings are known for a GPU of sm_{arch}, hence no floors."])
    shapes = [
        {
            **row,
            "read": row["modelled_read_bytes"] / 1e6,
            "written": row["modelled_written_bytes"] / 1e6,
            "cuda_core": row["modelled_cuda_core_ops"] / 1e6,
            "tensor_core": row["modelled_tensor_core_ops"] / 1e6,
        }
        for row in rows
    ]
    ceilings = (
        f"{gpu.memory / 1e12:g} TB/s (peak {gpu.memory_peak / 1e12:g}), "
        f"{gpu.tensor / 1e12:g} TFLOP/s dense bf16 (peak {gpu.tensor_peak / 1e12:g}), "
        f"{gpu.sms} SMs of {SCHEDULERS} schedulers at {gpu.clock / 1e9:g} GHz"
    )
    return "\n".join(
        [
            *parts,
            "",
            f"Floors on {gpu.name}: modelled, nothing measured. Ceilings: {ceilings}",
            "",
            text_table(_SHAPE_COLUMNS, shapes),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description="The kernels on paper, modelled.")
    parser.add_argument("--arch", default="90a", choices=machine_code.CUDA_ARCHS)
    parser.add_argument("--op", help="only kernels whose name begins like this: nf4, nf4_merge")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(arguments)

    subjects = [subject for subject in SUBJECTS if subject.title.startswith(options.op or "")]
    if not subjects:
        parser.error(f"no kernel begins with {options.op!r}; there are {', '.join(s.title for s in SUBJECTS)}")
    compiled = compile_subjects(subjects, options.arch)
    gpu, rows = GPUS.get(options.arch), []
    for subject in subjects:
        for kernel in kernels_of(subject, compiled):
            row = kernel_row(subject, kernel)
            layers = subject.shapes if gpu else ()
            rows += [
                {**row, **shape_row(subject, row["modelled_instructions_per_element"], layer, gpu)} for layer in layers
            ] or [row]
    if not rows:
        print(f"{options.op} is CUDA only: without nvcc there is nothing to report", file=sys.stderr)
        return 1
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(report(rows, options.arch))
    print("\n" + summary(options.arch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
