"""What dispatch can launch: every configuration of every Triton op once, and the dynamic shared memory of CUDA kernels.

    python -m benchmarks.launches nf4 90a FOLDER [CASE ...]      compiles the launches of triton_kernels/nf4.py

That is a process in which a launch compiles and runs nothing; machine_code.py starts it and reads FOLDER. The tensors
are on "meta": they have a shape, a dtype and an alignment, but no memory, so that the largest sizes cost nothing.

A new op: a generator that takes the module triton_kernels/<op>.py and yields (case, launch), and its line in TRITON.
What Triton specializes on, a case must vary: dtypes, None or a tensor, constants, pointers aligned to 16 bytes or not,
and integers that are 1, a multiple of 16, larger than 32 bits, or neither.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SIZES = (1, 4095, 4096, 2**31 + 15, 2**31 + 32)
_GROUP = 256  # absmax values that share a second-level scale

Launches = Iterator[tuple[str, Callable[[], None]]]


def _tensor(numel: int, dtype: torch.dtype, aligned: bool) -> Tensor:
    """Aligned as what torch allocates is; else like a view that begins at its second element."""
    return torch.empty(numel + 1, dtype=dtype, device="meta")[0 if aligned else 1 :][:numel]


def _case(**configuration) -> str:
    return " ".join(f"{name}={value}" for name, value in configuration.items())


def _nf4(kernels) -> Launches:
    # In full, sizes, alignment and block sizes would be 40 versions of each kernel, dtype and kind of absmax. Sizes and
    # alignment decide how wide accesses are, block sizes how values are shared: each is varied with the other at rest.
    # Dtypes decide how wide a value is: two of them at best and at worst.
    shapes = [(blocksize, 4096, True) for blocksize in _BLOCKSIZES]
    shapes += [(64, numel, True) for numel in _SIZES if numel != 4096] + [(64, 4095, False), (64, 4096, False)]
    others = list(product(("fp16", "fp32"), [(64, 4096, True), (64, 4095, False)]))
    for name, (blocksize, numel, aligned) in [*product(["bf16"], shapes), *others]:
        dtype = _DTYPES[name]
        packed, out = _tensor(-(-numel // 2), torch.uint8, aligned), _tensor(numel, dtype, aligned)
        case = _case(dtype=name, blocksize=blocksize, numel=numel, aligned=aligned)
        blocks = -(-numel // blocksize)
        absmax, codes = _tensor(blocks, torch.float32, aligned), _tensor(blocks, torch.uint8, aligned)
        sizes = {"absmax_code": _GROUP, "absmax_scale": -(-blocks // _GROUP), "absmax_offset": 1}
        nested = [_tensor(size, torch.float32, aligned) for size in sizes.values()]
        dequantize = kernels.nf4_dequantize
        yield f"nf4_dequantize {case}", partial(dequantize, packed, absmax, None, None, None, blocksize, out)
        yield f"nf4_dequantize nested {case}", partial(dequantize, packed, codes, *nested, blocksize, out)

    shapes += [(blocksize, 4095, True) for blocksize in _BLOCKSIZES if blocksize != 64]  # the last block is short
    for name, (blocksize, numel, aligned) in [*product(["bf16"], shapes), *others]:
        dtype = _DTYPES[name]
        weight, packed = _tensor(numel, dtype, aligned), _tensor(-(-numel // 2), torch.uint8, aligned)
        absmax = _tensor(-(-numel // blocksize), torch.float32, aligned)
        case = _case(dtype=name, blocksize=blocksize, numel=numel, aligned=aligned)
        yield f"nf4_quantize {case}", partial(kernels.nf4_quantize, weight, blocksize, packed, absmax)

    for blocks, aligned in product(_SIZES, (True, False)):
        absmax, codes = _tensor(blocks, torch.float32, aligned), _tensor(blocks, torch.uint8, aligned)
        offset, code, scale = (_tensor(n, torch.float32, aligned) for n in (1, _GROUP, -(-blocks // _GROUP)))
        yield (
            f"nf4_quantize_absmax {_case(blocks=blocks, aligned=aligned)}",
            partial(kernels.nf4_quantize_absmax, absmax, offset, code, codes, scale),
        )


def _lora_linear(kernels) -> Launches:
    # Tokens choose the tile. Each is compiled as QLoRA mostly runs it ("light"), where no sum is shared, and with all
    # that takes registers ("heavy"): many ranks, adapters in float32, a bias or dropout. Then storage and shapes that
    # take other code, and what no tile divides.
    light = dict(dtype="bf16", adapter="bf16", R=16, N=32768, K=32768)
    heavy = dict(dtype="fp16", adapter="fp32", R=64, N=4096, K=4096)
    odd = dict(dtype="bf16", adapter="fp32", R=13, N=1001, K=1000)
    cases = [("light", dict(light, weight="nested", M=M)) for M in (16, 512)]
    cases += [("heavy", dict(heavy, weight="nested", M=M)) for M in (16, 32, 64, 512)]
    cases += [("heavy", dict(heavy, weight="plain", M=64))]
    cases += [("heavy", dict(odd, weight="nested", M=M, K=K)) for M, K in ((64, 1000), (512, 1000), (64, 1008))]
    cases += [("heavy", dict(heavy, weight="dense", M=M)) for M in (16, 32, 64, 512)]
    cases += [("heavy", dict(odd, weight="dense", M=64))]
    for extras, shape in cases:
        x, dy, xa, seed, A, B, bias = _lora_tensors(**shape)
        weight = _lora_weight(**shape)
        bias, seed, p = (bias, seed, 0.1) if extras == "heavy" else (None, None, 0.0)
        case = f"{extras} {_case(**shape)}"
        yield f"lora_linear_fwd {case}", partial(kernels.lora_linear_fwd, x, weight, xa, B, bias, 2.0, dy)
        yield f"lora_linear_dx {case}", partial(kernels.lora_linear_dx, dy, weight, xa, A, 2.0, seed, p, x)

    cases = [("heavy", dict(odd, M=32)), ("light", dict(light, M=8192)), ("heavy", dict(light, M=8192))]
    cases += [("heavy", dict(heavy, M=8192)), ("light", dict(light, M=16))]
    for extras, shape in cases:
        x, dy, xa, seed, A, B, _ = _lora_tensors(**shape)
        seed, p = (seed, 0.1) if extras == "heavy" else (None, 0.0)
        case = f"{extras} {_case(**shape)}"
        yield f"lora_down {case}", partial(kernels.lora_down, x, A, seed, p, xa)
        yield f"lora_down_grad {case}", partial(kernels.lora_down_grad, x, xa, seed, p, 2.0, A)
        if extras == "heavy":  # it has no dropout
            yield f"lora_up_grad {case}", partial(kernels.lora_up_grad, dy, B, xa, xa, B, 2.0)


def _lora_tensors(dtype, adapter, R, N, K, M, weight=None) -> list[Tensor]:
    """x, dy, xa, seed, A, B, bias; outputs have the shape of one of them."""
    shapes = ((M, K), _DTYPES[dtype]), ((M, N), _DTYPES[dtype]), ((M, R), _DTYPES[dtype]), ((1,), torch.int64)
    shapes += ((R, K), _DTYPES[adapter]), ((N, R), _DTYPES[adapter]), ((N,), _DTYPES[dtype])
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]


def _lora_weight(weight, dtype, N, K, **_) -> Tensor | tuple:
    if weight == "dense":
        return torch.empty(N, K, dtype=_DTYPES[dtype], device="meta")
    packed, blocks = _tensor(-(-N * K // 2), torch.uint8, True), -(-N * K // 64)
    if weight == "plain":
        return packed, _tensor(blocks, torch.float32, True), None, None, None, 64
    sizes = _GROUP, -(-blocks // _GROUP), 1
    nested = [_tensor(size, torch.float32, True) for size in sizes]
    return packed, _tensor(blocks, torch.uint8, True), *nested, 64


def _dora_norm(kernels) -> Launches:
    # The dtypes decide the product, the weight and K how weights are loaded: in full, once at best and once at worst.
    # What else there is, is varied with those at rest.
    usual = dict(weight="nf4 nested", adapter="bf16", blocksize=64, K=4096, R=16, aligned=True, factor=False)
    dtypes = [(weight, adapter) for weight in ("nf4", "nf4 nested") for adapter in _DTYPES]
    dtypes += [(half, adapter) for half in ("bf16", "fp16") for adapter in (half, "fp32")]
    variants = [dict(weight=weight, adapter=adapter) for weight, adapter in dtypes]
    variants += [variant | dict(K=4095, R=100, aligned=False, factor=True) for variant in variants]
    variants += [dict(blocksize=blocksize) for blocksize in (32, 4096)]
    variants += [dict(adapter="fp32", R=64), dict(R=13), dict(R=0), dict(K=4104), dict(K=32), dict(factor=True)]
    for variant in variants:
        yield f"dora_norm {_case(**usual | variant)}", _dora_norm_launch(kernels, **usual | variant)


def _dora_norm_launch(kernels, weight, adapter, blocksize, K, R, aligned, factor) -> Callable[[], None]:
    N = 4096
    if weight in _DTYPES:
        storage = _tensor(N * K, _DTYPES[weight], aligned).view(N, K)
    else:
        blocks = -(-N * K // blocksize)
        absmax = _tensor(blocks, torch.uint8 if "nested" in weight else torch.float32, aligned)
        sizes = (_GROUP, -(-blocks // _GROUP), 1)
        nested = [_tensor(n, torch.float32, aligned) if "nested" in weight else None for n in sizes]
        storage = (_tensor(-(-N * K // 2), torch.uint8, aligned), absmax, *nested, blocksize)
    A, B = (
        _tensor(rows * columns, _DTYPES[adapter], aligned).view(rows, columns) for rows, columns in ((R, K), (N, R))
    )
    norm = _tensor(N, torch.float32, aligned)
    scaling = _tensor(1, torch.float32, aligned) if factor else None
    return partial(kernels.dora_norm, storage, A, B, 2.0, scaling, norm)


def _dora_linear(kernels) -> Launches:
    # What add leaves out (gain, offset, the mask) and what is a row or a matrix; then rows that no vector divides.
    parts = [dict(gain=True, offset="row", keep=False), dict(gain=True, offset="matrix", keep=True)]
    parts += [dict(gain=False, offset=None, keep=True), dict(gain=True, offset=None, keep=False)]
    cases = [dict(dtype=dtype, N=4096) | part for dtype, part in product(("bf16", "fp16"), parts)]
    cases += [case | dict(N=1001) for case in cases[:2]]
    for case in cases:
        dtype, N = _DTYPES[case["dtype"]], case["N"]
        x, row = torch.empty(8192, N, dtype=dtype, device="meta"), torch.empty(N, dtype=dtype, device="meta")
        gain, seed = row.float() if case["gain"] else None, row[:1].long() if case["keep"] else None
        offset = {"row": row, "matrix": x, None: None}[case["offset"]]
        launch = partial(kernels.dora_linear_add, x, gain, offset, seed, 0.1 if case["keep"] else 0.0, x)
        yield f"dora_linear_add {_case(**case)}", launch
    for dtype, M, N in (("bf16", 8192, 4096), ("fp16", 8192, 4096), ("bf16", 8192, 1001), ("bf16", 16, 4096)):
        x, gain = torch.empty(M, N, dtype=_DTYPES[dtype], device="meta"), torch.empty(N, device="meta")
        case = _case(dtype=dtype, M=M, N=N)
        yield f"dora_linear_gain_grad {case}", partial(kernels.dora_linear_gain_grad, x, x, gain)


def _prefix_attention(kernels) -> Launches:
    # Head sizes choose the tile; 96 leaves columns of it empty. "light" is a causal attention as most models have it,
    # "heavy" all that takes registers, where there are most of them, and "packed" the bounds of documents.
    cases = [("light", dict(D=D, dtype="bf16")) for D in (64, 128, 256)]
    cases += [("heavy", dict(D=D, dtype="fp16")) for D in (128, 256)]
    cases += [("packed", dict(D=96, dtype="bf16")), ("packed full", dict(D=64, dtype="bf16"))]
    for extras, shape in cases:
        q, k, row, prefix, cu_seqlens, mask, form = _attention(extras, **shape)
        case = f"{extras} {_case(**shape)}"
        masks, few, T = (cu_seqlens, mask, form), q[:, :, :16], k.shape[2]
        forward = kernels.prefix_attention_fwd
        yield f"prefix_attention_fwd {case}", partial(forward, q, k, k, prefix, prefix, *masks, q, row)
        if cu_seqlens is None:
            few = partial(forward, few, k, k, prefix, prefix, *masks, few, row)
            yield f"prefix_attention_fwd few {case}", few
        dq = partial(kernels.prefix_attention_dq, q, q, k, k, prefix, prefix, *masks, q, row, row, q)
        yield f"prefix_attention_dq {case}", dq
        dkv = partial(kernels.prefix_attention_dkv, q, q, k, k, prefix, *masks, row, row, k, k)
        yield f"prefix_attention_dkv {case}", dkv
        sums = (row, row, prefix.float(), prefix.float())
        dprefix = partial(kernels.prefix_attention_dprefix, q, q, prefix, prefix, cu_seqlens, T, form, *sums)
        yield f"prefix_attention_dprefix {case}", dprefix
        if extras in ("light", "packed"):  # beside another kernel, which has no softcap either
            merge = partial(kernels.prefix_attention_merge, q, prefix, prefix, cu_seqlens, T, form, q, row)
            yield f"prefix_attention_merge {case}", merge
            add_dq = partial(kernels.prefix_attention_add_dq, q, q, prefix, prefix, cu_seqlens, T, form, q, row, row, q)
            yield f"prefix_attention_add_dq {case}", add_dq


def _attention(extras, D, dtype) -> tuple:
    """q, k, a float32 for each row, prefix, cu_seqlens, mask, form; q and k lie as a projection leaves them."""
    B, H, Hkv, S, P = 2, 32, 8, 4096, 64
    if extras.startswith("packed"):
        B, S = 1, B * S
    empty = partial(torch.empty, device="meta")
    q, k = (empty(B, S, heads, D, dtype=_DTYPES[dtype]).transpose(1, 2) for heads in (H, Hkv))
    form = SimpleNamespace(causal="full" not in extras, scale=D**-0.5, window=None, softcap=None)
    cu_seqlens = empty(9, dtype=torch.int32) if extras.startswith("packed") else None
    mask = empty(B, S, dtype=torch.uint8) if extras == "heavy" else None
    if extras == "heavy":
        form.softcap = 50.0
    if extras in ("heavy", "packed"):
        form.window = 1000
    return q, k, empty(B, H, S), empty(Hkv, P, D, dtype=_DTYPES[dtype]), cu_seqlens, mask, form


def _ia3(kernels) -> Launches:
    # Backward with both gradients, each alone, and forward. Both dtypes; columns that no tile divides.
    for (dtype, C), wanted in product((("bf16", 4096), ("fp16", 1001)), (("dx", "sums"), ("sums",), ("dx",))):
        dy, x, dx = (torch.empty(8192, C, dtype=_DTYPES[dtype], device="meta") for _ in range(3))
        gain, sums = (torch.empty(C, dtype=torch.float32, device="meta") for _ in range(2))
        tensors = (dy, x if "sums" in wanted else None, gain)
        outputs = (dx if "dx" in wanted else None, sums if "sums" in wanted else None)
        yield (
            f"scale_columns {'+'.join(wanted)} {_case(dtype=dtype, C=C)}",
            partial(kernels.scale_columns, *tensors, *outputs),
        )


def _bottleneck(kernels) -> Launches:
    # Every form of the kernel with all that takes registers, each activation, and what no tile divides.
    cases = [("bf16", "fp32", R, 4096, "gelu") for R in (16, 64, 128, 256)]
    cases += [("fp16", "fp16", 13, 1001, activation) for activation in ("relu", "silu", "gelu_tanh")]
    for dtype, bias_dtype, R, K, activation in cases:
        M, like = 8192, dict(dtype=_DTYPES[dtype], device="meta")
        x, y, residual = (torch.empty(M, K, **like) for _ in range(3))
        pre, down, up = torch.empty(M, R, **like), torch.empty(R, K, **like), torch.empty(K, R, **like)
        biases = (torch.empty(size, dtype=_DTYPES[bias_dtype], device="meta") for size in (R, K))
        case = _case(dtype=dtype, bias=bias_dtype, R=R, K=K, activation=activation)
        forward = (x, down, up, *biases, residual, activation, 0.5, y, pre)
        yield f"bottleneck_fwd {case}", partial(kernels.bottleneck_fwd, *forward)
        backward = (y, pre, up, down, y, activation, 0.5, pre, pre, x)
        yield f"bottleneck_bwd {case}", partial(kernels.bottleneck_bwd, *backward)
        for name, rows in (("up", R + 1), ("down", R)):
            out = torch.empty(rows, K, dtype=torch.float32, device="meta")
            yield f"bottleneck_grad {name} {case}", partial(kernels.bottleneck_grad, pre, x, 0.5, out)


TRITON: dict[str, Callable[..., Launches]] = {
    "nf4": _nf4,
    "dora_norm": _dora_norm,
    "dora_linear": _dora_linear,
    "lora_linear": _lora_linear,
    "prefix_attention": _prefix_attention,
    "ia3": _ia3,
    "bottleneck": _bottleneck,
}

# CUDA kernel instances (a regular expression) -> bytes of dynamic shared memory that their launcher asks for, which the
# machine code does not say. The kernels' own tests compare them with what is launched.
CUDA_DYNAMIC_SHARED_BYTES: dict[str, int] = {
    r"lora_down_kernel<\w+, 16, .*": 8 * 10240,
    r"lora_down_kernel<\w+, 64, .*": 6 * 16384,
    r"lora_down_kernel<\w+, 128, .*": 3 * 32768,
    # dA, dA with dropout, dB
    r"lora_grad_kernel<\w+, 16, \(Product\)[012]>": 5 * 17408,
    r"lora_grad_kernel<\w+, 64, \(Product\)[012]>": 4 * 20480,
    r"lora_grad_kernel<\w+, 128, \(Product\)[012]>": 4 * 24576,
    # dB and u
    r"lora_grad_kernel<\w+, 16, \(Product\)3>": 5 * 16896 + 8192,
    r"lora_grad_kernel<\w+, 32, \(Product\)3>": 4 * 17408 + 16384,
    # table and tokens, scales, absmax_code, sums of warps
    r"lora_linear_decode_kernel<.*, 1>": 65536 + 4096 + 1024 + 14 * 512,
    r"lora_linear_decode_kernel<.*, 2>": 65536 + 4096 + 1024 + 24 * 512,
    r"lora_linear_decode_kernel<.*, 4>": 65536 + 4096 + 1024 + 32 * 512,
    r"lora_linear_decode_kernel<.*, 8>": 65536 + 4096 + 1024 + 1 * 512,
    # 64 queries, and a ring of four or two tiles of 64 keys
    r"prefix_attention_decode_kernel<\w+, 64>": 5 * 8192,
    r"prefix_attention_decode_kernel<\w+, 96>": 5 * 12288,
    r"prefix_attention_decode_kernel<\w+, 128>": 5 * 16384,
    r"prefix_attention_decode_kernel<\w+, 256>": 3 * 32768,
}


def _compile_instead_of_launching(arch: str) -> list[tuple]:
    """From here on a Triton launch of this process compiles for sm_`arch` and runs nothing.

    The kernel is appended to the list that is returned, with what ptxas said. Triton does all of it: it specializes on
    the arguments and finds what it has compiled already; it only has to be told of a GPU that is not there. Written
    for Triton 3.6 to 3.9, whose inner names these are.
    """
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        set_active, run = driver.set_active, JITFunction.run
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"benchmarks/launches.py does not know Triton {version('triton')}: {error}") from error

    class AbsentGpu:
        def get_current_target(self):
            return GPUTarget("cuda", int(arch.rstrip("a")), 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    compiled = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((kernel, log.getvalue()))
        return kernel

    set_active(AbsentGpu())
    JITFunction.run = compile_only
    return compiled


def _triton_name(kernel) -> str:
    """The kernel and what it is specialized on: types (D: known to be divisible by 16), constants, warps."""
    names = list(kernel.src.signature)
    divisible = {path for path, attributes in kernel.src.attrs.items() if ["tt.divisibility", 16] in attributes}
    arguments = []
    for position, (name, type_) in enumerate(kernel.src.signature.items()):
        if type_ != "constexpr":
            arguments.append(f"{name}: {type_}{'D' if (position,) in divisible else ''}")
    arguments += [f"{names[path[0]]}={value}" for path, value in kernel.src.constants.items()]
    return f"{kernel.name}[{', '.join(arguments)}, warps={kernel.metadata.num_warps}]"


def _compile_triton(op: str, arch: str, folder: Path, cases: list[str]) -> None:
    compiled = _compile_instead_of_launching(arch)
    kept = {}
    every = dict(TRITON[op](importlib.import_module(f"fastpeft.triton_kernels.{op}")))
    for case in cases or every:
        launch = every[case]
        compiled.clear()
        launch()
        if not compiled:
            raise RuntimeError(f"{case} launches nothing")
        for kernel, log in compiled:
            if kernel.hash not in kept:
                if "registers" not in log:
                    raise RuntimeError(
                        f"Triton {version('triton')} does not pass on what ptxas says: no spills are known"
                    )
                binary = f"{kernel.name}-{kernel.hash[:16]}.cubin"
                (folder / binary).write_bytes(kernel.asm["cubin"])
                kept[kernel.hash] = {
                    "name": _triton_name(kernel),
                    "threads": 32 * kernel.metadata.num_warps,
                    "shared_bytes": kernel.metadata.shared,
                    "binary": binary,
                    "log": log,
                    "cases": [],
                }
            kept[kernel.hash]["cases"].append(case)
    (folder / "kernels.json").write_text(json.dumps(list(kept.values())))


if __name__ == "__main__":
    _compile_triton(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
