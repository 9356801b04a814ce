"""IA3Linear: starts as its base, trains its vector alone, merges dense and into 4 bits."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.integrations.bitsandbytes import close_cpu_trap
from fastpeft.nn import IA3Linear
from tests.models import gpt2, llama, quantize, tokens

BF16, FP32 = torch.bfloat16, torch.float32


def base_of(kind: str, dtype=FP32) -> nn.Module:
    if kind == "conv1d":
        return Conv1D(24, 64).to(dtype)
    linear = nn.Linear(64, 24)
    if kind == "dense":
        return linear.to(dtype)
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(64, 24, compute_dtype=dtype, quant_type="nf4")
    new.load_state_dict(linear.state_dict())
    return new.to("cpu")


def trained(layer: IA3Linear) -> IA3Linear:
    nn.init.normal_(layer.ia3_l, mean=1.0, std=0.4)
    layer.ia3_l.data[::6] = 0
    return layer


@pytest.mark.parametrize("kind", ("dense", "conv1d", "nf4"))
@pytest.mark.parametrize("feedforward", (False, True))
def test_formula_start_and_merge(kind, feedforward):
    layer, x = IA3Linear(base_of(kind), feedforward), torch.randn(2, 5, 64)
    start = layer.base(x).detach()
    assert torch.allclose(layer(x), start, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["ia3_l"]
    ia3_l = trained(layer).ia3_l
    expected = (layer.base(x * ia3_l) if feedforward else layer.base(x) * ia3_l).detach()
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer(x).sum().backward()
    assert ia3_l.grad.abs().min() > 0  # zeros in l included
    weight, bias = layer.base.weight.data.clone(), layer.base.bias.data.clone()
    lost = layer.merge()
    assert layer.merged and (lost < 1e-6 if kind != "nf4" else 0 < lost < 0.5)
    error = (layer(x) - expected).norm() / expected.norm()
    assert error < (0.2 if kind == "nf4" else 1e-5)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base.weight.data, weight) and torch.equal(layer.base.bias.data, bias)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    base = layer.unload()
    assert base is layer.base and (base(x) - expected).norm() / expected.norm() < (0.2 if kind == "nf4" else 1e-5)


def test_positive_rows_merge_into_4_bits_almost_without_loss():
    """A block of absmax lies within a row: its codes stay, and its absmax is scaled."""
    layer = IA3Linear(base_of("nf4"))
    nn.init.uniform_(layer.ia3_l, 0.5, 1.5)
    assert layer.merge() < 0.02


def test_bad_input():
    with pytest.raises(ValueError, match="base is a Embedding"):
        IA3Linear(nn.Embedding(3, 4))
    layer = IA3Linear(base_of("dense"))
    layer.ia3_l.data[0] = torch.inf
    weight = layer.base.weight
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert layer.base.weight is weight and not layer.merged


@pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))
def test_convert_a_model(kind):
    model = gpt2() if kind == "gpt2" else llama()
    if kind == "llama4bit":
        model = quantize(model, FP32)
    keys, last = (["c_attn"], "mlp.c_proj") if kind == "gpt2" else (["k_proj", "v_proj"], "down_proj")
    ids = tokens()
    start = model(ids).logits.detach()
    names = fastpeft.convert(model, IA3Linear, keys)
    names += fastpeft.convert(model, lambda linear: IA3Linear(linear, feedforward=True), [last])
    assert torch.allclose(model(ids).logits, start, atol=1e-4)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(f"{name}.ia3_l" for name in names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("kind", ("llama", "gpt2", "llama4bit"))
def test_files_are_those_of_peft_both_ways(kind, tmp_path):
    def plain():
        return copy.deepcopy(base).eval()

    base = gpt2() if kind == "gpt2" else llama()
    if kind == "llama4bit":
        base = quantize(base, FP32)
        close_cpu_trap(base)  # as accelerate does: an evaluation would change layers that have no adapter
    keys, last = (["c_attn"], "mlp.c_proj") if kind == "gpt2" else (["k_proj", "v_proj"], "down_proj")
    model, ids = plain(), tokens()
    fastpeft.convert(model, IA3Linear, keys)
    fastpeft.convert(model, lambda linear: IA3Linear(linear, feedforward=True), [last])
    for layer in model.modules():
        if isinstance(layer, IA3Linear):
            trained(layer)
    with torch.no_grad():
        expected = model(ids).logits
        fastpeft.save_adapter(model, tmp_path / "ours")
        again = plain()
        names = fastpeft.load_adapter(again, tmp_path / "ours")
        assert len(names) == (4 if kind == "gpt2" else 6) and torch.equal(again(ids).logits, expected)
        fastpeft.load_adapter(again, tmp_path / "ours")  # a second time, into the modules that are there
        theirs = PeftModel.from_pretrained(plain(), tmp_path / "ours")
        fastpeft.accelerate(theirs, strict=True)
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        again = plain()
        fastpeft.load_adapter(again, tmp_path / "theirs")
        assert torch.equal(again(ids).logits, expected)


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = llama()
    fastpeft.convert(model, IA3Linear, ["k_proj"])
    fastpeft.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    other = gpt2()
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match="which the model has not"):
        fastpeft.load_adapter(other, tmp_path)
    different = llama()
    fastpeft.convert(different, IA3Linear, ["v_proj"])
    with pytest.raises(ValueError, match="adapt different modules"):
        fastpeft.load_adapter(different, tmp_path)
    turned = llama()
    fastpeft.convert(turned, lambda linear: IA3Linear(linear, feedforward=True), ["k_proj"])
    with pytest.raises(ValueError, match=r"a vector \(64, 1\).*needs \(1, 128\)"):
        fastpeft.load_adapter(turned, tmp_path)
    path.write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    with pytest.raises(ValueError, match="modules_to_save"):
        fastpeft.load_adapter(llama(), tmp_path)
    assert keys == list(other.state_dict())
    fastpeft.convert(model, fastpeft.nn.LoRALinear, ["q_proj"])
    with pytest.raises(ValueError, match="one method"):
        fastpeft.save_adapter(model, tmp_path)


def test_tensors_of_another_method_are_refused(tmp_path):
    model = llama()
    fastpeft.convert(model, fastpeft.nn.LoRALinear, ["q_proj"])
    fastpeft.save_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="should hold vectors"):
        fastpeft.load_adapter(llama(), tmp_path)
