"""NF4 storage: bit for bit that of bitsandbytes, held without a copy, refused where it cannot be right."""

import subprocess
import sys
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from fastpeft.triton_kernels import nf4 as triton_nf4

from fastpeft import NF4Weight, _native, ops, quant
from fastpeft.reference import nf4 as formula
from tests.backends import over
from tests.parity import assert_parity

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# [N, K]: even and odd, one block and many, blocks that cross rows, a last block that is short.
SHAPES = ((64, 64), (8, 8), (1, 1), (3, 3), (33, 72), (7, 130), (48, 41), (9, 4160))


ALL = over("eager", "triton", "cuda")
KERNELS = over("triton", "cuda")


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bits(actual, expected):
    """Signs of zeros and of infinities included; of a NaN only that it is one."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(bits(actual.masked_fill(actual.isnan(), 0)), bits(expected.masked_fill(expected.isnan(), 0)))


def quantize(weight, blocksize, nested, backend):
    """By `backend`, back on the CPU."""
    return ops.nf4_quantize(weight.to(backend.device), blocksize, nested, backend=backend.name).to("cpu")


def dequantize(weight, dtype, backend):
    return ops.nf4_dequantize(weight.to(backend.device), dtype, backend=backend.name).cpu()


def random_storage(shape, blocksize, nested, absmax=None):
    """Codes of every value over blocks of any magnitude; `absmax` values overwrite the first ones, if not nested."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    common = dict(packed=torch.randint(256, (-(-numel // 2),), dtype=torch.uint8), shape=shape, blocksize=blocksize)
    if not nested:
        values = torch.randn(blocks).exp()
        if absmax is not None:
            values[: len(absmax)] = torch.tensor(absmax)[:blocks]
        return NF4Weight(absmax=values, dtype=torch.float32, **common)
    scales = -(-blocks // formula.ABSMAX_BLOCKSIZE)
    return NF4Weight(
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8),
        absmax_code=formula.absmax_code(torch.device("cpu")),
        absmax_scale=torch.rand(scales) + 0.1,
        absmax_offset=torch.rand(()),
        dtype=torch.float32,
        **common,
    )


@ALL
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
def test_quantize_writes_the_bytes_of_bitsandbytes(blocksize, nested, backend):
    for shape in SHAPES:
        for dtype in FLOATS:
            weight = torch.randn(shape).to(dtype)
            packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
            own = quantize(weight, blocksize, nested, backend)
            assert_same_bits(own.packed, packed.view(-1))
            assert_same_bits(own.absmax, state.absmax)
            if nested and backend.device == "cpu":  # the mean of another device has another order of summation
                assert_same_bits(own.absmax_offset, state.offset)
                assert_same_bits(own.absmax_scale, state.state2.absmax)
                assert_same_bits(own.absmax_code, state.state2.code)


@ALL
def test_quantize_writes_the_bytes_of_bitsandbytes_for_many_absmax_values(backend):
    """Enough second-level blocks to meet values near the middle between two 8-bit codes."""
    weight = torch.randn(512, 1024) * torch.rand(512, 1).exp()
    _, state = quantize_4bit(weight, blocksize=32, compress_statistics=True, quant_type="nf4")
    own = quantize(weight, 32, True, backend)
    if backend.device == "cpu":
        assert_same_bits(own.absmax, state.absmax)
        assert_same_bits(own.absmax_scale, state.state2.absmax)
    else:
        assert_same_bits(own.absmax, formula.quantize_absmax(*formula_inputs(weight, own))[0])


def formula_inputs(weight, own):
    return formula.nf4_quantize(weight, own.blocksize)[1], own.absmax_offset, own.absmax_code


@ALL
@pytest.mark.parametrize("special", (0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-40, 3e38))
def test_quantize_agrees_on_special_values(special, backend):
    weight = torch.randn(5, 96)
    weight[1] = special
    weight[3, 40] = special
    weight[4, -1] = special  # in the last block, which is short
    for nested in (False, True):
        packed, state = quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
        own = quantize(weight, 64, nested, backend)
        assert_same_bits(own.packed, packed.view(-1))
        assert_same_bits(own.absmax, state.absmax)


@ALL
def test_quantize_takes_values_at_the_middle_between_two_codes(backend):
    """Where a rounding mode, or a comparison with the wrong sign of equality, would show."""
    values = formula.nf4_values(torch.device("cpu"))
    middles = (values[:-1] + values[1:]) / 2
    around = torch.stack([middles, middles.nextafter(torch.tensor(-2.0)), middles.nextafter(torch.tensor(2.0))])
    weight = torch.cat([torch.ones(1), around.flatten(), -torch.ones(18)]).view(1, 64)
    packed, _ = quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    assert_same_bits(quantize(weight, 64, False, backend).packed, packed.view(-1))


