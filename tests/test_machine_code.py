"""Gates on the machine code of every kernel, for every architecture, without a GPU: it compiles, does not spill, fits
into shared memory, and holds the instructions that it was written for.

Half an hour of two cores for all of it: `make gates` compiles everything and writes benchmarks/machine_code.csv. `make
test` asks the same of that record, which has to be of these sources. It compiles one configuration of each kernel for
the oldest and the newest architecture, and a random twentieth of all; what comes out has to be what the record says.
"""

import csv
import json
import os
import random
import re
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton compiles half of the kernels, and its wheel has cuobjdump")

from benchmarks import launches, machine_code, sass, static
from benchmarks.machine_code import ROOT, SETUP

pytestmark = pytest.mark.slow

EVERYTHING = os.environ.get("FASTPEFT_GATES") == "all"
CUDA_ARCHS = machine_code.CUDA_ARCHS if EVERYTHING else ("80", "120a")
TRITON_ARCHS = machine_code.TRITON_ARCHS if EVERYTHING else ("80", "120a")

needs_nvcc = pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="nvcc is not installed (PATH, CUDA_HOME)")
each_language = pytest.mark.parametrize("language", [pytest.param("cuda", marks=needs_nvcc), "triton"])

# Kernels that may spill: (file, a part of the kernel's name, architecture) -> why.
SPILLS_EXPLAINED: dict[tuple[str, str, str], str] = {}

