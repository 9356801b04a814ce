"""NF4 storage: bit for bit that of bitsandbytes, held without a copy, refused where it cannot be right."""

import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from fastpeft import NF4Weight, ops
from fastpeft.reference import nf4 as formula

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# [N, K]: even and odd, one block and many, blocks that cross rows, a last block that is short.
SHAPES = ((64, 64), (8, 8), (1, 1), (3, 3), (33, 72), (7, 130), (48, 41), (96, 4160))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_writes_the_bytes_of_bitsandbytes(shape, blocksize, nested):
    for dtype in FLOATS:
        weight = torch.randn(shape).to(dtype)
        packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
        own = ops.nf4_quantize(weight, blocksize, double_quant=nested)
        assert torch.equal(own.packed, packed.view(-1))
        assert torch.equal(own.absmax, state.absmax)
        if nested:
            assert torch.equal(own.absmax_offset, state.offset)
            assert torch.equal(own.absmax_scale, state.state2.absmax)
            assert torch.equal(own.absmax_code, state.state2.code)


def test_quantize_writes_the_bytes_of_bitsandbytes_for_many_absmax_values():
    """Enough second-level blocks to meet values near the middle between two 8-bit codes."""
    weight = torch.randn(2048, 1024) * torch.rand(2048, 1).exp()
    _, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    own = ops.nf4_quantize(weight)
    assert torch.equal(own.absmax, state.absmax)
    assert torch.equal(own.absmax_scale, state.state2.absmax)


@pytest.mark.parametrize("special", (0.0, float("nan"), float("inf")))
def test_quantize_agrees_on_special_values(special):
    weight = torch.randn(4, 96)
    weight[1] = special
    for nested in (False, True):
        packed, state = quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
        own = ops.nf4_quantize(weight, double_quant=nested)
        assert torch.equal(own.packed, packed.view(-1))
        assert torch.equal(bits(own.absmax), bits(state.absmax))


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("blocksize", formula.BLOCKSIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_the_formula_bit_for_bit(shape, blocksize, nested):
    weight = ops.nf4_quantize(torch.randn(shape), blocksize, nested)
    for dtype in FLOATS:
        assert torch.equal(
            ops.nf4_dequantize(weight, dtype, backend="eager"), ops.nf4_dequantize(weight, dtype, backend="reference")
        )


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("shape,blocksize", [((64, 64), 64), ((48, 576), 64), ((16, 1024), 256), ((8, 4096), 4096)])
def test_dequantize_equals_bitsandbytes_bit_for_bit(shape, blocksize, nested):
    """Where bitsandbytes' CPU code is right: it is not where a block crosses a row (see the test below)."""
    for dtype in FLOATS:
        packed, state = quantize_4bit(
            torch.randn(shape).to(dtype), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
        )
        view = NF4Weight.from_bnb(bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True))
        expected = dequantize_4bit(packed, state)
        for backend in ("eager", "reference"):
            assert torch.equal(ops.nf4_dequantize(view, dtype, backend=backend), expected)


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
    compiled = torch.compile(lambda w: ops.nf4_dequantize(w, torch.float32) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), weight.dequantize(torch.float32) * 2)


def test_to_and_storage_size():
    weight = ops.nf4_quantize(torch.randn(64, 64))
    assert weight.storage_bytes == 64 * 32 + 64 + 256 * 4 + 4 + 4
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())