@ALL
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
def test_dequantize_equals_the_formula_bit_for_bit(blocksize, nested, backend):
    for shape in SHAPES:
        weight = random_storage(shape, blocksize, nested)
        for dtype in FLOATS:
            expected = ops.nf4_dequantize(weight, dtype, backend="reference")
            assert_same_bits(dequantize(weight, dtype, backend), expected)


@ALL
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("shape,blocksize", [((64, 64), 64), ((48, 576), 64), ((16, 1024), 256), ((8, 4096), 4096)])
def test_dequantize_equals_bitsandbytes_bit_for_bit(shape, blocksize, nested, backend):
    """Where bitsandbytes' CPU code is right: it is not where a block crosses a row (see the test below)."""
    for dtype in FLOATS:
        packed, state = quantize_4bit(
            torch.randn(shape).to(dtype), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
        )
        view = NF4Weight.from_bnb(bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True))
        assert_same_bits(dequantize(view, dtype, backend), dequantize_4bit(packed, state))


@ALL
def test_dequantize_carries_nan_infinity_and_zero_in_absmax(backend):
    nan, inf = float("nan"), float("inf")
    tiny = 1e-36 if backend.name == "eager" else 1e-40  # bitsandbytes' AVX512-BF16 code flushes subnormals to zero
    weight = random_storage((9, 96), 32, False, absmax=[nan, inf, -inf, 0.0, -0.0, tiny, 3e38, 1e30])
    for dtype in FLOATS:
        assert_same_bits(dequantize(weight, dtype, backend), formula.nf4_dequantize(weight, dtype))


@ALL
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
def test_storage_at_any_address(nested, backend):
    """Codes that start at an odd byte, absmax that starts inside a vector, a weight that is a view."""
    weight = random_storage((21, 100), 32, nested)
    shifted = {
        name: torch.cat([value.new_zeros(1), value.flatten()]).to(backend.device)[1:].view(value.shape)
        for name, value in vars(weight).items()
        if isinstance(value, torch.Tensor)
    }
    for dtype in FLOATS:
        expected = formula.nf4_dequantize(weight, dtype)
        assert_same_bits(ops.nf4_dequantize(replace(weight, **shifted), dtype, backend=backend.name).cpu(), expected)

        whole = torch.randn(23, 101, dtype=dtype, device=backend.device)
        for view in (whole[1:, 1:], whole.t(), whole.view(-1)[1:2301].view(23, 100)):
            own = ops.nf4_quantize(view, 32, nested, backend=backend.name)
            same = ops.nf4_quantize(view.cpu().clone(), 32, nested, backend="reference")
            assert_same_bits(own.packed, same.packed)


@ALL
@pytest.mark.parametrize("shape", ((0, 64), (4, 0)))
def test_empty_tensors(shape, backend):
    for nested in (False, True):
        own = quantize(torch.randn(shape), 64, nested, backend)
        assert own.packed.numel() == own.absmax.numel() == 0
        for dtype in FLOATS:
            assert dequantize(own, dtype, backend).shape == shape


@KERNELS
def test_neighbours_of_the_output_are_left_alone(backend):
    """The kernels themselves, with their outputs inside larger buffers."""
    weight = random_storage((7, 99), 32, True).to(backend.device)
    for dtype in FLOATS:
        around = torch.full((7 * 99 + 64,), 3.0, dtype=dtype, device=backend.device)
        launch_dequantize(weight, around[32:-32], backend)
        assert (around[:32] == 3).all() and (around[-32:] == 3).all()
        assert_same_bits(around[32:-32].view(7, 99), formula.nf4_dequantize(weight.to("cpu"), dtype))