# (kernels: a part of the name of a CUDA kernel, or of the case that runs a Triton kernel; opcodes, from the beginning)
CUDA_INSTRUCTIONS = [
    # Tensor cores, fed by ldmatrix, for A transposed, out of what cp.async has brought.
    ("nf4_merge_kernel", [r"HMMA\.16816", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDGSTS\..*128"]),
    ("nf4_merge_kernel<__nv_bfloat16, true, true>", [r"HMMA\.16816\.F32\.BF16", r"STG\.E\.128"]),
    # Weights are read past the caches, fragments of A and B out of them.
    ("dora_norm_kernel<Nf4Vectors", [r"HMMA\.16816", r"LDG\.E\.EF\.128", r"LDG\.E\.128\.CONSTANT", r"SHFL"]),
    ("dora_norm_kernel<DenseVectors<__nv_bfloat16>, __nv_bfloat16", [r"HMMA\.16816\.F32\.BF16", r"LDG\.E\.EF\.128"]),
    ("dora_norm_kernel<DenseVectors<__half>, __half", [r"HMMA\.16816\.F32 ?$", r"LDG\.E\.EF\.128"]),
    ("nf4_dequantize_kernel", [r"STG\.E\.128"]),
    ("nf4_quantize_kernel<__nv_bfloat16, true>", [r"LDG\..*128"]),
    ("lora_down_kernel", [r"HMMA\.16816", r"LDSM\.16\.M88\.4", r"LDGSTS\..*128"]),
    ("lora_down_kernel<__nv_bfloat16, 64, true, false>", [r"LDSM\.16\.MT88\.4"]),
    ("lora_grad_kernel", [r"HMMA\.16816", r"LDSM\.16\.MT88\.4", r"LDGSTS\..*128"]),
    ("lora_add_kernel", [r"HMMA\.16816", r"LDSM\.16\.M88\.4", r"LDGSTS\..*128", r"STG\.E\.128"]),
    ("dora_linear_add_kernel<__nv_bfloat16, true>", [r"LDG\.E\.128", r"STG\.E\.128"]),
    ("dora_linear_gain_grad_kernel<__nv_bfloat16, true>", [r"LDG\.E\.128"]),
    ("lora_add_partials_kernel", [r"LDG\..*128"]),
    ("lora_pack_kernel", [r"STG\.E\.128"]),
    # Codes of 16 weights at a time, each byte put into an address by one PRMT.
    ("lora_linear_decode_kernel", [r"HMMA\.16816", r"LDGSTS\..*128", r"LDS\.128"]),
    ("Nf4Rows<", [r"LDG\..*64", r"PRMT"]),
    ("DenseRows<", [r"LDG\..*128"]),
    ("lora_linear_decode_finish_kernel", [r"LDG\..*128", r"LDS\.128"]),
    (
        "prefix_attention_decode_kernel",
        [r"HMMA\.16816", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDGSTS\..*128", r"STG\.E\.128"],
    ),
    ("prefix_attention_decode_finish_kernel", [r"LDG\..*128", r"STG\.E\.64"]),
]
TRITON_INSTRUCTIONS = [
    (f"nf4_dequantize {absmax}dtype={dtype} blocksize=64 numel=4096 aligned=True", [r"STG\.E\.128"])
    for dtype in ("bf16", "fp32")
    for absmax in ("", "nested ")
] + [("nf4_quantize dtype=bf16 blocksize=64 numel=4096 aligned=True", [r"LDG\.E\.128"])]
TRITON_INSTRUCTIONS += [  # tensor cores, by the instruction of each generation
    (
        f"dora_norm {weight} blocksize=64 K=4096 R=16 aligned=True factor=False",
        [r"(HMMA|HGMMA|UTCHMMA)", r"LDG\.E\.128"],
    )
    for weight in ("weight=nf4 nested adapter=bf16", "weight=bf16 adapter=bf16", "weight=nf4 adapter=fp32")
]
TRITON_INSTRUCTIONS += [
    ("dora_linear_add dtype=bf16 N=4096 gain=True offset=matrix keep=True", [r"LDG\.E\.128", r"STG\.E\.128"]),
    ("dora_linear_gain_grad dtype=bf16 M=8192 N=4096", [r"LDG\.E\.128"]),
]
_LIGHT = "dtype=bf16 adapter=bf16 R=16 N=32768 K=32768"
TRITON_INSTRUCTIONS += [
    # What is multiplied comes by cp.async, 16 bytes at a time, codes included; nothing comes in bytes but absmax.
    (f"lora_linear_{direction} light {_LIGHT} weight=nested M={M}", [r"LDGSTS\..*128", r"STG\.E\.128"])
    for direction in ("fwd", "dx")
    for M in (16, 512)
] + [(f"{name} {_LIGHT} M=8192", [r"LDGSTS\..*128"]) for name in ("lora_down light", "lora_up_grad heavy")]
TRITON_INSTRUCTIONS += [
    # Keys, values and queries come by cp.async, 16 bytes at a time.
    (f"prefix_attention_{name} light D={D} dtype=bf16", [r"LDGSTS\..*128"])
    for name in ("fwd", "fwd few", "dq", "dkv", "dprefix", "merge", "add_dq")
    for D in (64, 128, 256)
]
TRITON_INSTRUCTIONS += [
    ("scale_columns dx+sums dtype=bf16 C=4096", [r"LDG\.E\.128", r"STG\.E\.128"]),
    ("bottleneck_fwd dtype=bf16 bias=fp32 R=64 K=4096 activation=gelu", [r"LDGSTS\..*128"]),
    ("bottleneck_bwd dtype=bf16 bias=fp32 R=64 K=4096 activation=gelu", [r"LDGSTS\..*128"]),
]
# With 64 tokens and more a product is that of its generation: wgmma on Hopper, tcgen05 on Blackwell.
TRITON_MATRIX_INSTRUCTION = {
    "80": r"HMMA\.16816",
    "90a": r"HGMMA\.64x",
    "100a": r"UTCHMMA",
    "120a": r"HMMA\.16816",
}


@pytest.fixture(scope="module")
def kernels():
    """The CUDA kernels, and one configuration of each Triton kernel; in `make gates` all."""
    if EVERYTHING:
        return machine_code.compile_all()
    record, cases = machine_code.read_record(), {}
    if stale := machine_code.stale(record):
        pytest.fail(f"benchmarks/machine_code.csv is not of these sources, run `make gates`: {', '.join(stale)}")
    for row in record:  # of each function the first
        if row["language"] == "triton":
            op, function = row["file"].removesuffix(".py"), re.match(r"\w+", row["name"])[0]
            cases.setdefault(op, {}).setdefault(function, row["cases"].split(machine_code.SEPARATOR)[0])
    jobs = [
        partial(machine_code.triton_kernels, op, arch, tuple(sorted(set(of_op.values()))))
        for op, of_op in cases.items()
        for arch in TRITON_ARCHS
    ]
    if SETUP["find_nvcc"]():
        jobs += [partial(machine_code.cuda_kernels, source, CUDA_ARCHS) for source in machine_code.cuda_files()]
    return machine_code.in_parallel(jobs)


def of(language, kernels):
    return [kernel for kernel in kernels if kernel.language == language]


def functions(pattern: str, folder: str, suffixes: str) -> set[str]:
    """Names of the kernels that the sources define."""
    files = [path for path in (ROOT / folder).iterdir() if path.suffix in suffixes.split()]
    return {name for path in files for name in re.findall(pattern, path.read_text())}


CUDA_FUNCTIONS = functions(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", "csrc", ".cu .cuh")
TRITON_FUNCTIONS = functions(r"(?m)^def (\w+_kernel)\(", "triton_kernels", ".py")


def not_compiled(names, archs, kernels):
    compiled = {(kernel.function, kernel.arch) for kernel in kernels}
    return sorted({(name, arch) for name in names for arch in archs} - compiled)


@pytest.fixture(scope="module")
def known(request):
    """All kernels for all architectures: as `make gates` has compiled them, else as the record says."""
    rows = machine_code.rows_of(request.getfixturevalue("kernels")) if EVERYTHING else machine_code.read_record()
    numbers = [name for name in rows[0] if name in ("threads", "registers") or name.endswith("bytes")]
    changed = {
        "function": lambda row: re.match(r"\w+", row["name"])[0],
        "cases": lambda row: row["cases"].split(machine_code.SEPARATOR),
        "opcodes": lambda row: row["opcodes"].split(),
    }
    return [
        SimpleNamespace(**row | {name: int(row[name]) for name in numbers} | {n: f(row) for n, f in changed.items()})
        for row in rows
    ]


def differing(kernels, rows):
    """What came out otherwise than the record says; of a compiler that the record is not of, nothing."""
    recorded, compilers = {machine_code.key(row): row for row in rows}, {row["compiler"] for row in rows}
    found = []
    for now in machine_code.rows_of([k for k in kernels if machine_code.compiler(k.language) in compilers]):
        then = recorded.get(machine_code.key(now))
        if then is None:
            found.append(f"{now['name']}, sm_{now['arch']}: not in the record")
        else:
            # Not all cases that run it have been compiled.
            changed = [f"{n} {then[n]} -> {now[n]}" for n in now if n != "cases" and now[n] != then[n]]
            found += [f"{now['name']}, sm_{now['arch']}: {', '.join(changed)}"] if changed else []
    return found


def test_the_record_is_of_these_sources():
    assert not machine_code.stale(machine_code.read_record()), "run `make gates` and commit machine_code.csv"


def test_what_is_compiled_is_what_the_record_says(kernels):
    found = differing(kernels, machine_code.read_record())
    assert not found, "\n".join(found)


@pytest.mark.skipif(EVERYTHING, reason="all is compiled")
def test_a_random_twentieth_is_what_the_record_says(kernels):
    record = machine_code.read_record()
    sample = machine_code.compile_sample(record, 1 / 20, random.Random())
    assert sample
    print("\n".join(f"{kernel.name}, sm_{kernel.arch}" for kernel in sample))
    found = differing(sample, record)
    assert not found, "\n".join(found)


def test_another_record_is_reported():
    record = machine_code.read_record()
    assert machine_code.stale([record[0] | {"sources": "another"}, *record[1:]])
    ops = {row["file"] for row in record if row["language"] == "triton"}
    assert machine_code.stale([row for row in record if row["file"] != min(ops)]) == [f"triton {min(ops)}"]


def test_what_differs_from_the_record_is_reported(kernels):
    row = machine_code.row(kernels[0])
    assert not differing(kernels[:1], [row])
    assert "not in the record" in differing(kernels[:1], [row | {"name": "another_kernel"}])[0]
    assert "registers 1 ->" in differing(kernels[:1], [row | {"registers": "1"}])[0]
    assert not differing(kernels[:1], [row | {"registers": "1", "compiler": "nvcc 1"}])


def test_the_sources_of_a_kernel_are_all_that_it_includes():
    names = [path.name for path in machine_code._cuda_sources(ROOT / "csrc" / "nf4_merge.cu")]
    assert {"nf4_merge.cu", "nf4.cuh", "common.cuh", "ptx.cuh"} <= set(names) < {*os.listdir(ROOT / "csrc")}
    names = [path.name for path in machine_code._triton_sources("dora_norm")]
    assert set(names) == {"dora_norm.py", "nf4.py", "casts.py", "launches.py"}


@each_language
def test_every_kernel_compiles_for_every_architecture(known, language):
    names, archs = {
        "cuda": (CUDA_FUNCTIONS, machine_code.CUDA_ARCHS),
        "triton": (TRITON_FUNCTIONS, machine_code.TRITON_ARCHS),
    }[language]
    assert names
    assert not not_compiled(names, archs, of(language, known)), "for Triton, is it in benchmarks/launches.py?"


def test_a_kernel_that_nobody_launches_is_reported(kernels):
    missing = not_compiled({"nf4_dequantize_kernel", "forgotten_kernel"}, ("80",), of("triton", kernels))
    assert missing == [("forgotten_kernel", "80")]


def spilling(kernels):
    """Those with local memory at all: an array that is indexed by a variable is as slow as a spill."""

    def is_explained(kernel):
        return any(
            kernel.file == file and part in kernel.name and kernel.arch == arch for file, part, arch in SPILLS_EXPLAINED
        )

    return [
        f"{k.name}, sm_{k.arch}: {k.spill_store_bytes} bytes stored, {k.spill_load_bytes} loaded, stack {k.stack_bytes}"
        for k in kernels
        if (k.spill_store_bytes or k.spill_load_bytes or k.stack_bytes) and not is_explained(k)
    ]


@each_language
def test_no_kernel_spills(known, language):
    assert not spilling(of(language, known)), "\n".join(spilling(of(language, known)))


def too_large(kernels):
    return [
        f"{k.name} on sm_{k.arch}: {k.shared_bytes} bytes of shared memory"
        for k in kernels
        if k.shared_bytes > static.MULTIPROCESSORS[k.arch].shared_bytes_of_cta
    ]


@each_language
def test_shared_memory_fits(known, language):
    assert not too_large(of(language, known)), "\n".join(too_large(of(language, known)))


@pytest.mark.parametrize("arch, kb", [("80", 163), ("86", 99), ("89", 99), ("90a", 227), ("100a", 227), ("120a", 99)])
def test_what_does_not_fit_into_shared_memory_is_reported(kernels, arch, kb):
    kernel = replace(kernels[0], arch=arch, shared_bytes=kb * 1024)
    assert not too_large([kernel])
    assert too_large([replace(kernel, shared_bytes=kb * 1024 + 1)])


def missing_instructions(kernel, patterns):
    return [pattern for pattern in patterns if not any(re.match(pattern, opcode) for opcode in kernel.opcodes)]


@pytest.mark.parametrize("name, patterns", CUDA_INSTRUCTIONS)
def test_cuda_kernels_have_their_instructions(known, name, patterns):
    chosen = [kernel for kernel in of("cuda", known) if name in kernel.name]
    assert {kernel.arch for kernel in chosen} == set(machine_code.CUDA_ARCHS)
    missing = {(k.name, k.arch): absent for k in chosen if (absent := missing_instructions(k, patterns))}
    assert not missing


@pytest.mark.parametrize("case, patterns", TRITON_INSTRUCTIONS)
def test_triton_kernels_have_their_instructions(known, case, patterns):
    sums = ("sum_partials_kernel", "dora_norm_sum_kernel")  # launched beside
    chosen = [kernel for kernel in of("triton", known) if case in kernel.cases and kernel.function not in sums]
    assert sorted(kernel.arch for kernel in chosen) == sorted(machine_code.TRITON_ARCHS)
    missing = {(k.name, k.arch): absent for k in chosen if (absent := missing_instructions(k, patterns))}
    assert not missing


def serialized(kernels):
    """Those of which ptxas says C7510: each wgmma waits for the one before."""
    said = {k.binary.parent: json.loads((k.binary.parent / "kernels.json").read_text()) for k in kernels}
    logs = {folder / kernel["binary"]: kernel["log"] for folder, compiled in said.items() for kernel in compiled}
    return [f"{k.name}, sm_{k.arch}" for k in kernels if "C7510" in logs[k.binary]]


def test_triton_products_are_those_of_the_architecture(known):
    products = [k for k in of("triton", known) if k.function == "lora_linear_kernel"]
    large = [k for k in products if any(re.search(r" M=(64|512)$", case) for case in k.cases)]
    attention = r"prefix_attention_(fwd|dq|dkv|merge) (light|heavy) D=(64|128) "
    large += [k for k in of("triton", known) if any(re.match(attention, case) for case in k.cases)]
    assert {k.arch for k in large} == set(machine_code.TRITON_ARCHS)
    missing = [(k.name, k.arch) for k in large if missing_instructions(k, [TRITON_MATRIX_INSTRUCTION[k.arch]])]
    assert not missing


def test_no_product_is_serialized(kernels):
    assert not serialized(of("triton", kernels))


def test_a_serialized_product_is_reported(kernels, tmp_path):
    (tmp_path / "kernels.json").write_text('[{"binary": "a.cubin", "log": "C7510: Potential Performance Loss"}]')
    kernel = replace(of("triton", kernels)[0], binary=tmp_path / "a.cubin")
    assert serialized([kernel]) == [f"{kernel.name}, sm_{kernel.arch}"]


def test_a_kernel_without_tensor_cores_is_reported(known):
    kernel = next(k for k in known if k.function == "nf4_dequantize_kernel" and k.arch == "80")
    assert missing_instructions(kernel, [r"HMMA\.16816", r"STG"]) == [r"HMMA\.16816"]


def test_triton_compiles_what_the_arguments_make_of_it():
    """The launches end in the specializations that Triton would make on a GPU: by alignment, but not by each size."""
    names = [f"blocks={blocks} aligned={aligned}"
             for blocks, aligned in ((4096, True), (4096, False), (4095, True), (2**31 + 32, True))]  # fmt: skip
    cases = tuple(f"nf4_quantize_absmax {name}" for name in names)
    compiled = machine_code.triton_kernels("nf4", "80", cases)
    absmax = [kernel for kernel in compiled if kernel.function == "nf4_quantize_absmax_kernel"]
    aligned, view, odd, large = (next(k for k in absmax if case in k.cases) for case in cases)
    assert "absmax: *fp32D," in aligned.name and "absmax: *fp32," in view.name
    assert aligned is odd  # `blocks` is not specialized on
    assert aligned is not large  # but its type is


def test_the_record_has_every_kernel_once():
    rows = machine_code.read_record()
    assert len(rows) == len({machine_code.key(row) for row in rows})  # two ops may launch the same kernel
    assert {"registers", "shared_bytes", "spill_store_bytes", "instructions", "compiler"} < set(rows[0])


@needs_nvcc
@pytest.mark.parametrize("arch", TRITON_ARCHS)
def test_the_static_report_finds_its_kernels(kernels, arch):
    for subject in static.SUBJECTS:
        found = static.kernels_of(subject, [kernel for kernel in kernels if kernel.arch == arch])
        languages = ("cuda", "triton") if EVERYTHING else ("cuda",)
        found = [kernel for kernel in found if kernel.language in languages]
        written = [language for language in languages if getattr(subject, language)]
        assert sorted(kernel.language for kernel in found) == written
        for kernel in found:
            row = static.kernel_row(subject, kernel)
            assert 0 < row["modelled_occupancy"] <= 1
            assert 1 < row["modelled_instructions_per_element"] < 500


@needs_nvcc
def test_the_hot_path_of_a_merge_multiplies(kernels):
    (subject,) = [subject for subject in static.SUBJECTS if subject.title.startswith("nf4_merge")]
    for kernel in static.kernels_of(subject, kernels):
        path = [i.opcode for i in sass.hot_path(kernel.sass(), subject.trips, subject.cold)]
        # A warp has 32 x 64 of out: 2 x 8 products of 16 x 8, in four steps of 16 ranks. A thread stores 64 elements.
        assert sum(opcode.startswith("HMMA") for opcode in path) == 2 * 8 * 4
        assert sum(opcode.startswith("STG.E.128") for opcode in path) == 64 * 2 // 16


@needs_nvcc
def test_the_hot_path_of_a_norm(kernels):
    (subject,) = [subject for subject in static.SUBJECTS if subject.title.startswith("dora_norm")]
    for kernel in static.kernels_of(subject, kernels):
        path = [i.opcode for i in sass.hot_path(kernel.sass(), subject.trips, subject.cold)]
        # A lane has 128 weights: a look-up each, and in 4 steps 2 x 4 products of 16 x 8. No barrier is in their way.
        assert sum(opcode.startswith("SHFL") for opcode in path) == 128
        assert sum(opcode.startswith("HMMA") for opcode in path) == 4 * 2 * 4
        assert not any(opcode.startswith("BAR") for opcode in path)


@needs_nvcc
@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_decoding_a_token_takes_at_most_five_instructions_a_weight(kernels, arch):
    (subject,) = [subject for subject in static.SUBJECTS if subject.title.endswith("nested, rank 16, M = 1")]
    (kernel,) = [kernel for kernel in static.kernels_of(subject, kernels) if kernel.arch == arch]
    path = [i.opcode for i in sass.hot_path(kernel.sass(), subject.trips, subject.cold)]
    # A warp multiplies 32 rows by 64 elements of K, in four steps of two products, in each of the four stages that a
    # turn of the loop has: a thread looks up a pair for each of 32 bytes.
    assert sum(opcode.startswith("HMMA") for opcode in path) == 4 * 4 * 2
    assert sum(opcode.startswith("PRMT") for opcode in path) == 4 * 32
    assert static.instructions_per_element(subject, kernel.sass()) <= 5


def test_the_static_report_without_nvcc(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SETUP, "find_nvcc", lambda: None)
    assert static.main(["--op", "nf4_dequantize", "--csv", str(tmp_path / "report.csv")]) == 0
    out, err = capsys.readouterr()
    assert "nvcc is not installed" in err
    assert "modelled, nothing measured" in out
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["language"], row["layer"]) for row in rows] == [("triton", layer) for layer in static.SHAPES]
    assert float(rows[0]["modelled_memory_floor_us"]) == pytest.approx(14.07, abs=0.01)


def test_the_static_report_of_a_cuda_kernel_without_nvcc(monkeypatch, capsys):
    monkeypatch.setitem(SETUP, "find_nvcc", lambda: None)
    assert static.main(["--op", "nf4_merge"]) == 1
    assert "nf4_merge is CUDA only" in capsys.readouterr().err


def test_the_static_report_refuses_an_unknown_kernel(capsys):
    with pytest.raises(SystemExit):
        static.main(["--op", "nf5"])
    assert "no kernel begins with 'nf5'" in capsys.readouterr().err


# What compiles, on files of its own.


@pytest.fixture
def compile_source(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "KEPT", tmp_path / "kept")

    def compile_text(text):
        (tmp_path / "source.cu").write_text(text)
        return machine_code.cuda_kernels(tmp_path / "source.cu", ("80",))

    return compile_text


@needs_nvcc
def test_a_spill_is_reported(compile_source):
    # 64 accumulators do not fit into the 32 registers that two CTAs of 1024 threads leave to a thread.
    (kernel,) = compile_source("""
        __global__ void __launch_bounds__(1024, 2) greedy_kernel(float* x, int n) {
          float sum[64];
          for (int i = 0; i < 64; ++i) sum[i] = x[i * 1024 + threadIdx.x];
          for (int j = 0; j < n; ++j)
            for (int i = 0; i < 64; ++i) sum[i] = sum[i] * sum[(i + 1) % 64] + x[j];
          for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = sum[i];
        }""")
    assert (kernel.name, kernel.threads, kernel.registers) == ("greedy_kernel", 1024, 32)
    assert kernel.spill_store_bytes > 0 and kernel.spill_load_bytes > 0
    assert spilling([kernel])


COPY = """
    namespace fastpeft { namespace {
    struct Pair { float* a; };
    template <class T, int N> __global__ void BOUNDS copy_kernel(Pair x, T* y) {
      SHARED
      s[threadIdx.x] = x.a[threadIdx.x];
      __syncthreads();
      y[threadIdx.x] = s[N - threadIdx.x];
    } }
    void* instances[] = {(void*)copy_kernel<float, 7>, (void*)copy_kernel<int, 8>};
    }"""
BOUNDED = COPY.replace("BOUNDS", "__launch_bounds__(64)")
DYNAMIC = BOUNDED.replace("SHARED", "extern __shared__ float s[];")


@needs_nvcc
def test_names_and_static_shared_memory(compile_source):
    found = compile_source(BOUNDED.replace("SHARED", "__shared__ float s[64];"))
    seen = {(k.name, k.function, k.threads, k.shared_bytes, k.arch) for k in found}
    names = ("copy_kernel<float, 7>", "copy_kernel<int, 8>")
    assert seen == {(name, "copy_kernel", 64, 256, "80") for name in names}


@needs_nvcc
def test_dynamic_shared_memory_has_to_be_said(compile_source, monkeypatch):
    with pytest.raises(RuntimeError, match=r"copy_kernel<\w+, \d> uses dynamic shared memory"):
        compile_source(DYNAMIC)
    monkeypatch.setitem(launches.CUDA_DYNAMIC_SHARED_BYTES, "copy_kernel<.*>", 100 * 1024)
    assert [kernel.shared_bytes for kernel in compile_source(DYNAMIC)] == [100 * 1024] * 2


@needs_nvcc
def test_launch_bounds_are_required(compile_source):
    with pytest.raises(RuntimeError, match="needs __launch_bounds__"):
        compile_source(COPY.replace("BOUNDS", "").replace("SHARED", "__shared__ float s[64];"))


@needs_nvcc
def test_what_does_not_compile_is_an_error_and_not_kept(compile_source):
    for _ in range(2):
        with pytest.raises(RuntimeError, match='(?s)could not compile source.cu.*identifier "oops" is undefined'):
            compile_source("__global__ void a_kernel() { oops; }")


def test_a_case_that_there_is_not_is_an_error(compile_source):
    with pytest.raises(RuntimeError, match="(?s)do not compile for sm_80.*no such case"):
        machine_code.triton_kernels("nf4", "80", ("no such case",))


def test_two_that_want_the_same_compile_it_once(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "KEPT", tmp_path)
    filled = []

    def fill(folder):
        filled.append(folder)
        time.sleep(0.1)
        (folder / "done").touch()

    def want():
        assert (machine_code._kept("stem", [], ["option"], fill) / "done").exists()

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
