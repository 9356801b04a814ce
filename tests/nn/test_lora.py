"""LoRALinear, convert, merge and unmerge over dense, Conv1D and 4-bit bases."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft import convert
from fastpeft.nn import LoRALinear
from fastpeft.reference.lora_linear import lora_linear as reference
from tests.models import gpt2, llama, tokens, with_lora


def base(kind: str, dtype=torch.float32, K=64, N=48) -> nn.Module:
    if kind == "dense":
        return nn.Linear(K, N).to(dtype)
    if kind == "conv1d":
        layer = Conv1D(N, K)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    layer = bnb.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4", compress_statistics=kind == "nested")
    layer.bias.data = layer.bias.data.to(dtype)  # as its first forward would
    return layer.to("cpu")


def adapted(kind: str, dtype=torch.float32, **options) -> LoRALinear:
    layer = LoRALinear(base(kind, dtype), **({"r": 6, "alpha": 9} | options))
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


KINDS = ("dense", "conv1d", "plain", "nested")


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_and_follows_the_formula(kind):
    x = torch.randn(2, 5, 64)
    frozen = base(kind)
    expected = frozen(x)
    layer = LoRALinear(frozen, r=6, alpha=9)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    nn.init.normal_(layer.lora_B.weight)
    from fastpeft.nn.frozen import weight_of

    plain = reference(x, weight_of(frozen), layer.lora_A.weight, layer.lora_B.weight, 1.5, frozen.bias)
    assert torch.allclose(layer(x), plain, atol=1e-5)
    layer(x).sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == {
        "lora_A.weight",
        "lora_B.weight",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_output_type_is_that_of_the_base(kind):
    layer = adapted(kind, torch.bfloat16)
    assert layer.lora_A.weight.dtype == torch.float32
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert layer(x).dtype == layer.base(x).dtype == torch.bfloat16
    if kind in ("plain", "nested"):  # a 4-bit base takes any dtype and gives it back
        assert layer(x.float()).dtype == layer.base(x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merge_tells_what_it_lost_and_unmerge_gives_all_back(kind, dtype):
    layer, x = adapted(kind, dtype).eval(), torch.randn(7, 64).to(dtype)
    before, state, weight = layer(x), copy.deepcopy(layer.state_dict()), layer.base.weight
    exact = layer.base(x).double() + x.double() @ layer.delta_weight().double().t()
    assert not layer.merged
    lost = layer.merge()
    assert layer.merged
    four_bits = kind in ("plain", "nested")
    assert lost < (1.5 if four_bits else 0.02 if dtype == torch.bfloat16 else 1e-5)
    # The reported loss is the error of the weight, so the output is off by about that share of the update.
    update = (x.double() @ layer.delta_weight().double().t()).norm()
    error = (layer(x).double() - exact).norm()
    assert error < 2 * lost * update + torch.finfo(dtype).eps * 8 * exact.norm()
    if four_bits:
        assert layer.base.weight.quant_state.nested == (kind == "nested") and lost > 0.01
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    assert layer.state_dict().keys() == state.keys()
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert layer.base.weight is weight
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


def test_a_broken_adapter_is_not_merged():
    for kind in ("dense", "nested"):
        layer = adapted(kind)
        weight = layer.base.weight
        layer.lora_A.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            layer.merge()
        assert layer.base.weight is weight and not layer.merged
    layer = adapted("dense", torch.float16)
    layer.lora_B.weight.data.fill_(1e6)  # finite in float32, not in the weight's float16
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()


def test_unload_returns_the_merged_base():
    layer, x = adapted("dense"), torch.randn(3, 64)
    expected = layer(x)
    unloaded = layer.unload()
    assert type(unloaded) is nn.Linear and torch.allclose(unloaded(x), expected, atol=1e-5)


def test_training_learns_and_leaves_the_base():
    layer = LoRALinear(base("nested"), r=8, dropout=0.1)
    before = layer.base.weight.data.clone()
    x = torch.randn(256, 64)
    target = layer.base(x).detach() + x @ torch.randn(64, 48) * 0.05
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and torch.equal(layer.base.weight.data, before)


def test_evaluation_first_does_not_spoil_training():
    layer, x = adapted("nested", torch.bfloat16), torch.randn(9, 64, dtype=torch.bfloat16)
    layer(x).sum().backward()
    before = layer.lora_A.weight.grad.clone()
    layer.zero_grad()
    layer.eval()
    with torch.no_grad():
        layer(x)
        layer.base(x)
    layer.train()(x).sum().backward()
    assert torch.equal(layer.lora_A.weight.grad, before)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Conv2d"):
        LoRALinear(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="r is 0"):
        LoRALinear(nn.Linear(4, 4), r=0)
    with pytest.raises(ValueError, match="dropout is 1.0"):
        LoRALinear(nn.Linear(4, 4), dropout=1.0)
    with pytest.raises(ValueError, match="fp4"):
        LoRALinear(bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu"))


def make(linear: nn.Module) -> LoRALinear:
    return LoRALinear(linear, r=4)


def test_convert_wraps_what_matches_and_freezes_the_rest():
    model, ids = llama(), tokens()
    expected = model(ids).logits
    names = convert(model, make, ["q_proj", "down_proj"])
    assert names == [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")]
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_convert_target_forms():
    assert len(convert(llama(), make)) == 14  # all-linear leaves lm_head
    assert convert(llama(), make, r".*layers\.1\.self_attn\.[kv]_proj") == [
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert len(convert(gpt2(), make)) == 8
    model = llama()
    convert(model, make, ["q_proj"])
    assert len(convert(model, make)) == 12  # a base that is wrapped already is not wrapped again


def test_convert_twice_trains_both_and_leaves_peft_alone():
    model = llama()
    convert(model, make, ["q_proj"])
    convert(model, make, ["v_proj"])
    trainable = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="peft already"):
        convert(with_lora(llama()), make)


def test_convert_keeps_the_mode():
    for training in (True, False):
        model = llama().train(training)
        convert(model, make)
        assert all(module.training is training for module in model.modules())


def test_convert_keeps_tied_modules_tied():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    convert(model, make)
    assert model["a"] is model["b"] and isinstance(model["a"], LoRALinear)


def test_convert_that_fails_changes_nothing():
    model = llama()
    for error, targets, function in (
        (ValueError, ["no_such"], make),
        (ValueError, ["embed_tokens"], make),
        (ZeroDivisionError, ["q_proj"], lambda linear: [make(linear), 1 / 0]),
    ):
        with pytest.raises(error):
            convert(model, function, targets)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(isinstance(module, LoRALinear) for module in model.modules())