def launch_dequantize(weight, out, backend):
    nested = (weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
    if backend.name == "triton":
        triton_nf4.nf4_dequantize(weight.packed, weight.absmax, *nested, weight.blocksize, out)
    else:
        with _native.stream_on(weight.device) as stream:
            storage, dtype = quant.native_storage(weight), quant.native_dtype(out.dtype)
            _native.cuda.nf4_dequantize(storage, out.data_ptr(), dtype, out.numel(), stream)


def merge_problem(shape, R, dtype, blocksize=64, nested=True, gain=True):
    """Sizes as in a trained adapter: an update of about a tenth of the weight."""
    N, K = shape
    weight = ops.nf4_quantize(torch.randn(N, K) / max(K, 1) ** 0.5, blocksize, nested)
    A, B = torch.randn(R, K, dtype=dtype), torch.randn(N, R, dtype=dtype) / (10 * max(R * K, 1) ** 0.5)
    return weight, A, B, torch.rand(N) + 0.5 if gain else None


def check_merge(weight, A, B, gain, dtype, backend, scaling=1.7):
    on = [t if t is None else t.to(backend.device) for t in (weight, A, B)]
    moved = scaling.to(backend.device) if isinstance(scaling, torch.Tensor) else scaling
    actual = ops.nf4_merge(*on, moved, gain if gain is None else gain.to(backend.device), dtype, backend=backend.name)
    scaling = float(scaling)
    plain = formula.nf4_merge(weight, A.to(dtype), B.to(dtype), scaling, gain, dtype)
    exact = formula.nf4_merge(weight, A.double(), B.double(), scaling, gain, torch.float64)
    assert_parity(actual.cpu(), plain, exact)


MERGE = over("eager", "cuda")


@MERGE
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("R", (0, 1, 4, 13, 16, 64, 384))
def test_merge_over_ranks(R, dtype, backend):
    check_merge(*merge_problem((70, 136), R, dtype), dtype, backend)


@MERGE
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
def test_merge_over_blocksizes(blocksize, nested, backend):
    for shape in ((64, 64), (33, 72), (16, 520), (3, 4160)):
        check_merge(*merge_problem(shape, 8, torch.bfloat16, blocksize, nested), torch.bfloat16, backend)
    check_merge(*merge_problem((33, 72), 8, torch.float16, blocksize, nested), torch.float16, backend)


@MERGE
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("shape", ((1, 1), (3, 3), (7, 130), (48, 41), (129, 257), (1, 4095)))
def test_merge_over_odd_shapes(shape, nested, backend):
    for dtype in (torch.bfloat16, torch.float16):
        check_merge(*merge_problem(shape, 5, dtype, nested=nested), dtype, backend)


@MERGE
def test_merge_of_float32_masters_with_and_without_gain_and_with_a_tensor_as_scaling(backend):
    for scaling in (0.0, -2.5, torch.tensor(0.3), torch.tensor([1e-3], dtype=torch.float64)):
        for gain in (False, True):
            for dtype in (torch.bfloat16, torch.float16):
                check_merge(*merge_problem((40, 96), 16, torch.float32, gain=gain), dtype, backend, scaling)


@MERGE
def test_merge_rounds_once(backend):
    """An update below the last bit of the weight still moves some sums; a weight that is rounded first loses it."""
    weight, A, B, _ = merge_problem((64, 64), 16, torch.bfloat16)
    tiny = ops.nf4_merge(weight.to(backend.device), A.to(backend.device), B.to(backend.device), 2.0**-6,
                         dtype=torch.bfloat16, backend=backend.name).cpu()  # fmt: skip
    exact = formula.nf4_merge(weight, A.double(), B.double(), 2.0**-6, dtype=torch.float64)
    nearest = exact.to(torch.float32).to(torch.bfloat16)
    assert (tiny != nearest).float().mean() < 0.01
    assert (tiny != weight.dequantize(torch.bfloat16)).float().mean() > 0.05


@MERGE
def test_merge_of_an_empty_weight(backend):
    for shape in ((0, 64), (4, 0)):
        weight, A, B, gain = merge_problem(shape, 4, torch.bfloat16, nested=False)
        merged = ops.nf4_merge(weight.to(backend.device), A.to(backend.device), B.to(backend.device), 1.0,
                               gain.to(backend.device), torch.bfloat16, backend=backend.name)  # fmt: skip
        assert merged.shape == shape


def test_merge_refuses_with_the_reason():
    weight, A, B, gain = merge_problem((8, 64), 4, torch.float32)
    with pytest.raises(ValueError, match=r"A is \(4, 64\) and B is \(8, 3\).*\[N?\d*, ?R\]"):
        ops.nf4_merge(weight, A, B[:, :3], 1.0)
    with pytest.raises(ValueError, match=r"gain is \(7,\); it must be \(8,\)"):
        ops.nf4_merge(weight, A, B, 1.0, gain[:7])
    with pytest.raises(ValueError, match="2 elements"):
        ops.nf4_merge(weight, A, B, torch.ones(2))
    with pytest.raises(TypeError, match="NF4Weight; got Tensor"):
        ops.nf4_merge(torch.ones(8, 64), A, B, 1.0)
    with pytest.raises(TypeError, match="A is torch.int64"):
        ops.nf4_merge(weight, A.long(), B, 1.0)
    with pytest.raises(ValueError, match="float32; the kernel writes bf16 and fp16"):
        ops.nf4_merge(weight, A, B, 1.0, dtype=torch.float32, backend="cuda")


def test_blocks_that_cross_rows_are_right():
    """bitsandbytes 0.50 dequantizes such a weight wrongly with AVX512 on a CPU; fastpeft must not go through it."""
    weight = torch.randn(64, 96)
    own = ops.nf4_quantize(weight)
    step = own.absmax_float().max() * 0.16  # half of the widest gap between two NF4 values, times the largest absmax
    assert (ops.nf4_dequantize(own) - weight).abs().max() < step


def test_from_bnb_is_a_view_for_every_storage_dtype():
    for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        for nested in (False, True):
            linear = bnb.nn.Linear4bit(
                128,
                64,
                quant_type="nf4",
                quant_storage=storage,
                compress_statistics=nested,
                compute_dtype=torch.float32,
            ).to("cpu")
            expected = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            for source in (linear, linear.weight):
                view = NF4Weight.from_bnb(source)
                assert view.packed.data_ptr() == linear.weight.data_ptr()
                assert view.absmax.data_ptr() == linear.weight.quant_state.absmax.data_ptr()
                assert view.nested == nested and view.shape == (64, 128)
                assert torch.equal(view.dequantize(), expected)


def test_from_bnb_reads_the_state_from_the_module_when_the_weight_has_lost_it():
    linear = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    expected = NF4Weight.from_bnb(linear).dequantize()
    linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)  # what FSDP2's unshard leaves
    assert torch.equal(NF4Weight.from_bnb(linear).dequantize(), expected)


def test_refusals_name_the_reason_and_the_way_out():
    with pytest.raises(ValueError, match="fp4.*bnb_4bit_quant_type='nf4'"):
        NF4Weight.from_bnb(bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu"))
    with pytest.raises(ValueError, match="not quantized yet"):
        NF4Weight.from_bnb(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))

    with pytest.raises(TypeError, match="Linear4bit or Params4bit.*got Linear"):
        NF4Weight.from_bnb(torch.nn.Linear(4, 4))

    repacked = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    repacked.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked.*reload"):
        NF4Weight.from_bnb(repacked)

    wrong = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    wrong.out_features = 32
    with pytest.raises(ValueError, match=r"\(64, 64\).*\[32, 64\]"):
        NF4Weight.from_bnb(wrong)
    wrong.out_features = 64
    wrong.weight.quant_state.absmax = wrong.weight.quant_state.absmax[:-1]
    with pytest.raises(ValueError, match="absmax has 63 elements.*needs 64"):
        NF4Weight.from_bnb(wrong)

    with pytest.raises(ValueError, match="blocksize is 48"):
        ops.nf4_quantize(torch.randn(4, 4), blocksize=48)
    with pytest.raises(ValueError, match="float64"):
        ops.nf4_quantize(torch.randn(4, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="dtype is torch.int8"):
        ops.nf4_dequantize(ops.nf4_quantize(torch.randn(4, 4)), torch.int8)
    with pytest.raises(ValueError, match="cannot run on backend 'cuda'"):
        ops.nf4_dequantize(ops.nf4_quantize(torch.randn(4, 4)), backend="cuda")


def test_works_without_bitsandbytes():
    code = (
        "import sys, torch\n"
        "for name in ('bitsandbytes', 'peft', 'transformers'): sys.modules[name] = None  # import raises\n"
        "import fastpeft; w = torch.randn(64, 64)\n"
        "q = fastpeft.NF4Weight.quantize(w); x = torch.randn(3, 64, requires_grad=True)\n"
        "assert (q.dequantize() - w).abs().max() < 0.6\n"
        "fastpeft.ops.lora_linear(x, q, torch.randn(4, 64), torch.randn(64, 4), 1.0).sum().backward()\n"
        "layer = fastpeft.nn.LoRALinear(torch.nn.Linear(8, 8)); layer(torch.randn(2, 8))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_opcheck_and_compile():
    weight = ops.nf4_quantize(torch.randn(16, 64))
    nested = (weight.absmax_code, weight.absmax_scale, weight.absmax_offset)
    arguments = (weight.packed, weight.absmax, *nested, list(weight.shape), weight.blocksize, torch.float16, None)
    torch.library.opcheck(torch.ops.fastpeft.nf4_dequantize, arguments)
    A, B, gain = torch.randn(4, 64), torch.randn(16, 4), torch.rand(16)
    factor = torch.tensor(0.5)
    merge = (*arguments[:-2], A, B, 2.0, factor, gain, torch.bfloat16, None)
    torch.library.opcheck(torch.ops.fastpeft.nf4_merge, merge)
    compiled = torch.compile(lambda w: ops.nf4_merge(w, A, B, factor, gain), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), ops.nf4_merge(weight, A, B, factor, gain))
    compiled = torch.compile(lambda w: ops.nf4_dequantize(w, torch.float32) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), weight.dequantize(torch.float32) * 2)


def test_to_and_storage_size():
    weight = ops.nf4_quantize(torch.randn(64, 64))
    assert weight.storage_bytes == 64 * 32 + 64 + 256 * 4 + 4 + 4
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())
